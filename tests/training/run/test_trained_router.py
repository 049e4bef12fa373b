from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from peft_hoe import ExpertError, HoEWarning, RouterSpec
from peft_hoe.training.ppo.critics import ValueHeads
from peft_hoe.training.run.trained_router import TrainedRouter

IDS = torch.tensor([[5, 6, 7, 8, 9]])


def randomise(router: TrainedRouter) -> None:
    generator = torch.Generator().manual_seed(5)
    for parameter in router.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("name", ["r0", "r1"])
def test_attached_router_votes_as_written_one(toys: ModuleType, name: str, agree: Callable[..., None]) -> None:
    model = toys.make_policy()
    router = TrainedRouter(model, name)
    model.mark_trained(name)
    untouched = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    randomise(router)
    with torch.no_grad():
        static = model(IDS, preference=router.preference).logits
        with router.attached():
            attached = model(IDS, preference=router.preference).logits
        assert torch.equal(model(IDS, preference=router.preference).logits, static)
        assert all(torch.equal(tensor, untouched[key]) for key, tensor in model.state_dict().items())
        router.write()
        written = model(IDS, preference=router.preference).logits
    agree(attached, written)
    assert (attached - static).abs().max() > 1e-2


def test_a_router_by_module_is_its_biases_alone(toys: ModuleType, agree: Callable[..., None]) -> None:
    model = toys.make_policy(routers=[RouterSpec([0.25, 0.75], kind="module"), [0.75, 0.25]])
    router = TrainedRouter(model, "r0")
    assert all(parameter.shape == (2,) for parameter in router.parameters())
    model.mark_trained("r0")
    randomise(router)
    with torch.no_grad():
        static = model(IDS, preference=router.preference).logits
        with router.attached():
            attached = model(IDS, preference=router.preference).logits
        router.write()
        written = model(IDS, preference=router.preference).logits
    agree(attached, written)
    assert (attached - static).abs().max() > 1e-2
    assert not any(layer.hoe_router["default"].weight[:2].any() for layer in router.layers)


def test_the_dial_around_a_router(toys: ModuleType) -> None:
    """The toys' third expert is at the centroid; a router at [.75, .25] votes for it and for the corner."""
    model = toys.make_policy(routers=[[0.75, 0.25], RouterSpec([0.25, 0.75], votes_for=["low", "high"])])
    assert TrainedRouter(model, "r0").voted.tolist() == [[1, 0], [0.5, 0.5]]
    assert TrainedRouter(model, "r0").dial.tolist() == [[0.75, 0.25], [0.875, 0.125], [0.625, 0.375]]
    assert TrainedRouter(model, "r1").dial.tolist() == [[0.25, 0.75], [0.625, 0.375], [0.125, 0.875]]


def test_write_changes_only_its_rows_and_read_takes_them_back(toys: ModuleType) -> None:
    model = toys.make_policy()
    router, other = TrainedRouter(model, "r1"), TrainedRouter(model, "r0")
    before = [tensor.clone() for tensor in other.state_dict().values()]
    randomise(router)
    router.write()
    other.read()
    assert all(torch.equal(x, y) for x, y in zip(before, other.state_dict().values(), strict=True))
    fresh = TrainedRouter(model, "r1")
    assert all(torch.equal(x, y) for x, y in zip(router.parameters(), fresh.parameters(), strict=True))


def test_gradients_reach_its_own_parameters_only(toys: ModuleType) -> None:
    model = toys.make_policy()
    router = TrainedRouter(model, "r0")
    model.mark_trained("r0")
    model.requires_grad_(False)
    with router.attached():
        model(IDS, preference=router.preference).logits.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in router.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_sixteen_bit_models_train_in_float32(toys: ModuleType) -> None:
    model = toys.make_policy().to(torch.bfloat16)
    router = TrainedRouter(model, "r0")
    model.mark_trained("r0")
    assert {parameter.dtype for parameter in router.parameters()} == {torch.float32}
    with router.attached(), torch.no_grad():
        assert model(IDS, preference=router.preference).logits.dtype == torch.bfloat16


def test_an_expert_without_weights_warns_and_none_at_all_raises(toys: ModuleType) -> None:
    model = toys.make_policy()
    layers = TrainedRouter(model, "r0").layers
    for layer in layers:
        layer.factors("default")[1].data[:, 8:12] = 0  # the centroid
    with pytest.warns(HoEWarning, match="centroid"):
        TrainedRouter(model, "r0")
    for layer in layers:
        layer.factors("default")[1].data.zero_()
    with pytest.raises(ExpertError, match="hold no weights"):
        TrainedRouter(model, "r0")


def test_value_heads_detach_and_start_at_zero() -> None:
    heads = ValueHeads(4, 3)
    hidden = torch.randn(2, 5, 4, requires_grad=True)
    values = heads(hidden)
    assert values.shape == (2, 5, 3)
    assert not values.any()
    values.sum().backward()
    assert hidden.grad is None
