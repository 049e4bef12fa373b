"""Some numbers of an adapter tell its weights from another's."""

from __future__ import annotations

import torch

from peft_hoe.adapter_sample import differing, sample_of


def tensors(routers=10, seed=0):
    """Of 30 modules: A (6, 16), B (12, 6) laid column by column, router linears of 4 votes each."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "hoe_A.weight": (6, 16), "hoe_B.weight": (6, 12),
        "hoe_router.weight": (4 * routers, 16), "hoe_router.bias": (4 * routers,),
    }  # fmt: skip
    made = {
        f"m{k}.{part}": torch.randn(shape, generator=generator) for k in range(30) for part, shape in shapes.items()
    }
    return {name: tensor.T if "hoe_B" in name else tensor for name, tensor in made.items()}


def test_rounding_to_16_bits_is_no_difference():
    exact = tensors()
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        rounded = {name: tensor.to(dtype) for name, tensor in exact.items()}
        assert differing(sample_of(list(exact), exact.get), list(rounded), rounded.get) == []
        assert differing(sample_of(list(rounded), rounded.get), list(exact), exact.get) == []


def test_other_weights_are():
    one, other = tensors(), tensors(seed=1)
    found = sample_of(list(one), one.get)
    assert differing(found, list(other), other.get) == sorted(found)
    assert {name.partition(".")[2] for name in found} == {
        "hoe_A.weight", "hoe_B.weight", "hoe_router.weight", "hoe_router.bias"
    }  # fmt: skip


def test_one_router_of_ten_that_was_trained_is():
    one = tensors()
    found = sample_of(list(one), one.get)
    for router in range(10):
        other = {name: tensor.clone() for name, tensor in one.items()}
        for name, tensor in other.items():
            if "hoe_router" in name:
                tensor[4 * router : 4 * router + 4] += 0.1
        assert differing(found, list(other), other.get) != []


def test_what_is_missing_is():
    one = tensors()
    found = sample_of(list(one), one.get)
    without = {name: tensor for name, tensor in one.items() if "hoe_router" not in name}
    assert all("hoe_router" in name for name in differing(found, list(without), without.get))
    assert len(differing(found, list(without), without.get)) == 16


def test_tensors_without_numbers_are_passed_over():
    whole = tensors()
    some = {name: tensor.to("meta") if name.startswith("m1") else tensor for name, tensor in whole.items()}
    found = sample_of(list(some), some.get)
    assert None in found.values()
    assert differing(found, list(whole), whole.get) == []
    other = tensors(seed=1)
    assert differing(found, list(other), other.get) == sorted(name for name, entries in found.items() if entries)
