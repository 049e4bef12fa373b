"""The gate and the routers' logits as two Triton kernels, one launch each.

Only this module needs Triton, which comes with torch for CUDA. A program of the gate takes some tokens and some ranks,
and works out the votes of its tokens: a few numbers, cheaper to work out again than to write in between. Experts, slots
and routers are loops, so that there may be any number of them. A program of the logits takes some tokens and one slot, so
that a token in 16 bits meets a router in float32 without a copy of either. Statistics and sums are float32 whatever the
input is.

Shapes as in `gate.py`; d is the width of x.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl

from .gate import MAX_FACTOR, TINY, Votes, owners_of

_RANKS = 128  # of a program
_TOKENS = 16  # of a program, with many tokens and few experts
_LEAST_TOKENS = 2  # of a program in a step of decoding
_FEW_TOKENS = 64
_NUMBERS = 2048  # of votes in a program, which holds them in registers
_WIDTH = 512  # of x at a time


@triton.jit  # type: ignore[untyped-decorator]
def _gate(  # type: ignore[no-untyped-def]
    inner, logits, mix, places, gram, owners, result,
    tokens, ranks, experts, routers, slots, widest, tokens_per_row,
    inner_stride, logits_stride, mix_row, mix_slot, mix_expert, gram_row, gram_column, temperature,
    HAS_PLACES: tl.constexpr, HAS_GRAM: tl.constexpr, MOST: tl.constexpr, LEAST: tl.constexpr,
    TOKENS: tl.constexpr, EXPERTS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    t = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    here = t < tokens
    s = tl.arange(0, EXPERTS)
    both = here[:, None] & (s < experts)[None, :]
    row = mix + (t // tokens_per_row)[:, None] * mix_row + s[None, :] * mix_expert
    votes = tl.zeros((TOKENS, EXPERTS), tl.float32)
    for router in range(routers):
        highest = tl.full((TOKENS,), float("-inf"), tl.float32)
        for k in range(widest):
            place = router * widest + k
            if HAS_PLACES:
                place = tl.load(places + place)
            column = tl.minimum(place, slots - 1)
            logit = tl.load(logits + t * logits_stride + column, mask=here, other=float("-inf")).to(tl.float32)
            highest = tl.maximum(highest, tl.where(place < slots, logit, float("-inf")))
        highest = tl.where(here, highest, 0.0)
        total = tl.where(here, 0.0, 1.0)
        added = tl.zeros((TOKENS, EXPERTS), tl.float32)
        for k in range(widest):
            slot = router * widest + k
            place = slot
            if HAS_PLACES:
                place = tl.load(places + slot)
            column = tl.minimum(place, slots - 1)
            logit = tl.load(logits + t * logits_stride + column, mask=here, other=float("-inf")).to(tl.float32)
            share = tl.where(place < slots, tl.exp((logit - highest) / temperature), 0.0)
            total += share
            added += share[:, None] * tl.load(row + slot * mix_slot, mask=both, other=0.0).to(tl.float32)
        votes += added / total[:, None]
    if HAS_GRAM:
        squares = tl.load(gram + s * (gram_row + gram_column), mask=s < experts, other=0.0).to(tl.float32)
        mean = tl.sum(votes * tl.sqrt(tl.maximum(squares, 0.0))[None, :], 1)
        squared = tl.zeros((TOKENS,), tl.float32)
        for e in range(experts):
            products = tl.load(gram + e * gram_row + s * gram_column, mask=s < experts, other=0.0).to(tl.float32)
            squared += tl.sum(tl.where(s[None, :] == e, votes, 0.0), 1) * tl.sum(votes * products[None, :], 1)
        factor = tl.minimum(mean / tl.sqrt(tl.maximum(squared, LEAST)), MOST)
        votes *= tl.where(squared > LEAST, factor, 1.0)[:, None]
    first = tl.program_id(1) * RANKS
    o = first + tl.arange(0, RANKS)
    owner = tl.load(owners + o, mask=o < ranks, other=-1)
    scale = tl.zeros((TOKENS, RANKS), tl.float32)
    for e in range(tl.load(owners + first), tl.load(owners + tl.minimum(first + RANKS, ranks) - 1) + 1):
        vote = tl.sum(tl.where(s[None, :] == e, votes, 0.0), 1)
        scale += tl.where(owner[None, :] == e, vote[:, None], 0.0)
    inside = here[:, None] & (o < ranks)[None, :]
    numbers = tl.load(inner + t[:, None] * inner_stride + o[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(result + t[:, None] * ranks + o[None, :], (numbers * scale).to(result.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _logits(  # type: ignore[no-untyped-def]
    x, weight, bias, result, tokens, width, slots, x_stride, weight_stride, TOKENS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    t = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    here = t < tokens
    v = tl.program_id(1)
    total = tl.zeros((TOKENS,), tl.float32)
    for start in range(0, width, WIDTH):
        k = start + tl.arange(0, WIDTH)
        row = tl.load(weight + v * weight_stride + k, mask=k < width, other=0.0).to(tl.float32)
        part = tl.load(x + t[:, None] * x_stride + k[None, :], mask=here[:, None] & (k < width)[None, :], other=0.0)
        total += tl.sum(part.to(tl.float32) * row[None, :], 1)
    tl.store(result + t * slots + v, total + tl.load(bias + v).to(tl.float32), mask=here)


def gate(
    inner: torch.Tensor,
    logits: torch.Tensor,
    votes: Votes,
    gram: torch.Tensor | None,
    ranks: tuple[int, ...],
    temperature: float,
) -> torch.Tensor:
    """`fused.gate` in one launch, without a graph."""
    tokens, rank = inner.shape
    result = torch.empty_like(inner, memory_format=torch.contiguous_format)
    if not result.numel():
        return result
    inner, logits = _rows(inner), _rows(logits)
    mix = votes.mix
    shared = mix.ndim == 2
    experts, slots, rows = (*mix.shape, 1) if shared else (*mix.shape[:0:-1], mix.shape[0])
    strides = (0, mix.stride(1), mix.stride(0)) if shared else mix.stride()
    padded = max(2, triton.next_power_of_2(experts))
    tile = _tile(tokens, _NUMBERS // padded)
    with _on(inner.device):
        _gate[(triton.cdiv(tokens, tile), triton.cdiv(rank, _RANKS))](
            inner, logits, mix, mix if votes.places is None else votes.places, mix if gram is None else gram,
            owners_of(ranks, inner), result,
            tokens, rank, experts, votes.routers, logits.shape[1], slots // votes.routers, tokens // rows,
            inner.stride(0), logits.stride(0), *strides, *((0, 0) if gram is None else gram.stride()), temperature,
            HAS_PLACES=votes.places is not None, HAS_GRAM=gram is not None, MOST=MAX_FACTOR, LEAST=TINY,
            TOKENS=tile, EXPERTS=padded, RANKS=_RANKS,
        )  # fmt: skip
    return result


def router_logits(tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`(T, slots)` float32 of tokens `(T, d)` and a router's rows `(slots, d)` and `(slots,)`, without a graph."""
    (count, width), slots = tokens.shape, len(weight)
    result = torch.empty(count, slots, dtype=torch.float32, device=tokens.device)
    if not result.numel():
        return result
    tokens, weight = _rows(tokens), _rows(weight)
    tile = _tile(count, _TOKENS)
    with _on(tokens.device):
        _logits[(triton.cdiv(count, tile), slots)](
            tokens, weight, bias.contiguous(), result, count, width, slots, tokens.stride(0), weight.stride(0),
            TOKENS=tile, WIDTH=_WIDTH,
        )  # fmt: skip
    return result


def _tile(tokens: int, most: int) -> int:
    """Tokens of a program."""
    return _LEAST_TOKENS if tokens <= _FEW_TOKENS else max(_LEAST_TOKENS, min(_TOKENS, most))


def _rows(numbers: torch.Tensor) -> torch.Tensor:
    """With neighbours in a row side by side."""
    return numbers if numbers.stride(1) == 1 else numbers.contiguous()


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else contextlib.nullcontext()
