"""When a router has trained enough: its worst gap no longer falls by more than the error of that fall.

An update logs the worst gap g of its own answers, before it is made. A straight line through the last W of them, by least
squares, falls by F = −slope · (W − 1); the scatter around the line gives the standard error of F, which needs no knowledge of
prompts or rewards. With F at most one standard error, training cools down and ends. A batch whose gap has the deviation σ makes
the error about σ √(12 / W): what falls by less cannot be told from standing still.

A fixed number of updates lets the learning rate fall linearly to 0. That needs the end to be known, and near it the gap stands
still because the rate does. Here the rate is constant as long as the gap falls, and goes to 0 in the cool-down.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...router_recipe import COOL_DOWN

WINDOW = 30  # gaps of the line at least; later on the later half of all, so that a slow fall is seen, too
EVERY = 10  # updates between two looks: each is one more chance to stop by chance


def trend(gaps: Sequence[float]) -> tuple[float, float]:
    """By how much the line through W ≥ 3 gaps falls from the first to the last, and the standard error of that.

    >>> from peft_hoe.training.run.plateau import trend
    >>> trend([0.4, 0.3, 0.2])
    (0.2, 0.0)
    >>> fall, error = trend([0.3, 0.1, 0.3, 0.1])
    >>> round(fall, 3), round(error, 3)  # slope -0.04, squared residuals 0.032, of updates 5: 3 * (0.032 / 2 / 5) ** 0.5
    (0.12, 0.17)
    """
    values = np.asarray(gaps, dtype=np.float64)
    count = len(values)
    steps = np.arange(count) - (count - 1) / 2
    squares = float(steps @ steps)
    slope = float(steps @ values) / squares
    left = values - values.mean() - slope * steps
    error = float(np.sqrt(left @ left / (count - 2) / squares))
    return round(-slope * (count - 1), 12), round(error * (count - 1), 12)  # rounded: a straight line has no error


class Plateau:
    """The worst gaps of a run, and where it ends.

    Attributes:
        gaps: one for each update that scored answers.
        most: updates at most.
        ends: updates after which training ends, once that is known.
        found: of the last look the fall, its standard error and W; None before the first one.
    """

    def __init__(self) -> None:
        self.gaps: list[float] = []
        self.most: int | None = None
        self.ends: int | None = None
        self.found: tuple[float, float, int] | None = None

    def note(self, gap: float, update: int) -> None:
        """Take in the worst gap of an update, the first being number 1, and look whether it still falls."""
        self.gaps.append(gap)
        if self.ends is not None or len(self.gaps) < WINDOW or len(self.gaps) % EVERY:
            return
        window = max(WINDOW, len(self.gaps) // 2)
        if np.isnan(self.gaps[-window:]).any():  # batches without any reward that counts
            return
        fall, error = trend(self.gaps[-window:])
        self.found = fall, error, window
        if fall <= error:
            self.ends = update + COOL_DOWN

    @property
    def last(self) -> int | None:
        """Updates of the run, as far as is known."""
        known = [updates for updates in (self.most, self.ends) if updates is not None]
        return min(known) if known else None

    def rate(self, step: int) -> float:
        """The share of the learning rate for the update after `step` others: 1, and from 1 to 0 in the cool-down."""
        if self.last is None or self.most is None:
            return 1.0
        cool_down = min(COOL_DOWN, max(1, self.most // 2))
        return min(1.0, max(0.0, (self.last - step) / cool_down))

    def __str__(self) -> str:
        if self.found is None:
            return f"the worst gap was not looked at, which takes {WINDOW} updates; there were {len(self.gaps)}"
        fall, error, window = self.found
        seen = f"the worst gap fell by {fall:.3f} ± {error:.3f} over {window} updates"
        if self.ends is None:
            return f"{seen}, so training went on to its bound, {self.most} updates"
        return f"{seen}, no more than its error, so training cooled down and ended after {self.last}"

    def state_dict(self) -> dict[str, Any]:
        """Plain types."""
        return {"gaps": list(self.gaps), "ends": self.ends, "found": self.found}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.gaps, self.ends = list(state["gaps"]), state["ends"]
        self.found = None if state["found"] is None else tuple(state["found"])
