from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

from peft_hoe.experts.merging import merge
from peft_hoe.experts.merging.pcb import pcb
from peft_hoe.experts.merging.trimming import trim
from peft_hoe.experts.svd import truncated_svd


@pytest.fixture
def deltas():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(6, 7, generator=generator) for _ in range(3)]


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


def in_float64(deltas, weights, density, exchanged=None):
    """The formulas written out; the two scores at the cut of the policy `exchanged` change places."""
    magnitudes = [delta.double().abs() for delta in deltas]
    signed = [
        torch.sign(delta) * (size - size.min()) / (size.max() - size.min())
        for delta, size in zip(deltas, magnitudes, strict=True)
    ]
    total = mass = torch.zeros_like(signed[0])
    for i, (own, delta, weight) in enumerate(zip(signed, deltas, weights, strict=True)):
        score = torch.exp(len(deltas) * own**2) * sum(torch.tanh(own * other) for other in signed)
        if i == exchanged:
            flat = score.view(-1)
            at_the_cut = flat.argsort(descending=True)[math.ceil(density * flat.numel()) - 1 :][:2]
            assert 0 < 1 - flat[at_the_cut[1]] / flat[at_the_cut[0]] < torch.finfo(torch.float32).eps
            flat[at_the_cut] = flat[at_the_cut.flip(0)]
        kept = score >= score.flatten().sort(descending=True).values[math.ceil(density * score.numel()) - 1]
        score = score.clamp_min(0)
        low, high = score[kept].min(), score[kept].max()
        beta = torch.where(kept, ((score - low) / (high - low)).clamp_min(1e-6), 0)
        total, mass = total + beta * weight * delta.double(), mass + beta * weight
    return torch.where(mass > 0, total / mass, 0)


NAMES = ("dialog", "positive", "rich")


def real_task_vectors(shared_dir):
    """`{module: one task vector of each of NAMES}`."""
    models = shared_dir / "models"
    base = load_file(models / "stories260k" / "model.safetensors")
    policies = [load_file(models / "policies" / f"stories260k-{name}" / "model.safetensors") for name in NAMES]
    return {name: [policy[name] - base[name] for policy in policies] for name in base if "_proj" in name}


def test_pcb_is_the_formula_in_every_module_of_real_policies(shared_dir):
    # In float32 two scores of one module changed their order at the cut, and two entries 2 % of the merged vector's length.
    weights = [1 / 3] * 3
    for name, deltas in real_task_vectors(shared_dir).items():
        expected = in_float64(deltas, weights, 0.2)
        assert (pcb(deltas, weights, density=0.2) - expected).norm() < 1e-6 * expected.norm(), name


def test_two_scores_that_float32_cannot_tell_apart_are_percents_of_an_expert(shared_dir):
    # Why scores are float64: an independent formula and the merge in float32 differed by some 4 % in this one of 35 modules.
    deltas = real_task_vectors(shared_dir)["model.layers.1.mlp.down_proj.weight"]
    right, wrong = (in_float64(deltas, [1 / 3] * 3, 0.2, exchanged) for exchanged in (None, NAMES.index("rich")))
    assert (right != wrong).sum() == 2
    assert (wrong - right).norm() / right.norm() == pytest.approx(0.0210, abs=1e-4)
    kept = [truncated_svd(merged.float(), 16, solver="exact") for merged in (right, wrong)]
    experts = [factors.b @ factors.a for factors in kept]
    assert (experts[1] - experts[0]).norm() / experts[0].norm() == pytest.approx(0.0498, abs=1e-3)


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
