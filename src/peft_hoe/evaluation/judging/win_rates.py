"""Pairwise comparison of completions by a judge: a function, or a server (`url_judge`).

A judge may prefer whatever it reads first, so each pair is asked in both orders. A text wins where it wins in both; anything
else is a tie, and where the judge contradicted itself that is counted. Intervals: bootstrap over prompts, a tie being half a
win.

Shapes: K preferences, P prompts.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from ...errors import HoEError
from ...preference import FloatArray, written
from ...rewards.calls import settled
from ..reporting.tables import aligned
from ..sweeps.generations import preference_key
from ..sweeps.result import SweepResult

if TYPE_CHECKING:
    from ...metrics import Interval

# How a verdict may be written: for the first text, for the second one, for neither.
_VERDICTS = {"a": 1.0, "first": 1.0, "1": 1.0, "b": 0.0, "second": 0.0, "2": 0.0, "tie": 0.5, "draw": 0.5, "c": 0.5}


@dataclass(frozen=True, eq=False)
class WinRates:
    """How often A's text was preferred to B's.

    Attributes:
        names: of A and B.
        preferences: `(K, N)`.
        scores: `(K, P)`: 1 where A won, 0 where B won, 0.5 for a tie, NaN where nothing was judged.
        contradictions: `(K, P)`, whether the judge named the same place, not the same text, in both orders.
        unread: how many answers were no verdict; they count as ties.

    >>> from peft_hoe import Sweep
    >>> from peft_hoe.evaluation import win_rates
    >>> rows = [([1, 0], 0, "longer"), ([0, 1], 0, "brief")]
    >>> count = {"length": lambda p, c: [len(text) for text in c], "brevity": lambda p, c: [-len(text) for text in c]}
    >>> found = Sweep.from_generations(rows, count, prompts=["Say."])
    >>> judged = win_rates(found, ["short"], lambda prompt, a, b: "A" if len(a) > len(b) else "tie", progress=False)
    >>> judged.names
    ('generations', 'reference')
    """

    names: tuple[str, str]
    preferences: FloatArray
    scores: FloatArray
    contradictions: Any
    unread: int

    @property
    def counts(self) -> dict[str, int]:
        """Wins of A, ties and wins of B."""
        return {
            "wins": int((self.scores == 1).sum()),
            "ties": int((self.scores == 0.5).sum()),
            "losses": int((self.scores == 0).sum()),
        }

    def interval(self, *, level: float = 0.95, replicates: int = 1000, seed: int = 0) -> Interval:
        """Win rate of A over all preferences."""
        from ...metrics import bootstrap

        drawn = bootstrap({"A": self.scores[None, :, :, None]}, replicates=replicates, seed=seed)
        return drawn.interval(lambda rates: rates.mean(), level=level)

    def intervals(self, *, level: float = 0.95, replicates: int = 1000, seed: int = 0) -> Interval:
        """Win rate of A at each preference, arrays `(K,)`."""
        from ...metrics import bootstrap

        drawn = bootstrap({"A": self.scores[None, :, :, None]}, replicates=replicates, seed=seed)
        return drawn.interval(lambda rates: rates[:, 0], level=level)

    def cells(self) -> list[list[str]]:
        """The rates as a table's cells, the first row naming the columns."""
        each, whole = self.intervals(), self.interval()
        rates = [*zip(each.estimate, each.low, each.high, strict=True), (whole.estimate, whole.low, whole.high)]
        labels = [*map(written, self.preferences), "all"]
        parts = [*self.scores, self.scores.ravel()]
        head = ["preference", f"{self.names[0]} over {self.names[1]}", "wins", "ties", "losses"]
        return [head] + [
            [label, f"{rate:.3f} [{low:.3f}, {high:.3f}]", *(str(int((part == value).sum())) for value in (1, 0.5, 0))]
            for label, (rate, low, high), part in zip(labels, rates, parts, strict=True)
        ]

    def table(self) -> str:
        """The rates as text."""
        return "\n".join([*("  ".join(row).rstrip() for row in aligned(self.cells())), self.note()])

    def note(self) -> str:
        """How far the judge can be trusted."""
        judged = int((~np.isnan(self.scores)).sum())
        return (
            f"each of {judged} pairs asked in both orders; {int(self.contradictions.sum())} contradictions (ties), "
            f"{self.unread} answers that were no verdict (ties)"
        )


def win_rates(
    a: SweepResult, b: SweepResult | Sequence[str], judge: Callable[[Any, str, str], Any], *, progress: bool = True
) -> WinRates:
    """Ask a judge about the first texts of A and B at every preference that both have.

    Args:
        a: a sweep.
        b: a sweep of the same prompts, or P texts that stand against A's at every preference, such as a base model's.
        judge: `(prompt, first, second)`; returns "A", "B" or "tie", or 1 for the first, 0 for the second, 0.5 for neither.
            A `URLJudge`, or any function, also a coroutine function. Its attribute `workers` says how many calls may be under
            way at once.
        progress: show a bar.

    Raises:
        HoEError: the prompts differ, no preference is in both, the judge fails, or none of its answers is a verdict.

    >>> from peft_hoe import Sweep
    >>> from peft_hoe.evaluation import win_rates
    >>> rows = [([1, 0], 0, "longer"), ([0, 1], 0, "brief")]
    >>> count = {"length": lambda p, c: [len(text) for text in c], "brevity": lambda p, c: [-len(text) for text in c]}
    >>> found = Sweep.from_generations(rows, count, prompts=["Say."])
    >>> judged = win_rates(found, ["short"], lambda prompt, a, b: "A" if len(a) > len(b) else "tie", progress=False)
    >>> judged.preferences.tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    at, jobs = _pairs(a, b)
    contenders = [(a.prompts[p], ours, theirs) for _, p, ours, theirs in jobs]
    asked = [(prompt, ours, theirs) for prompt, ours, theirs in contenders]
    asked += [(prompt, theirs, ours) for prompt, ours, theirs in contenders]
    workers = int(getattr(judge, "workers", 1))
    with ThreadPoolExecutor(workers) if workers > 1 else contextlib.nullcontext() as pool:
        replies = (map if pool is None else pool.map)(lambda item: settled(judge(*item)), asked)
        answers = list(tqdm(replies, total=len(asked), desc="judge", disable=not progress))
    verdicts = [_verdict(answer) for answer in answers]
    if verdicts and all(value is None for value in verdicts):
        raise HoEError(
            f"none of the {len(answers)} answers of the judge is a verdict, such as {str(answers[0])[:100]!r}; it must answer "
            '"A", "B" or "tie"',
            argument="judge", value=answers[0], allowed=("A", "B", "tie"),
        )  # fmt: skip
    scores = np.full((len(at), len(a.prompts)), np.nan)
    contradictions = np.zeros(scores.shape, dtype=bool)
    for (k, p, _, _), forward, backward in zip(jobs, verdicts[: len(jobs)], verdicts[len(jobs) :], strict=True):
        ours, theirs = (0.5 if value is None else value for value in (forward, backward))
        scores[k, p] = {2.0: 1.0, 0.0: 0.0}.get(ours + 1 - theirs, 0.5)
        contradictions[k, p] = {ours, theirs} in ({1.0}, {0.0})
    other = b.name if isinstance(b, SweepResult) else "reference"
    unread = sum(value is None for value in verdicts)
    return WinRates((a.name, other), a.preferences[at], scores, contradictions, unread)


def _pairs(a: SweepResult, b: SweepResult | Sequence[str]) -> tuple[list[int], list[tuple[int, int, str, str]]]:
    """Rows of A's preferences, and (place, prompt, A's text, B's text)."""
    if isinstance(b, SweepResult):
        if a.prompts != b.prompts:
            raise HoEError(
                f"{a.name!r} and {b.name!r} answered different prompts; judge sweeps of the same prompts",
                argument="prompts", value=b.prompts, allowed=a.prompts,
            )  # fmt: skip
        place = {preference_key(point): k for k, point in enumerate(b.preferences)}
        shared = [(k, place[key]) for k, key in enumerate(map(preference_key, a.preferences)) if key in place]
        theirs = {k: [texts[0] for texts in b.completions[0][other]] for k, other in shared}
    else:
        if len(b) != len(a.prompts):
            raise HoEError(
                f"{len(b)} texts are given for {len(a.prompts)} prompts; give one for each",
                argument="b", value=len(b), allowed=len(a.prompts),
            )  # fmt: skip
        theirs = {k: list(b) for k in range(len(a.preferences))}
    if not theirs:
        raise HoEError(
            f"{a.name!r} and the other sweep share no preference; sweep both at the same ones",
            argument="preferences", allowed=a.preferences.tolist(),
        )  # fmt: skip
    jobs = [
        (i, p, ours[0], text)
        for i, (k, others) in enumerate(theirs.items())
        for p, (ours, text) in enumerate(zip(a.completions[0][k], others, strict=True))
        if ours[0] is not None and text is not None
    ]
    return list(theirs), jobs


def _verdict(answer: Any) -> float | None:
    """1 for the first text, 0 for the second, 0.5 for a tie, None for anything else."""
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        return float(answer) if answer in (0, 0.5, 1) and not math.isnan(answer) else None
    for line in reversed(str(answer).strip().splitlines()):
        words = re.findall(r"[a-z0-9]+", line.lower())
        if words and words[-1] in _VERDICTS:
            return _VERDICTS[words[-1]]
    return None
