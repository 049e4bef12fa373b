"""Routers that vote by module: a static mixture of each module's own, at no cost, that merges exactly."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from peft import PeftModel
from torch.utils._python_dispatch import TorchDispatchMode

from peft_hoe import CheckpointError, ExpertError, RouterSpec, StaticMergeError
from peft_hoe.tuner.functional import record_votes
from peft_hoe.tuner.layer import HoELayer

AT, BETWEEN = [0.25, 0.75], [0.1, 0.9]  # at the router, and between it and a corner
MODULE, TOKEN = RouterSpec(AT, kind="module"), RouterSpec([0.75, 0.25])


@pytest.fixture(params=["linear", "norm"])
def model(hoe_llama, request):
    """A trained router that votes by module and one that votes by token, in float64."""
    model = hoe_llama(trained=True, routers=[MODULE, TOKEN], interpolation=request.param).double()
    for layer in layers(model):
        with torch.no_grad():
            layer.hoe_router["default"].weight[:2] = 0
    return model


def layers(model):
    return [module for module in model.modules() if isinstance(module, HoELayer)]


def own_votes(layer, weight=1.0, static=(0.0, 0.0, 0.0)):
    """The naive formula: of experts a, b and centroid the router at [.25, .75] votes for b and the centroid."""
    bias = layer.hoe_router["default"].bias[:2]
    return torch.tensor(static, dtype=torch.float64) + weight * torch.cat([bias.new_zeros(1), bias.softmax(0)])


@torch.no_grad()
def logits(model, tokens, **steering):
    return model(tokens, **steering).logits


@torch.no_grad()
def test_each_module_votes_by_its_bias(model, tokens):
    with record_votes(model) as votes:
        logits(model, tokens, preference=AT)
    for layer in layers(model):
        torch.testing.assert_close(votes[layer.module_name], own_votes(layer), rtol=0, atol=1e-12)
    with record_votes(model) as votes:
        logits(model, tokens, preference=BETWEEN)  # 0.4 of the router, and 0.6 of expert b
    for layer in layers(model):
        expected = own_votes(layer, 0.4, (0.0, 0.6, 0.0))
        torch.testing.assert_close(votes[layer.module_name], expected, rtol=0, atol=1e-12)
    assert len({tuple(vote.tolist()) for vote in votes.values()}) > 1


@pytest.mark.parametrize("preference", [AT, BETWEEN])
def test_merging_is_exact(model, tokens, preference):
    routed = logits(model, tokens, preference=preference)
    model.set_preference(preference)
    assert all(layer.supports_lora_conversion() for layer in layers(model))
    merged = logits(model.merge_and_unload(), tokens)
    torch.testing.assert_close(merged, routed, rtol=1e-10, atol=1e-10)


def test_between_both_kinds_votes_add_up_and_nothing_merges(model, tokens):
    middle = [0.4, 0.6]  # between the centroid, which both may vote for, and the router by module
    routed = logits(model, tokens, preference=middle)
    rows = logits(model, tokens.repeat(2, 1)[: 2 * len(tokens)], preference=[middle] * (2 * len(tokens)))
    torch.testing.assert_close(rows[: len(tokens)], routed, rtol=1e-10, atol=1e-10)
    model.set_preference([0.75, 0.25])
    with pytest.raises(StaticMergeError, match="r1"):
        model.merge_and_unload()


def test_every_row_has_its_own(model, tokens):
    preferences = [AT, BETWEEN, [0.75, 0.25]]
    batch = tokens[:1].repeat(3, 1)
    together = logits(model, batch, preference=preferences)
    for row, preference in enumerate(preferences):
        alone = logits(model, batch[:1], preference=preference)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-10, atol=1e-10)


class Operations(TorchDispatchMode):
    """Counts what is dispatched."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count[str(function)] += 1
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def dispatched(model, tokens, preference):
    logits(model, tokens, preference=preference)  # prepares
    with Operations() as operations:
        model(tokens, preference=preference)
    return operations.count


def test_a_forward_is_that_of_static_experts(model, tokens):
    """`kind="module"` costs what no router costs: the same operations, as often."""
    counted = {}
    for trained in (False, True):
        model.mark_trained("r0", trained=trained)
        counted[trained] = [dispatched(model, tokens, preference) for preference in (AT, BETWEEN)]
    assert counted[True] == counted[False]


def test_a_changed_bias_counts_at_once(model, tokens):
    before = logits(model, tokens, preference=AT)
    with torch.no_grad():
        layers(model)[0].hoe_router["default"].bias[0] += 1
    assert not torch.equal(logits(model, tokens, preference=AT), before)


def test_gradients_are_those_of_the_function(model):
    """Through one module's bias, in float64 throughout."""
    model.set_preference(AT)
    layer = layers(model)[-1]
    layer.hoe_router["default"].requires_grad_(True)
    bias = layer.hoe_router["default"].bias
    x = torch.randn(5, layer.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layer(x).square().sum().backward()
    gradient, values = bias.grad.clone(), []
    for step in (1e-6, -2e-6):
        with torch.no_grad():
            bias[0] += step
            values.append(layer(x).square().sum())
    torch.testing.assert_close(gradient[0], (values[0] - values[1]) / 2e-6, rtol=1e-6, atol=1e-6)
    assert not gradient[2:].any()


def test_it_is_saved_and_loaded(model, llama, tokens, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama().double(), tmp_path)
    assert [router.kind for router in loaded.peft_config["default"].routers] == ["module", "token"]
    torch.testing.assert_close(
        logits(loaded, tokens, preference=BETWEEN), logits(model, tokens, preference=BETWEEN), rtol=0, atol=0
    )


def test_weights_of_a_router_by_token_are_not_dropped_without_a_word(hoe_llama):
    by_token = hoe_llama(trained=True, routers=[RouterSpec(AT)]).state_dict()
    with pytest.raises(CheckpointError, match='kind="token"'):
        hoe_llama(trained=False, routers=[MODULE]).load_state_dict(by_token)


def test_there_are_two_kinds(config):
    with pytest.raises(ExpertError, match="kind of router 'r0' is 'layer'; use one of 'token', 'module'"):
        config(routers=[RouterSpec(AT, kind="layer")])
