"""The gate in plain operations against its definition, token by token; its gradient, written out, against autograd's."""

from __future__ import annotations

import pytest
import torch

from peft_hoe.tuner.kernels.gate import gated, length_factor, token_votes
from peft_hoe.tuner.kernels.gradient import gate_gradient

CASES = {
    "one router": ((4, 4, 4), (3,), 1),
    "two routers": ((2, 5, 0, 3), (4, 2), 1),
    "rows": ((3, 3), (2, 2), 3),
    "rows and ranks": ((1, 6, 2), (3, 1, 2), 2),
}


@pytest.fixture(params=CASES, ids=CASES.keys())
def case(request, problem):
    ranks, slots, rows = CASES[request.param]
    return ranks, slots, rows, problem(ranks, slots, rows)


def written_out(inner, logits, votes, gram, ranks, temperature, slots, rows):
    """One token after the other, one expert after the other."""
    experts, widest = len(ranks), max(slots)
    mix = (votes.mix.T[None] if rows == 1 else votes.mix).unflatten(1, (len(slots), widest))
    output = torch.empty_like(inner)
    for t in range(len(inner)):
        row = t * rows // len(inner)
        weights = [0.0] * experts
        for k, size in enumerate(slots):
            here = (logits[t, sum(slots[:k]) :][:size] / temperature).exp()
            for slot in range(size):
                for e in range(experts):
                    weights[e] += float(here[slot] / here.sum() * mix[row, k, slot, e])
        factor = 1.0
        if gram is not None:
            mean = sum(w * float(gram[e, e]) ** 0.5 for e, w in enumerate(weights))
            square = sum(weights[i] * weights[j] * float(gram[i, j]) for i in range(experts) for j in range(experts))
            factor = min(3.0, mean / square**0.5)
        start = 0
        for e, rank in enumerate(ranks):
            output[t, start : start + rank] = factor * weights[e] * inner[t, start : start + rank]
            start += rank
    return output


@pytest.mark.parametrize("interpolation", ["linear", "norm"])
def test_the_gate_is_its_definition(case, interpolation):
    ranks, slots, rows, (inner, logits, votes, gram) = case
    gram = gram if interpolation == "norm" else None
    found = gated(inner, logits, votes, gram, ranks, 0.7)
    expected = written_out(inner, logits, votes, gram, ranks, 0.7, slots, rows)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("interpolation", ["linear", "norm"])
def test_the_gradient_is_autograds(case, interpolation):
    ranks, _, _, (inner, logits, votes, gram) = case
    gram = gram if interpolation == "norm" else None
    inner.requires_grad_(True)
    logits.requires_grad_(True)
    result = gated(inner, logits, votes, gram, ranks, 0.7)
    gradient = torch.randn(result.shape, dtype=result.dtype, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad(result, [inner, logits], gradient)
    with torch.no_grad():
        found = gate_gradient(gradient, inner, logits, votes, gram, ranks, 0.7)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_the_gradient_where_the_factor_is_at_its_limits(problem):
    """Opposite experts, whose mean is nothing (c = 1), or next to nothing (c = 3); both without a slope."""
    inner, logits, votes, _ = problem((2, 2), (2,))
    for angle, factor in ((-1.0, 1.0), (-0.999, 3.0)):
        gram = torch.tensor([[1.0, angle], [angle, 1.0]], dtype=torch.float64)
        even = votes._replace(mix=torch.full_like(votes.mix, 0.5))
        assert float(length_factor(token_votes(even, logits), gram)[0]) == factor
        _, for_logits = gate_gradient(torch.ones_like(inner), inner, logits, even, gram, (2, 2), 1.0)
        assert for_logits.abs().max() < 1e-12
