"""The kernels as operators of torch: autograd knows their gradients, and torch.compile takes each for one node.

Without a graph to build they are launched at once, past the dispatcher, which would take longer than the kernel.
Shapes as in `gate.py`; d is the width of x.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch

from .gate import PLAIN, Votes
from .gradient import gate_gradient


def gate(
    inner: torch.Tensor,
    logits: torch.Tensor,
    votes: Votes,
    gram: torch.Tensor | None,
    ranks: tuple[int, ...],
    temperature: float,
) -> torch.Tensor:
    """`gate.gated` by the Triton kernel, differentiable in `inner` and `logits`."""
    if _by_operator(inner, logits):
        mix, routers, places = votes
        result: torch.Tensor = _gate(inner, logits, mix, places, gram, list(ranks), routers, temperature)
        return result
    return _kernels().gate(inner, logits, votes, gram, ranks, temperature)


def router_logits(tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Logits `(T, slots)`, summed in float32, of tokens `(T, d)` in 16 bits and a router's rows in float32, differentiable."""
    if _by_operator(tokens, weight, bias):
        result: torch.Tensor = _router_logits(tokens, weight, bias)
        return result
    return _kernels().router_logits(tokens, weight, bias)


def _by_operator(*tensors: torch.Tensor) -> bool:
    if torch.compiler.is_compiling() or any(type(tensor) not in PLAIN for tensor in tensors):
        return True
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _kernels() -> Any:
    return import_module(".triton_gate", __package__)  # needs Triton


# -- the operators ---


@torch.library.custom_op("peft_hoe::gate", mutates_args=())
def _gate(
    inner: torch.Tensor,
    logits: torch.Tensor,
    mix: torch.Tensor,
    places: torch.Tensor | None,
    gram: torch.Tensor | None,
    ranks: Sequence[int],
    routers: int,
    temperature: float,
) -> torch.Tensor:
    found: torch.Tensor = _kernels().gate(inner, logits, Votes(mix, routers, places), gram, tuple(ranks), temperature)
    return found


@_gate.register_fake
def _(inner: torch.Tensor, *others: Any) -> torch.Tensor:
    return torch.empty_like(inner, memory_format=torch.contiguous_format)


def _keep_for_gate(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    inner, logits, mix, places, gram, ctx.ranks, ctx.routers, ctx.temperature = inputs
    ctx.save_for_backward(inner, logits, mix, places, gram)


def _gate_backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    inner, logits, mix, places, gram = ctx.saved_tensors
    votes = Votes(mix, ctx.routers, places)
    found = gate_gradient(gradient, inner, logits, votes, gram, tuple(ctx.ranks), ctx.temperature)
    return (*found, *[None] * 6)


_gate.register_autograd(_gate_backward, setup_context=_keep_for_gate)


@torch.library.custom_op("peft_hoe::router_logits", mutates_args=())
def _router_logits(tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = _kernels().router_logits(tokens, weight, bias)
    return found


@_router_logits.register_fake
def _(tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return tokens.new_empty((tokens.shape[0], weight.shape[0]), dtype=torch.float32)


def _keep_for_logits(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    tokens, weight, _ = inputs
    ctx.save_for_backward(tokens, weight)


def _logits_backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    tokens, weight = ctx.saved_tensors
    for_tokens = (gradient @ weight.float()).to(tokens.dtype) if ctx.needs_input_grad[0] else None
    for_weight = (gradient.T @ tokens.float()).to(weight.dtype) if ctx.needs_input_grad[1] else None
    return for_tokens, for_weight, gradient.sum(0).to(weight.dtype) if ctx.needs_input_grad[2] else None


_router_logits.register_autograd(_logits_backward, setup_context=_keep_for_logits)
