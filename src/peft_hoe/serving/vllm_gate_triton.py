"""The gate of `vllm_gate.py` as one kernel: a program for each token, which reads no more than its own adapter's header.

Nothing is read back to the host and nothing is allocated, so that a captured graph holds it. It also runs in Triton's
interpreter, where the tests compare it with the one in torch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..tuner.kernels.gate import MAX_FACTOR, TINY
from .routed_lora import MAGIC, RoutedFormat
from .vllm_gate import fits


@triton.jit  # type: ignore[untyped-decorator]
def _header(base, index, mask, d_out, stride):  # type: ignore[no-untyped-def]
    """The header's numbers `index`; they run down the columns, two entries each, after the four that mark it."""
    place = 4 + 2 * index
    first = base + (place % d_out) * stride + place // d_out
    second = base + ((place + 1) % d_out) * stride + (place + 1) // d_out
    found = tl.load(first, mask=mask, other=0.0).to(tl.float32)
    return found + tl.load(second, mask=mask, other=0.0).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _gate(  # type: ignore[no-untyped-def]
    inner, lora_b, memory, inner_stride, b_stride, stride, d_out,
    first_mark, second_mark, max_factor, tiny,
    RANK: tl.constexpr, FIRST: tl.constexpr, EXPERTS: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_RANK: tl.constexpr, BLOCK_EXPERTS: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    slot = tl.load(memory + token)
    if slot < 0:
        return
    base = lora_b + slot * b_stride
    marks = tl.load(base).to(tl.float32) == first_mark
    marks &= tl.load(base + (1 % d_out) * stride + 1 // d_out).to(tl.float32) == second_mark
    marks &= tl.load(base + (2 % d_out) * stride + 2 // d_out).to(tl.float32) == EXPERTS
    marks &= tl.load(base + (3 % d_out) * stride + 3 // d_out).to(tl.float32) == SLOTS
    if not marks:
        return

    expert = tl.arange(0, BLOCK_EXPERTS)
    known = expert < EXPERTS
    ends = _header(base, expert, known, d_out, stride)
    ranks = tl.max(ends, axis=0).to(tl.int32)
    votes = _header(base, EXPERTS + expert, known, d_out, stride)

    # The softmax of each router over its slots.
    v = tl.arange(0, BLOCK_SLOTS)
    there = v < SLOTS
    column = base + FIRST + ranks + v
    router = tl.load(column, mask=there, other=0.0).to(tl.float32)
    member = tl.load(column + stride, mask=there, other=0.0).to(tl.int32)
    live = tl.load(column + 2 * stride, mask=there, other=0.0).to(tl.float32)
    live += tl.load(column + 3 * stride, mask=there, other=0.0).to(tl.float32)
    logits = tl.load(column + 4 * stride, mask=there, other=0.0).to(tl.float32)
    logits += tl.load(column + 5 * stride, mask=there, other=0.0).to(tl.float32)
    row = inner + token * inner_stride
    logits += tl.load(row + FIRST + ranks + v, mask=there, other=0.0)
    logits += tl.load(row + FIRST + ranks + SLOTS + v, mask=there, other=0.0)
    same = (router[:, None] == router[None, :]) & (router[None, :] > 0)
    highest = tl.max(tl.where(same, logits[None, :], float("-inf")), axis=1)
    powers = tl.where(router > 0, tl.exp(tl.where(router > 0, logits - highest, 0.0)), 0.0)
    total = tl.sum(tl.where(same, powers[None, :], 0.0), axis=1)
    shares = live * powers / tl.where(router > 0, total, 1.0)
    votes += tl.sum(tl.where(member[:, None] == expert[None, :], shares[:, None], 0.0), axis=0)

    # The length that averaging takes.
    lengths = _header(base, 2 * EXPERTS + expert, known, d_out, stride)
    at = 3 * EXPERTS + expert[:, None] * EXPERTS + expert[None, :]
    root = _header(base, at, known[:, None] & known[None, :], d_out, stride)
    mixed = tl.sum(root * votes[None, :], axis=1)
    length = tl.maximum(tl.sqrt(tl.sum(mixed * mixed, axis=0)), tiny)
    votes *= tl.minimum(tl.sum(votes * lengths, axis=0) / length, max_factor)

    # Over the ranks: expert j has those from the end of expert j - 1 on.
    place = tl.arange(0, BLOCK_RANK)
    behind = (place[:, None] - FIRST >= ends[None, :]) & known[None, :]
    owner = tl.sum(behind.to(tl.int32), axis=1)
    owner = tl.where(place >= FIRST, owner, EXPERTS)
    scale = tl.sum(tl.where((owner[:, None] == expert[None, :]) & known[None, :], votes[None, :], 0.0), axis=1)
    inside = place < RANK
    found = tl.load(row + place, mask=inside, other=0.0)
    tl.store(row + place, found * scale, mask=inside)


def gate(inner: Tensor, lora_b: Tensor, memory: Tensor, layout: RoutedFormat) -> None:
    """As `vllm_gate.gate`.

    Args:
        inner: A x, `(T, r)` float32, each row contiguous.
        lora_b: B of all adapters in memory, `(M, 1, d_out, r)`, contiguous.
        memory: `(T,)`, the place in memory of each token's adapter; -1 for none.
        layout: the format.
    """
    d_out, rank = lora_b.shape[2:]
    if not fits(layout, d_out, rank) or not len(inner):
        return
    _gate[(len(inner),)](
        inner, lora_b, memory, inner.stride(0), lora_b.stride(0), lora_b.stride(2), d_out, *MAGIC, MAX_FACTOR, TINY,
        RANK=rank, FIRST=layout.columns(d_out), EXPERTS=layout.experts, SLOTS=layout.slots,
        BLOCK_RANK=triton.next_power_of_2(rank), BLOCK_EXPERTS=triton.next_power_of_2(layout.experts),
        BLOCK_SLOTS=triton.next_power_of_2(layout.slots),
    )  # fmt: skip
