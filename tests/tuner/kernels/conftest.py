from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from peft_hoe.tuner.kernels.gate import Votes


@pytest.fixture
def triton_here():
    """Triton's kernels run: on a GPU, or interpreted, which Triton decides when it is imported (the Makefile asks for it)."""
    if importlib.util.find_spec("triton") is None:
        reason = "Triton is not installed"
    elif not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        reason = "there is no GPU, and TRITON_INTERPRET is not 1"
    else:
        return
    if os.environ.get("PEFT_HOE_REQUIRE_TRITON"):
        pytest.fail(f"{reason}, but PEFT_HOE_REQUIRE_TRITON says that these tests must run")
    pytest.skip(reason)


@pytest.fixture
def problem():
    """Random inputs of the gate, float64: problem(ranks, slots of each router, rows, tokens, ...)."""

    def make(ranks, slots, rows=1, tokens=6, seed=0, scale=1.0):
        generator = torch.Generator().manual_seed(seed)

        def random(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        experts, widest, count = len(ranks), max(slots), sum(slots)
        mix = torch.zeros(rows, len(slots), widest, experts, dtype=torch.float64)
        places = torch.full((len(slots), widest), count)
        static = torch.rand(rows, experts, generator=generator, dtype=torch.float64)
        live = torch.rand(rows, len(slots), generator=generator, dtype=torch.float64)
        whole = static.sum(1) + live.sum(1)
        static, live = static / whole[:, None], live / whole[:, None]
        mix += (static / len(slots))[:, None, None]
        for k, size in enumerate(slots):
            chosen = torch.randperm(experts, generator=generator)[:size]
            mix[:, k, torch.arange(size), chosen] += live[:, k, None]
            places[k, :size] = sum(slots[:k]) + torch.arange(size)
        mix = mix.flatten(1, 2)
        votes = Votes(
            mix[0].T.contiguous() if rows == 1 else mix, len(slots), None if min(slots) == widest else places.flatten()
        )
        deltas = random(experts, 9)
        gram = deltas @ deltas.T
        gram = gram / gram.diagonal().max()
        return random(tokens, sum(ranks)) * scale, random(tokens, count) * 3 * scale, votes, gram

    return make
