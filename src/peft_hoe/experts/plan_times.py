"""How long a build will take: each kind of work is done for a moment on random numbers, where the build will be, and scaled."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import HoEConfig
from .agreement import compare
from .architecture import LinearModule
from .devices import synchronize
from .merging import METHODS, merge
from .options import BuildOptions
from .pruning import ThresholdSearch, drop_below
from .svd import truncated_svd
from .task_vectors import TaskVectors

DIRECTIONS = 2.5  # of the randomised SVD's space, for each of rank; on spectra k^-0.7
_SIDE, _GPU_SIDE = 1024, 4096  # rows and columns of the matrices that are timed; a GPU is idle with less


def estimated_seconds(
    targets: Sequence[LinearModule],
    options: BuildOptions,
    config: HoEConfig,
    shares: Sequence[Mapping[str, float]],
    full: Sequence[str],
) -> dict[str, float]:
    """Seconds of one thread by kind of work.

    Args:
        targets: the weights in scope.
        options: the settings.
        config: the experts.
        shares: of each expert the weights of the policies that it is made of, as `expert_shares` gives them.
        full: names of those that are no LoRA adapters.
    """
    if not full:
        return {}
    device = options.device
    side = _side(device)
    generator = torch.Generator().manual_seed(0)
    read = [torch.randn(side, side, generator=generator) for _ in full]
    deltas = {name: entries.to(device) for name, entries in zip(full, read, strict=True)}
    first = deltas[full[0]]
    entries = sum(target.d_in * target.d_out for target in targets) / side**2
    parts = {
        "task vectors": 3 * len(full) * entries * _timed(lambda: read[0].bfloat16().to(device).float() - 1, device)
    }
    vectors = TaskVectors(deltas, dict.fromkeys(deltas, 1.0))
    parts["agreement"] = entries * _timed(lambda: compare(vectors), device)
    if options.pruning.share > 0:
        search = ThresholdSearch(options.pruning.share, read[0][0])
        parts["thresholds"] = len(full) * entries * _timed(lambda: search.count(first), device)
        parts["pruning"] = len(full) * entries * _timed(lambda: drop_below(first, 0.5), device)
    made = zip(config.experts or [], shares, strict=True)
    dense = [(spec, share) for spec, share in made if share.keys() & set(full)]  # a LoRA policy is taken as it is
    for spec, share in (pair for pair in dense if len(pair[1]) > 1):
        merging = options.merging.of_expert(str(spec.name))
        if not METHODS[merging.method].sums:
            raw = [deltas.get(name, first) for name in share]
            call = functools.partial(merge, raw, list(share.values()), merging.method, merging.options)
            parts["merging"] = parts.get("merging", 0.0) + entries * _timed(call, device)
    parts["SVD"] = _svd_seconds(targets, options, [spec.r or 1 for spec, _ in dense])
    return parts


def _svd_seconds(targets: Sequence[LinearModule], options: BuildOptions, ranks: Sequence[int]) -> float:
    """One decomposition is timed; the rest follow from the work in products with a matrix, which is nearly all."""
    device = options.device
    solver: dict[str, Any] = {"solver": options.svd.solver, "tolerance": options.svd.tolerance}
    side = _side(device)
    rank = min(max(ranks), side // 4)
    decaying = _decaying(side, rank).to(device)
    seconds = _timed(lambda: truncated_svd(decaying, rank, **solver), device)
    probe = _svd_work(side, side, rank, options)
    work = sum(_svd_work(target.d_out, target.d_in, r, options) for target in targets for r in ranks)
    return seconds * work / probe


def _svd_work(rows: int, columns: int, rank: int, options: BuildOptions) -> float:
    smaller, larger = sorted((rows, columns))
    if options.svd.solver == "exact" or 3 * rank > smaller:
        return 10.0 * smaller**2 * larger
    directions = DIRECTIONS * rank
    return 4 * directions * rows * columns + 4 * directions**2 * (rows + columns)


def _decaying(side: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    terms = 4 * rank
    left = torch.randn(side, terms, generator=generator) * torch.arange(1, terms + 1) ** -0.7
    return left @ torch.randn(terms, side, generator=generator) + 0.05 * torch.randn(side, side, generator=generator)


def _side(device: torch.device) -> int:
    return _SIDE if device.type == "cpu" else _GPU_SIDE


def _timed(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call: of the CPU, which a busy machine hardly changes; on a GPU by the clock on the wall."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    function()  # the first is slower
    synchronize(device)
    started = clock()
    function()
    synchronize(device)
    return clock() - started
