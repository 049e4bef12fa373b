"""Pruning by magnitude, exact and streaming.

The task vector's smallest entries are dropped: |tau| < t with t the ceil(p n)-th smallest of n, entries equal to t stay
(bfloat16 checkpoints tie a lot). Non-negative float32 numbers keep their order when viewed as int32, so two passes of a
radix histogram (the high 16 bits, then the low 16 inside the bucket that was hit) find t in 1 MiB at any size; t equals
`torch.kthvalue`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

_BUCKETS = 1 << 16
_ROUNDING = 2.0**-50  # more than a share and its product are rounded by, less than an entry of any tensor
_CHUNK = 1 << 22  # entries counted at once, so that the integer copy stays small


def prune_rank(share: float, n: int) -> int:
    """ceil(share * n), where a product that is whole up to rounding (0.1 * 30 is above 3) counts as whole."""
    return math.ceil(share * n * (1 - _ROUNDING))


class ThresholdSearch:
    """Finds the threshold that drops a share of all entries of tensors that are shown to it twice.

    Show every tensor to `count`, then call `narrow` once, then show every tensor to `count_inside`; `threshold` and
    `dropped` are exact after that.

    Args:
        share: the share to drop, in [0, 1).
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.total = 0
        self._high = torch.zeros(_BUCKETS, dtype=torch.int64)
        self._low = torch.zeros(_BUCKETS, dtype=torch.int64)
        self._bucket = 0
        self._below = 0  # entries in lower buckets

    def count(self, values: Tensor) -> None:
        """Count the entries of one tensor by the high half of their bits: the first pass."""
        self.total += values.numel()
        for bits in _magnitude_bits(values):
            self._high += torch.bincount(bits >> 16, minlength=_BUCKETS)

    def narrow(self) -> None:
        """Choose the bucket that holds the threshold, between the passes."""
        rank = prune_rank(self.share, self.total)
        if rank < 1:
            return
        ends = self._high.cumsum(0)
        self._bucket = int(torch.searchsorted(ends, rank))
        self._below = int(ends[self._bucket] - self._high[self._bucket])

    def count_inside(self, values: Tensor) -> None:
        """Count the entries of one tensor inside the bucket by the low half of their bits: the second pass."""
        for bits in _magnitude_bits(values):
            inside = bits[(bits >> 16) == self._bucket] & 0xFFFF
            self._low += torch.bincount(inside, minlength=_BUCKETS)

    @property
    def threshold(self) -> float:
        """t; 0 where nothing is to be dropped."""
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


def _magnitude_bits(values: Tensor) -> Iterator[Tensor]:
    flat = values.reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        yield flat[start : start + _CHUNK].float().abs().view(torch.int32)


def magnitude_threshold(values: Tensor, share: float) -> float:
    """The ceil(share * n)-th smallest |entry| of one tensor `(...)`; 0 for a share of 0."""
    search = ThresholdSearch(share)
    search.count(values)
    search.narrow()
    search.count_inside(values)
    return search.threshold


def drop_below(values: Tensor, threshold: float) -> Tensor:
    """`values` `(...)` with entries of a magnitude below the threshold set to 0."""
    return values if threshold == 0 else torch.where(values.abs() >= threshold, values, 0)
