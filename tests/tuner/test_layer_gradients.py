"""Gradients of a layer against those of its definition, written out, in float64."""

from __future__ import annotations

import contextlib

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_hoe import HoEConfig, RouterSpec
from peft_hoe.training.run.trained_router import TrainedRouter

ROUTERS = [RouterSpec([0.5, 0.5, 0], trained=True), RouterSpec([0, 0.5, 0.5], votes_for="all", trained=True)]
ALONE, BOTH, ROWS = [0.5, 0.5, 0.0], [0.1, 0.5, 0.4], [[0.5, 0.5, 0.0], [0.1, 0.5, 0.4], [1.0, 0.0, 0.0]]


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x)


@pytest.fixture
def model(randomise, request):
    config = HoEConfig(
        objectives=["a", "b", "c"], routers=ROUTERS, r=3, target_modules=["lin"], interpolation=request.param,
        router_temperature=0.7,
    )  # fmt: skip
    model = get_peft_model(Base().double(), config, autocast_adapter_dtype=False)
    randomise(model)
    return model


def written_out(model, x, rows):
    """y = W x + c sum_j w_j B_j A_j x over x `(rows, tokens, d_in)`, with all deltas as matrices, by autograd."""
    layer, config = model.base_model.model.lin, model.peft_config["default"]
    router, (weight_a, weight_b) = layer.hoe_router["default"], layer.factors("default")
    deltas = torch.stack([weight_b[:, i : i + 3] @ weight_a[i : i + 3] for i in range(0, len(weight_a), 3)])
    outputs = []
    for row, preference in zip(x, rows, strict=True):
        route = model.route(preference).experts
        votes = torch.zeros(len(row), len(deltas), dtype=torch.float64)
        votes = votes + torch.tensor([route.get(name, 0.0) for name in config.expert_names], dtype=torch.float64)
        slot = 0
        for spec in config.routers:
            here = slice(slot, slot + len(spec.votes_for))
            slot = here.stop
            choice = ((row @ router.weight[here].T + router.bias[here]) / 0.7).softmax(-1)
            for place, name in enumerate(spec.votes_for):
                one = torch.eye(len(deltas), dtype=torch.float64)[config.expert_names.index(name)]
                votes = votes + route.get(spec.name, 0.0) * choice[:, place : place + 1] * one
        mixed = torch.einsum("tj,joi->toi", votes, deltas)
        if config.interpolation == "norm":
            factor = (votes @ deltas.flatten(1).norm(dim=1)) / mixed.flatten(1).norm(dim=1)
            mixed = mixed * factor[:, None, None]
        outputs.append(layer.base_layer(row) + torch.einsum("toi,ti->to", mixed, row))
    return torch.stack(outputs)


def gradients(loss, x, model):
    router = model.base_model.model.lin.hoe_router["default"]
    return torch.autograd.grad(loss, [x, router.weight, router.bias])


@contextlib.contextmanager
def hooked(model):
    """A and B as hooks fetch them: called as modules."""
    layer = model.base_model.model.lin
    parts = (layer.hoe_A["default"], layer.hoe_B["default"])
    hooks = [part.register_forward_pre_hook(lambda module, args: None) for part in parts]
    yield
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("model", ["linear", "norm"], indirect=True)
@pytest.mark.parametrize("preference", [ALONE, BOTH, ROWS], ids=["one router", "two routers", "rows"])
@pytest.mark.parametrize("path", ["direct", "modules"])
@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["kept", "reentrant", "replayed"])
def test_gradients_equal_those_of_the_definition(model, preference, path, checkpointing):
    x = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    rows = preference if preference is ROWS else [preference] * 3
    expected = gradients(written_out(model, x, rows).pow(3).sum(), x, model)
    with hooked(model) if path == "modules" else contextlib.nullcontext():
        if checkpointing is None:
            y = model(x, preference=preference)
        else:
            y = checkpoint(lambda x: model(x, preference=preference), x, use_reentrant=checkpointing)
        loss = y.pow(3).sum()
        if checkpointing is not None:  # reentrant checkpointing knows backward() alone
            loss.backward()
            router = model.base_model.model.lin.hoe_router["default"]
            found = x.grad, router.weight.grad, router.bias.grad
        else:
            found = gradients(loss, x, model)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("model", ["linear", "norm"], indirect=True)
@pytest.mark.parametrize(("router", "preference"), [("r0", ALONE), ("r0", BOTH), ("r1", BOTH), ("r1", ROWS)])
def test_a_router_with_parameters_of_its_own(model, router, preference):
    """As trainers hold it: its gradients are the rows of the definition's, and no other weight has any."""
    own = TrainedRouter(model, router)
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    rows = preference if preference is ROWS else [preference] * 3
    layer = model.base_model.model.lin
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    layer.hoe_router.requires_grad_(True)
    part = layer.hoe_router["default"]
    expected = torch.autograd.grad(written_out(model, x, rows).pow(3).sum(), [part.weight, part.bias])
    layer.hoe_router.requires_grad_(False)
    with own.attached():
        model(x, preference=preference).pow(3).sum().backward()
    linear = own.linears[0]
    torch.testing.assert_close(linear.weight.grad, expected[0][own.rows], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(linear.bias.grad, expected[1][own.rows], rtol=1e-10, atol=1e-10)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("model", ["linear"], indirect=True)
def test_what_was_prepared_for_inference_serves_training_too(model):
    """In inference mode tensors are made that no graph may hold."""
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    with torch.inference_mode():
        expected = model(x, preference=BOTH).clone()
    found = model(x, preference=BOTH)
    torch.testing.assert_close(found.detach(), expected, rtol=0, atol=1e-12)
    found.sum().backward()
    assert model.base_model.model.lin.hoe_router["default"].weight.grad.abs().sum() > 0
