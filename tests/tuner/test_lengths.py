"""Interpolation that keeps length: the rule, and that every way to use an adapter follows it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_hoe import HoEConfig, RouterSpec
from peft_hoe.errors import CheckpointError, ExpertError
from peft_hoe.tuner.layer import HoELayer
from peft_hoe.tuner.lengths import ExpertLengths, gram

MIDDLE = [0.5, 0.5]


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin = nn.Linear(2, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x)


@torch.no_grad()
def make(first: tuple[float, float] = (3.0, 0.0), second: tuple[float, float] = (0.0, 3.0), **changes):
    """Expert 1 adds `first` times x_0, expert 2 adds `second` times x_1 (B's columns); the first is [3 0; 0 0]."""
    config = HoEConfig(
        objectives=["a", "b"], experts=[[1, 0], [0, 1]], r=1, target_modules=["lin"],
        **{"interpolation": "norm", **changes},
    )  # fmt: skip
    model = get_peft_model(Base(), config)
    layer = model.base_model.model.lin
    weight_a, weight_b = layer.factors("default")
    weight_a.copy_(torch.eye(2))
    weight_b.copy_(torch.tensor([first, second]).T)
    layer.measure_lengths("default")
    return model.eval()


def delta(model: PeftModel, preference) -> torch.Tensor:
    """What the adapter adds to the weight."""
    lin = model.base_model.model.lin
    with torch.no_grad():
        return model(torch.eye(2), preference=preference).T - lin.base_layer.weight


# -- the rule ---


def test_orthogonal_experts_keep_their_length():
    """Half of each of two that are 3 long: 3 / sqrt(2) in each entry, not 3 / 2."""
    torch.testing.assert_close(delta(make(), MIDDLE), torch.eye(2) * 3 / 2**0.5)
    torch.testing.assert_close(delta(make(interpolation="linear"), MIDDLE), torch.eye(2) * 1.5)


def test_the_length_is_the_mean_of_those_that_vote():
    """[3, 0; 0, 4] at [.75, .25]: 0.75 * 3 + 0.25 * 4 = 3.25 long, in the direction of (2.25, 1)."""
    found = delta(make(second=(0.0, 4.0)), [0.75, 0.25])
    assert float(found.norm()) == pytest.approx(3.25, rel=1e-6)
    torch.testing.assert_close(found / found.norm(), torch.diag(torch.tensor([2.25, 1.0])) / 6.0625**0.5)


@pytest.mark.parametrize("preference", [[1.0, 0.0], [0.0, 1.0]])
def test_an_expert_alone_is_itself(preference):
    torch.testing.assert_close(delta(make(), preference), delta(make(interpolation="linear"), preference))


def test_parallel_experts_lose_nothing():
    model = make(first=(3.0, 0.0), second=(1.0, 0.0))
    with torch.no_grad():
        model.base_model.model.lin.factors("default")[0].copy_(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    model.base_model.model.lin.measure_lengths("default")
    torch.testing.assert_close(delta(model, MIDDLE), torch.tensor([[2.0, 0.0], [0.0, 0.0]]))


def test_at_most_three_times():
    """Experts that nearly cancel: (1, -0.9) / 2 is 0.05 long, its voters 0.95."""
    lengths = ExpertLengths(2)
    with torch.no_grad():
        lengths.gram.copy_(torch.tensor([[1.0, -0.9], [-0.9, 0.81]]))
    torch.testing.assert_close(lengths(torch.tensor([0.5, 0.5])), torch.tensor([3.0]))


@pytest.mark.parametrize("products", [[[0.0, 0.0], [0.0, 0.0]], [[1.0, -1.0], [-1.0, 1.0]]])
def test_where_nothing_is_left_nothing_is_scaled(products):
    """No weights, or experts that cancel: factor 1 and gradients that are numbers."""
    lengths = ExpertLengths(2)
    with torch.no_grad():
        lengths.gram.copy_(torch.tensor(products))
    votes = torch.tensor([0.5, 0.5], requires_grad=True)
    factor = lengths(votes)
    factor.sum().backward()
    assert factor.tolist() == [1.0]
    assert votes.grad is not None
    assert bool(votes.grad.isfinite().all())


def test_inner_products_from_factors():
    """In units of the longest expert's squared length."""
    torch.manual_seed(0)
    ranks = (2, 0, 3)
    a, b = torch.randn(5, 7), torch.randn(4, 5)
    deltas = [b[:, :2] @ a[:2], torch.zeros(4, 7), b[:, 2:] @ a[2:]]
    wanted = torch.tensor([[float((one * other).sum()) for other in deltas] for one in deltas])
    torch.testing.assert_close(gram(a, b, ranks).float(), wanted / wanted.max(), rtol=1e-5, atol=1e-5)
    assert not gram(a, torch.zeros(4, 5), ranks).any()


# -- ways to use it ---


def test_each_row_has_its_own_factor():
    model = make(second=(0.0, 4.0))
    preferences = [[0.5, 0.5], [0.75, 0.25], [1.0, 0.0]]
    with torch.no_grad():
        x = torch.ones(3, 1, 2)
        found = model(x, preference=preferences)
        for row, preference in enumerate(preferences):
            torch.testing.assert_close(found[row], model(x[row], preference=preference))


def test_a_token_of_a_trained_router_has_its_own_factor():
    """A router that votes by x_0: [3, 4] votes for the experts with softmax([3, 0]) and so on."""
    model = make(routers=[RouterSpec([0.5, 0.5], name="r", trained=True)])
    layer = model.base_model.model.lin
    with torch.no_grad():
        layer.hoe_router["default"].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
        layer.hoe_router["default"].bias.zero_()
        x = torch.tensor([[[3.0, 4.0], [-1.0, 2.0]]])
        added = model(x, preference=MIDDLE) - layer.base_layer(x)
    for t in range(2):
        votes = torch.tensor([x[0, t, 0], 0.0]).softmax(0)
        mixed = 3 * votes * x[0, t]
        torch.testing.assert_close(added[0, t], mixed / votes.norm())  # the mean length is 3, that of the mix 3 |votes|


def test_gradients_reach_the_router_through_the_factor():
    """Against finite differences, in float64."""
    lengths = ExpertLengths(3).double()
    torch.manual_seed(0)
    factors = torch.randn(3, 6, dtype=torch.float64)
    with torch.no_grad():
        lengths.gram.copy_(factors @ factors.T)
    logits = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda logits: lengths(logits.softmax(-1)), [logits])


def test_merging_bakes_the_factor_in_and_takes_it_out():
    model = make(second=(0.0, 4.0))
    before = model.base_model.model.lin.base_layer.weight.clone()
    model.set_preference([0.75, 0.25])
    wanted = delta(model, [0.75, 0.25])
    model.merge_adapter()
    torch.testing.assert_close(model.base_model.model.lin.base_layer.weight, before + wanted)
    model.unmerge_adapter()
    torch.testing.assert_close(model.base_model.model.lin.base_layer.weight, before)
    torch.testing.assert_close(model.merge_and_unload().lin.weight, before + wanted)


def test_saved_and_loaded(tmp_path):
    model = make(second=(0.0, 4.0))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Base(), tmp_path)
    assert loaded.peft_config["default"].interpolation == "norm"
    torch.testing.assert_close(delta(loaded, MIDDLE), delta(model, MIDDLE))


def test_a_file_with_inner_products_can_be_read_as_linear(tmp_path):
    make().save_pretrained(tmp_path)
    config = HoEConfig.from_pretrained(tmp_path)
    config.interpolation = "linear"
    loaded = PeftModel.from_pretrained(Base(), tmp_path, config=config)
    torch.testing.assert_close(delta(loaded, MIDDLE), torch.eye(2) * 1.5)


def test_a_file_without_the_inner_products_is_refused(tmp_path):
    make(interpolation="linear").save_pretrained(tmp_path)
    config = (tmp_path / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(config.replace('"linear"', '"norm"'))
    with pytest.raises(
        CheckpointError, match=r"hoe_length.default.gram', which .* was saved with interpolation='linear'"
    ):
        PeftModel.from_pretrained(Base(), tmp_path)


def load_in_place(model, other):
    model.load_state_dict(other.state_dict())
    return model


def load_by_assigning(model, other):
    model.load_state_dict(other.state_dict(), assign=True)
    return model


def swap_data(model, other):
    for (_, parameter), (_, new) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        parameter.data = new.data.clone()
    return model


def load_into_a_copy(model, other):
    return load_in_place(copy.deepcopy(model), other)


def load_into_a_pickled_one(model, other):
    return load_in_place(pickle.loads(pickle.dumps(model)), other)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(
    "change", [load_in_place, load_by_assigning, swap_data, load_into_a_copy, load_into_a_pickled_one]
)
def test_weights_that_are_loaded_later_count(change, inference, rows):
    """The factor is kept with the plan, but not beyond the inner products that it came from."""
    with torch.inference_mode(inference):
        model, other = make(), make(second=(3.0, 0.0))
        with torch.no_grad():
            other.base_model.model.lin.hoe_A["default"].weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 0.1]]))
        for each in (model, other):  # as many writes to both, which therefore tell nothing
            each.base_model.model.lin.measure_lengths("default")
        preference = [MIDDLE, [1.0, 0.0]] if rows else MIDDLE
        before = delta(model, preference)
        model = change(model, other)
        torch.testing.assert_close(delta(model, preference), delta(other, preference))
        assert not torch.allclose(delta(model, preference), before)


def test_inner_products_never_train():
    model = make(routers=[RouterSpec([0.5, 0.5])], inference_mode=False)
    for change in (
        lambda: model.set_adapter("default"),
        lambda: model.base_model.set_requires_grad("default", True),
        lambda: (model.base_model.disable_adapter_layers(), model.base_model.enable_adapter_layers()),
    ):
        change()
        training = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert training
        assert all("hoe_router" in name for name in training)


def test_adapters_of_both_kinds_in_one_model():
    model = make()
    model.add_adapter("plain", HoEConfig(objectives=["a", "b"], experts=[[1, 0], [0, 1]], r=1, target_modules=["lin"]))
    layer = next(module for module in model.modules() if isinstance(module, HoELayer))
    assert list(layer.hoe_length) == ["default"]
    model.set_adapter("plain")
    torch.testing.assert_close(delta(model, {"plain": MIDDLE}), torch.zeros(2, 2))  # its experts are 0
    model.delete_adapter("default")
    assert list(layer.hoe_length) == []


def test_half_precision_follows():
    model = make(second=(0.0, 4.0))
    wanted = delta(model, [0.75, 0.25])
    half = copy.deepcopy(model).to(torch.bfloat16)
    with torch.no_grad():
        found = (
            half(torch.eye(2, dtype=torch.bfloat16), preference=[0.75, 0.25]).T
            - half.base_model.model.lin.base_layer.weight
        )
    torch.testing.assert_close(found.float(), wanted, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("length", [1e-4, 1.0, 1e3])
def test_half_precision_holds_the_inner_products_of_short_and_long_experts(dtype, length):
    """Squared, 1e-4 is nothing in float16, and 1e3 is more than it holds."""
    layer = make(first=(length, 0.0), second=(0.0, length)).to(dtype).base_model.model.lin
    votes = torch.tensor(MIDDLE)
    torch.testing.assert_close(layer.hoe_length["default"](votes), torch.tensor([2**0.5]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_does_not_round_the_factor(dtype):
    lengths = make(first=(3.0, 1.0), second=(1.0, 2.7)).base_model.model.lin.hoe_length["default"]
    votes = torch.tensor([0.37, 0.63])
    with torch.autocast("cpu", dtype=dtype):
        found = lengths(votes)
    torch.testing.assert_close(found, lengths(votes), rtol=0, atol=0)


def test_the_factor_costs_a_call_nothing_where_all_tokens_share_it():
    """It is in the scale that the plan keeps: as many operations as without it."""

    def operations(model):
        model(torch.eye(2), preference=MIDDLE)
        with torch.profiler.profile() as profile:
            model(torch.eye(2), preference=MIDDLE)
        return [event.name for event in profile.events() if event.name.startswith("aten::")]

    with torch.no_grad():
        assert operations(make()) == operations(make(interpolation="linear"))


# -- bad input ---


def test_experts_that_train_are_refused():
    with pytest.raises(ExpertError, match='use interpolation="linear" while experts train'):
        make(train_experts=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_experts": True}, 'use interpolation="linear" while experts train'),
        ({"interpolation": "cubic"}, "interpolation is 'cubic'; use one of 'linear', 'norm'"),
    ],
)
def test_what_is_assigned_to_a_configuration_is_checked_too(change, message):
    config = HoEConfig(objectives=["a", "b"], r=1, target_modules=["lin"], interpolation="norm")
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(ExpertError, match=message):
        get_peft_model(Base(), config)


def test_other_values_are_refused():
    with pytest.raises(ExpertError, match="interpolation is 'cubic'; use one of 'linear', 'norm'"):
        make(interpolation="cubic")
