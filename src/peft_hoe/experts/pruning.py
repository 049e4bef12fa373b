"""Pruning by magnitude, exact and streaming.

The task vector's smallest entries are dropped: |tau| < t with t the ceil(p n)-th smallest of n, entries equal to t stay
(bfloat16 checkpoints tie a lot). Non-negative float32 numbers keep their order when viewed as int32, so a radix histogram
(the high 16 bits, then the low 16 inside the bucket that was hit) finds t in a few megabytes at any size; t equals
`torch.kthvalue`. Where a guess of t is right to a few percent, both halves are counted in one pass.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .pieces import kth_smallest_magnitude, pieces

_BUCKETS = 1 << 16
_ROUNDING = 2.0**-50  # more than a share and its product are rounded by, less than an entry of any tensor
GUESSED = 8  # buckets around the guess whose low halves are counted too; each is 0.8 % wide and takes 512 KiB
_PENDING = 1 << 22  # entries inside them that are gathered before they are counted


def prune_rank(share: float, n: int) -> int:
    """ceil(share * n), where a product that is whole up to rounding (0.07 * 100 is above 7) counts as whole."""
    return math.ceil(share * n * (1 - _ROUNDING))


class ThresholdSearch:
    """Finds the threshold that drops a share of all entries of tensors that are shown to it once, or twice, on any device.

    Show every tensor to `count`, then call `narrow`. If it says so, show every tensor to `count_inside` too. `threshold` and
    `dropped` are exact after that.

    Args:
        share: the share to drop, in [0, 1).
        sample: some of the entries `(n,)`; the better it stands for all of them, the likelier one pass is enough.
        guessed: how many buckets around the sample's own threshold count as its guess.
    """

    def __init__(self, share: float, sample: Tensor | None = None, guessed: int = GUESSED) -> None:
        self.share = share
        self.total = 0
        self._high = torch.zeros(_BUCKETS, dtype=torch.int64)
        self._first, width = _guess(share, sample, guessed)  # of the buckets whose low halves are counted
        self._low = torch.zeros(width * _BUCKETS, dtype=torch.int64)
        self._pending: list[Tensor] = []
        self._bucket = 0
        self._below = 0  # entries in lower buckets

    def count(self, values: Tensor) -> None:
        """Count the entries of one tensor."""
        self.total += values.numel()
        start, stop = self._first << 16, (self._first << 16) + len(self._low)
        for (piece,) in pieces(values):
            bits = _magnitude_bits(piece)
            self._high += torch.bincount(bits >> 16, minlength=_BUCKETS).cpu()
            if len(self._low):
                self._pending.append(bits[(bits >= start) & (bits < stop)] - start)
        if sum(map(len, self._pending)) > _PENDING:
            self._count_pending()

    def _count_pending(self) -> None:
        if self._pending:
            self._low += torch.bincount(torch.cat(self._pending), minlength=len(self._low)).cpu()
        self._pending = []

    def add(self, other: ThresholdSearch) -> None:
        """Count all that another search of the same sample has counted."""
        self._count_pending()
        other._count_pending()
        self.total += other.total
        self._high += other._high
        self._low += other._low

    def empty(self) -> ThresholdSearch:
        """A search of the same sample, in the same pass, that has counted nothing."""
        search = copy.copy(self)
        search.total, search._high, search._low = 0, torch.zeros_like(self._high), torch.zeros_like(self._low)
        search._pending = []
        return search

    def __getstate__(self) -> dict[str, Any]:
        """For another process: counts alone, which are on the CPU wherever the tensors were."""
        return self.state()

    def state(self) -> dict[str, Any]:
        """All that was counted, for `from_state`."""
        self._count_pending()
        return {**vars(self), "_pending": []}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> ThresholdSearch:
        """A search that goes on from a `state`."""
        search = cls(state["share"])
        vars(search).update(state)
        return search

    def narrow(self) -> bool:
        """Choose the bucket that holds the threshold; whether a second pass, over its inside, is needed."""
        self._count_pending()
        rank = prune_rank(self.share, self.total)
        if rank < 1:
            return False
        ends = self._high.cumsum(0)
        self._bucket = int(torch.searchsorted(ends, rank))
        self._below = int(ends[self._bucket] - self._high[self._bucket])
        place = (self._bucket - self._first) << 16
        found = 0 <= place < len(self._low)
        self._low = self._low[place : place + _BUCKETS].clone() if found else torch.zeros(_BUCKETS, dtype=torch.int64)
        return not found

    def count_inside(self, values: Tensor) -> None:
        """Count the entries of one tensor inside the bucket, where `narrow` asked for it."""
        for (piece,) in pieces(values):
            bits = _magnitude_bits(piece)
            inside = bits[(bits >> 16) == self._bucket] & 0xFFFF
            self._low += torch.bincount(inside, minlength=_BUCKETS).cpu()

    @property
    def threshold(self) -> float:
        """The number t; 0 where nothing is to be dropped."""
        if prune_rank(self.share, self.total) < 1:
            return 0.0
        bits = (self._bucket << 16) | self._low_rank()
        return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))

    @property
    def dropped(self) -> float:
        """The share of entries below the threshold: less than asked for where entries tie."""
        if prune_rank(self.share, self.total) < 1:
            return 0.0
        return (self._below + int(self._low[: self._low_rank()].sum())) / self.total

    def _low_rank(self) -> int:
        rank = prune_rank(self.share, self.total) - self._below
        return int(torch.searchsorted(self._low.cumsum(0), rank))


def _guess(share: float, sample: Tensor | None, guessed: int) -> tuple[int, int]:
    """The first of the buckets around the sample's own threshold, and how many of them."""
    if sample is None or not sample.numel() or share <= 0:
        return 0, 0
    middle = int(_magnitude_bits(sample).sort().values[int(share * len(sample))])
    return max(0, (middle >> 16) - guessed // 2), guessed


def _magnitude_bits(values: Tensor) -> Tensor:
    return values.float().abs().view(torch.int32)


def magnitude_threshold(values: Tensor, share: float) -> float:
    """The ceil(share * n)-th smallest |entry| of one float32 tensor `(...)`; 0 for a share of 0."""
    rank = prune_rank(share, values.numel())
    return kth_smallest_magnitude(values, rank) if rank >= 1 else 0.0


def drop_below(values: Tensor, threshold: float, out: Tensor | None = None) -> Tensor:
    """`values` `(...)`, float32, with entries of a magnitude below the threshold set to 0."""
    if threshold == 0:
        return values
    # hardshrink keeps what is above its number: the float32 before the threshold keeps what is equal to it
    return torch.hardshrink(values, float(np.nextafter(np.float32(threshold), np.float32(0))), out=out)
