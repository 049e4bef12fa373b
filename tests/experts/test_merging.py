from __future__ import annotations

import itertools
import math

import pytest
import torch

from peft_hoe import ExpertError
from peft_hoe.experts.merging import METHODS, check_merge, merge, pcb, ties, trim

CASES = [
    ("linear", {}),
    *((method, {"density": density}) for method in ("ties", "pcb") for density in (1.0, 0.6, 0.2)),
]


@pytest.fixture
def deltas():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(6, 7, generator=generator) for _ in range(3)]


def test_every_method_has_cases():
    assert {method for method, _ in CASES} == set(METHODS)


@pytest.mark.parametrize(("method", "options"), CASES)
@pytest.mark.parametrize("index", [0, 1, 2])
def test_one_hot_weights_give_the_trimmed_task_vector(deltas, method, options, index):
    weights = [0.0, 0.0, 0.0]
    weights[index] = 1.0
    expected = trim(deltas[index], options.get("density", 1.0))
    torch.testing.assert_close(merge(deltas, weights, method, options), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("method", "options"), CASES)
def test_order_of_policies_does_not_matter(deltas, method, options):
    weights = [0.5, 0.2, 0.3]
    expected = merge(deltas, weights, method, options)
    for order in itertools.permutations(range(3)):
        permuted = merge([deltas[i] for i in order], [weights[i] for i in order], method, options)
        torch.testing.assert_close(permuted, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("method", "options"), CASES)
def test_scaling_all_task_vectors_scales_the_result(deltas, method, options):
    weights = [0.5, 0.2, 0.3]
    expected = 4 * merge(deltas, weights, method, options)
    torch.testing.assert_close(merge([4 * delta for delta in deltas], weights, method, options), expected)


@pytest.mark.parametrize(("method", "options"), CASES)
def test_policies_of_weight_zero_are_dropped_first(deltas, method, options):
    with_zero = merge(deltas, [0.7, 0.0, 0.3], method, options)
    without = merge([deltas[0], deltas[2]], [0.7, 0.3], method, options)
    assert torch.equal(with_zero, without)
    deltas[1] = deltas[1] * float("inf")
    assert torch.equal(merge(deltas, [0.7, 0.0, 0.3], method, options), without)


def test_ties_by_hand():
    deltas = torch.tensor([[4.0, -1.0, 2.0, 1.0], [2.0, 3.0, -2.0, 0.0]])
    # Entry 0: both agree, the weighted mean. 1: the second wins. 2: an exact conflict. 3: only the first has a say.
    merged = ties(deltas, [0.5, 0.5], density=1.0)
    assert merged.tolist() == [3.0, 3.0, 0.0, 1.0]
    # At 3:1 the first wins entry 2 as well, and entry 1 is a draw: 0.75 * -1 + 0.25 * 3 = 0.
    merged = ties(deltas, [0.75, 0.25], density=1.0)
    assert merged.tolist() == [3.5, 0.0, 2.0, 1.0]


def test_ties_does_not_shrink_policies_that_agree():
    # PEFT's ties divides by the count of policies and returns half of this.
    delta = torch.tensor([1.0, -2.0])
    assert torch.equal(ties([delta, delta], [0.5, 0.5], density=1.0), delta)


def test_pcb_by_hand():
    deltas = torch.tensor([[2.0, -1.0, 0.0, 1.0], [2.0, 2.0, 0.0, 2.0]])  # n: [1, -1/2, 0, 1/2] and [1, 1, 0, 1]
    best = math.exp(2) * 2 * math.tanh(1)  # the score of entry 0, the highest of both
    loses = (
        math.exp(2) * (math.tanh(1) - math.tanh(0.5)) / best
    )  # beta of the second in entry 1, where the first has 1e-6
    first = math.exp(0.5) * (math.tanh(0.25) + math.tanh(0.5)) / best  # betas in entry 3
    second = math.exp(2) * (math.tanh(1) + math.tanh(0.5)) / best
    expected = [2.0, (2 * loses - 1e-6) / (loses + 1e-6), 0.0, (first + 2 * second) / (first + second)]
    merged = pcb(deltas, [0.5, 0.5], density=1.0)
    torch.testing.assert_close(merged, torch.tensor(expected), rtol=1e-5, atol=0)
    expected[1] = (3 * 2 * loses - 1e-6) / (3 * loses + 1e-6)
    expected[3] = (first + 3 * 2 * second) / (first + 3 * second)
    merged = pcb(deltas, [0.25, 0.75], density=1.0)
    torch.testing.assert_close(merged, torch.tensor(expected), rtol=1e-5, atol=0)
    # Half of the entries: both keep 0 and 3, and in 3 both are the worst that is kept.
    assert pcb(deltas, [0.5, 0.5], density=0.5).tolist() == [2.0, 0.0, 0.0, 1.5]


def test_pcb_keeps_all_or_nothing_at_the_edges(deltas):
    assert merge(deltas, [0.5, 0.2, 0.3], "pcb", {"density": 0.0}).tolist() == torch.zeros(6, 7).tolist()
    merged = merge(deltas, [0.5, 0.2, 0.3], "pcb", {"density": 1.0})
    stacked = torch.stack(deltas)
    assert (merged != 0).all()
    assert (merged <= stacked.amax(0) + 1e-6).all()
    assert (merged >= stacked.amin(0) - 1e-6).all()


def test_pcb_does_not_shrink_policies_that_agree(deltas):
    torch.testing.assert_close(merge([deltas[0]] * 3, [0.5, 0.2, 0.3], "pcb", {"density": 1.0}), deltas[0])
    same = merge([deltas[0]] * 3, [0.5, 0.2, 0.3], "pcb", {"density": 0.6})
    torch.testing.assert_close(same, trim(deltas[0], 0.6))


def test_pcb_takes_constant_task_vectors_and_many_policies(agree):
    constant = torch.tensor([1.0, -1.0, 1.0])  # min-max gives 0 / 0
    assert merge([constant, constant], [0.5, 0.5], "pcb", {"density": 1.0}).tolist() == constant.tolist()
    many = merge([torch.tensor([1.0, -3.0, 2.0])] * 200, [1.0] * 200, "pcb", {"density": 1.0})  # exp(200) is no float32
    agree(many, torch.tensor([1.0, -3.0, 2.0]))


def test_trimming_keeps_the_largest_and_its_edges_are_all_and_nothing():
    delta = torch.tensor([1.0, -5.0, 3.0, -2.0, 4.0])
    assert trim(delta, 0.6).tolist() == [0.0, -5.0, 3.0, 0.0, 4.0]
    assert trim(delta, 0.2).tolist() == [0.0, -5.0, 0.0, 0.0, 0.0]
    assert trim(delta, 1.0).tolist() == delta.tolist()
    assert trim(delta, 0.0).tolist() == [0.0] * 5
    assert trim(torch.tensor([2.0, -2.0, 1.0]), 0.3).tolist() == [2.0, -2.0, 0.0]


@pytest.mark.parametrize("n", [1, 2, 7, 100, 127])
def test_trimming_keeps_as_many_as_the_density_says(n):
    delta = torch.arange(1.0, n + 1)
    for hundredths in range(101):
        assert int((trim(delta, hundredths / 100) != 0).sum()) == -(-hundredths * n // 100)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("slerp", {}, "merge method is 'slerp'; use one of 'linear', 'pcb', 'ties'"),
        ("ties", {"gamma": 1}, r"merge 'ties' has no option \['gamma'\]; it has \['density'\]"),
        ("linear", {"density": 1}, r"merge 'linear' has no option \['density'\]; it has none"),
        ("ties", {"density": 1.2}, "merge option density is 1.2; it must be a number from 0 to 1"),
        ("ties", {"density": "x"}, "merge option density is 'x'"),
    ],
)
def test_unknown_methods_and_options_are_named(method, options, message):
    with pytest.raises(ExpertError, match=message):
        check_merge(method, options)
