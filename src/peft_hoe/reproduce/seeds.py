"""Several seeds of training in one experiment: what each of them has for itself, and their sweeps as one.

With `seeds=[0, 1]` there are `trained-seed0` and `trained-seed1` in place of `trained`; `sweeps/hoe-seed0` and
`sweeps/hoe-seed1` are stacked in `sweeps/hoe`, so that all that reads that reads one sweep of two runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path

from ..evaluation.baselines import BASELINES
from ..evaluation.sweeps.sweep import Sweep
from .plan import Plan

SWEEPS = "sweeps"


def runs(plan: Plan) -> Sequence[int | None]:
    """The seeds of training; None alone where the experiment trains once, with the seed of all else."""
    return list(plan.seeds) or [None]


def of_seed(name: str, seed: int | None) -> str:
    """The name of what a seed has for itself; the name as it is where the experiment trains once."""
    return name if seed is None else f"{name}-seed{seed}"


def is_trained(baseline: str) -> bool:
    """Whether a baseline trains something, and so has a sweep for each seed."""
    return "train_dataset" in inspect.signature(BASELINES[baseline].make).parameters


def stack(folder: Path, name: str, seeds: Sequence[int]) -> None:
    """Write the sweeps of all seeds as one, on the scale of the first; each run says its seed.

    Args:
        folder: of the experiment.
        name: of the sweep; those of the seeds are `of_seed(name, seed)`.
        seeds: of training.
    """
    swept = [Sweep.load(folder / SWEEPS / of_seed(name, seed)) for seed in seeds]
    scale, source = swept[0].normalizer, swept[0].payoff_source
    for one, seed in zip(swept, seeds, strict=True):
        one.normalizer, one.payoff_source = scale, source
        one.runs = [{**run, "training_seed": seed} for run in one.runs]
    found = Sweep.stack(swept)
    found.normalizer = scale  # own corners would be measured anew; the other methods have the first seed's
    found.save(folder / SWEEPS / name)
