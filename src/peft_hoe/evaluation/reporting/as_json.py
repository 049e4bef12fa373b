"""Metrics, comparisons and win rates as plain JSON: the contents of `metrics.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ...metrics import Interval
from ..judging.win_rates import WinRates
from .comparison import SweepComparison
from .measures import SweepMetrics


def as_json(
    metrics: SweepMetrics | None, comparisons: Sequence[SweepComparison] = (), judged: Sequence[WinRates] = ()
) -> dict[str, Any]:
    """Metrics, comparisons and win rates with their intervals; NaN and infinity become null."""
    found: dict[str, Any] = {"metrics": None}
    if metrics is not None:
        settings = {"payoff_source": metrics.payoff_source, "level": metrics.level, "replicates": metrics.replicates}
        found["metrics"] = {
            "name": metrics.name, "runs": metrics.runs, **settings, "front": asdict(metrics.front),
            "values": _intervals(metrics.values),
        }  # fmt: skip
    found["comparisons"] = [
        {
            "names": list(pair.names),
            "verdict": pair.verdict(),
            "dominates": pair.dominates,
            "dominated": pair.dominated,
            "reference_point": pair.reference_point,
            "level": pair.level,
            "replicates": pair.replicates,
            "values": _intervals(pair.values),
        }
        for pair in comparisons
    ]
    found["judged"] = [
        {"names": list(rates.names), **rates.counts, "win_rate": _interval(rates.interval()), "note": rates.note()}
        for rates in judged
    ]
    return found


def _intervals(values: Mapping[str, Interval]) -> dict[str, Any]:
    return {name: _interval(interval) for name, interval in values.items()}


def _interval(interval: Interval) -> dict[str, Any]:
    numbers = {name: float(getattr(interval, name)) for name in ("estimate", "low", "high")}
    shown: dict[str, Any] = {name: number if math.isfinite(number) else None for name, number in numbers.items()}
    return shown | {"undefined": int(interval.undefined)}
