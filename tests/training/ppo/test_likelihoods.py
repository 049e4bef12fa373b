"""Log-probabilities and entropies text by text, against the plain formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from peft_hoe.training.ppo.likelihoods import entropy, log_softmax, logprobs_and_entropy, token_logprobs

B, T, V = 4, 3, 50


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))


def test_by_hand() -> None:
    logits = torch.tensor([[[0.0, 2 * math.log(3.0)]]])
    assert token_logprobs(logits, torch.tensor([[1]]), 2.0).item() == pytest.approx(math.log(0.75), rel=1e-5)
    expected = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert entropy(log_softmax(logits, 2.0)).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_are_the_plain_formulas(ids: torch.Tensor, temperature: float) -> None:
    """In float64, which stays float64."""
    logits = 5 * torch.randn(B, T, V, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = torch.randn(B, T, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    plain = logits.clone().requires_grad_()
    p = (plain / temperature).softmax(-1)
    expected = p.log().gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    (expected * weights).sum().backward()
    for function in (token_logprobs, lambda *given: logprobs_and_entropy(*given)[0]):
        ours = logits.clone().requires_grad_()
        found = function(ours, ids, temperature)
        (found * weights).sum().backward()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(ours.grad, plain.grad, rtol=0, atol=1e-10)
    found = logprobs_and_entropy(logits, ids, temperature)[1]
    torch.testing.assert_close(found, -(p * p.log()).sum(-1).detach(), rtol=0, atol=1e-10)


def test_16_bit_logits_are_read_in_float32(ids: torch.Tensor) -> None:
    logits = torch.randn(B, T, V, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(token_logprobs(logits, ids, 1.0), token_logprobs(logits.float(), ids, 1.0))


class Largest(TorchDispatchMode):
    """The most numbers that a tensor holds which an operation returns."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.numbers = max(self.numbers, made.numel())
        return made


@pytest.mark.parametrize("function", [token_logprobs, logprobs_and_entropy])
def test_no_copy_of_all_logits_is_made(ids: torch.Tensor, function: Any) -> None:
    """A rollout of 64 texts of 512 tokens over 152,000 tokens would take 20 GB for each in float32."""
    logits = torch.zeros(B, T, V, dtype=torch.bfloat16)
    with torch.no_grad(), Largest() as largest:
        function(logits, ids, 0.7)
    assert largest.numbers == T * V
