"""What a module keeps from one call to the next: never stale, small, and gone with what it was made from."""

from __future__ import annotations

import collections
import copy
import gc
import pickle
import weakref

import numpy as np
import pytest
import torch

from peft_hoe import RouterSpec
from peft_hoe.tuner.layer import HoELayer
from peft_hoe.tuner.step import Step

LIVE, STATIC = [0.25, 0.75], [0.7, 0.3]
ROWS = [LIVE, STATIC, [1.0, 0.0]]


def layers(model):
    return [module for module in model.modules() if isinstance(module, HoELayer)]


@pytest.fixture
def model(hoe_llama):
    """Its second router is at [.75, .25], and its adapter large enough to prepare something for."""
    return hoe_llama(trained=True, routers=[[0.25, 0.75], [0.75, 0.25]], interpolation="norm", r=8).double()


@pytest.fixture
def other(hoe_llama, randomise):
    other = hoe_llama(trained=True, routers=[[0.25, 0.75], [0.75, 0.25]], interpolation="norm", r=8).double()
    randomise(other, seed=5)
    return other


def write_in_place(model, other):
    model.load_state_dict(other.state_dict())
    return model


def assign(model, other):
    model.load_state_dict(other.state_dict(), assign=True)
    return model


def swap_data(model, other):
    for (_, parameter), (_, new) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        parameter.data = new.data.clone()
    return model


def copied(model, other):
    return write_in_place(copy.deepcopy(model), other)


def pickled(model, other):
    return write_in_place(pickle.loads(pickle.dumps(model)), other)


def moved(model, other):
    return write_in_place(model.float().double(), other)


@pytest.mark.parametrize("change", [write_in_place, assign, swap_data, copied, pickled, moved])
@pytest.mark.parametrize("preference", [LIVE, STATIC, ROWS], ids=["routed", "static", "rows"])
def test_weights_that_change_count(model, other, tokens, change, preference):
    with torch.no_grad():
        expected = other(tokens, preference=preference).logits
        assert not torch.allclose(model(tokens, preference=preference).logits, expected)
        model = change(model, other)
        torch.testing.assert_close(model(tokens, preference=preference).logits, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("part", ["hoe_A", "hoe_B", "hoe_router", "hoe_length"])
def test_each_kind_of_weight_is_watched(model, other, tokens, part):
    """One that changes alone, in place, after calls that used the old one."""
    for preference in (LIVE, STATIC, ROWS):
        with torch.no_grad():
            model(tokens, preference=preference)
            for (name, parameter), (_, new) in zip(model.named_parameters(), other.named_parameters(), strict=True):
                if part in name:
                    parameter.copy_(new)
            fresh = copy.deepcopy(model)
            torch.testing.assert_close(
                model(tokens, preference=preference).logits, fresh(tokens, preference=preference).logits, rtol=0, atol=0
            )


def test_what_is_kept_holds_a_tenth_of_the_adapters_bytes_at_most(model, tokens):
    preferences = [[i / 40, 1 - i / 40] for i in range(41)]
    with torch.no_grad():
        for preference in preferences:
            model(tokens, preference=preference)
        for i in range(len(preferences) - 2):
            model(tokens, preference=preferences[i : i + 3])
    kept = sum(layer._steps.nbytes for layer in layers(model))
    held = sum(weight.nbytes for layer in layers(model) for weight in layer.factors("default"))
    assert 0 < kept <= held / 10


@pytest.mark.parametrize("preference", [LIVE, STATIC, ROWS], ids=["routed", "static", "rows"])
def test_what_is_prepared_under_autocast_is_not_rounded(hoe_llama, tokens, preference):
    """It serves later calls without autocast too."""
    settings = {"trained": True, "interpolation": "norm", "width": 256}
    model, fresh = hoe_llama(**settings), hoe_llama(**settings)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            model(tokens, preference=preference)
        found, expected = (each(tokens, preference=preference).logits for each in (model, fresh))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def own_bytes(model):
    """Of all tensors that steps hold, without those that several modules share: weights of theirs, and a preference's votes."""
    held_by, sizes = collections.Counter(), {}

    def tensors(item):
        if isinstance(item, torch.Tensor):
            yield item.untyped_storage()
        elif isinstance(item, (tuple, list)):
            for part in item:
                yield from tensors(part)

    for layer in layers(model):
        weights = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
        found = {}
        for step in layer._steps._kept.values():
            for name in set(Step.__slots__) - {"_sources", "_parts"}:
                found |= {storage.data_ptr(): storage.nbytes() for storage in tensors(getattr(step, name))}
        sizes |= found
        held_by.update(found.keys() - weights)
    return sum(sizes[place] for place, holders in held_by.items() if holders == 1)


@pytest.mark.parametrize("kind", [None, "token", "module"])
def test_nothing_that_is_kept_goes_uncounted(hoe_llama, tokens, kind):
    """With many experts in play at once, what lies between them is larger than their votes."""
    n = 8
    even = [1 / n] * n
    routers = [] if kind is None else [RouterSpec(even, votes_for="all", kind=kind)]
    experts = [*np.eye(n).tolist(), *([] if kind is None else [even])]
    model = hoe_llama(
        objectives=list("abcdefgh"),
        experts=experts,
        routers=routers,
        trained=kind is not None,
        r=2,
        interpolation="norm",
    ).double()
    for layer in layers(model):
        if kind == "module":
            layer.hoe_router["default"].weight.data.zero_()
    points = np.random.default_rng(0).dirichlet(np.ones(n), size=20)
    with torch.no_grad():
        for point in points:
            model(tokens, preference=point.tolist())
        model(tokens, preference=points[:3].tolist())
    held = sum(weight.nbytes for layer in layers(model) for weight in layer.factors("default"))
    assert 0 < own_bytes(model) <= sum(layer._steps.nbytes for layer in layers(model)) <= held / 10


def test_rows_and_columns_are_views(model, tokens):
    """The experts' own weights are never copied, also where those in play are no neighbours."""
    with torch.no_grad():
        model(tokens, preference=[0.1, 0.9])
    for layer in layers(model):
        weight_a, weight_b = layer.factors("default")
        places = {weight.untyped_storage().data_ptr() for weight in (weight_a, weight_b)}
        (step,) = layer._steps._kept.values()
        assert sum(len(stretch.rows) for stretch in step.stretches) == sum(step.ranks) == 16
        for stretch in step.stretches:
            assert {t.untyped_storage().data_ptr() for t in (stretch.rows, stretch.columns)} == places


def test_it_goes_with_the_adapter(model, tokens):
    with torch.no_grad():
        for preference in (LIVE, STATIC, ROWS):
            model(tokens, preference=preference)
    weights = [weakref.ref(weight) for layer in layers(model) for weight in layer.factors("default")]
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    model.set_adapter("second")
    model.delete_adapter("default")
    gc.collect()
    assert not any(reference() is not None for reference in weights)


def test_moving_a_model_frees_the_old_weights(model, tokens):
    """What is prepared must not hold on to memory that `to` has left."""
    with torch.no_grad():
        model(tokens, preference=LIVE)
    places = [weakref.ref(weight.untyped_storage()) for layer in layers(model) for weight in layer.factors("default")]
    model.float()
    gc.collect()
    assert not any(reference() is not None for reference in places)
    assert all(layer._steps.nbytes == 0 for layer in layers(model))
