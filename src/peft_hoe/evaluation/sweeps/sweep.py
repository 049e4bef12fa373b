"""Sweep: a sweep's data and numbers, with what measures, shows, keeps and reads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .result import SweepResult

if TYPE_CHECKING:
    from ..reporting.comparison import SweepComparison
    from ..reporting.measures import SweepMetrics


class Sweep(SweepResult):
    """Rewards of one method at K preferences on P prompts: what `sweep` returns.

    Its data and numbers are those of `SweepResult`; here is what is done with them.

    >>> from peft_hoe import Sweep
    >>> rows = [([1, 0], 0, "red"), ([0, 1], 0, "glad"), ([0.5, 0.5], 0, "glad, red")]
    >>> count = {"vivid": lambda p, c: ["red" in text for text in c], "happy": lambda p, c: ["glad" in text for text in c]}
    >>> found = Sweep.from_generations(rows, count, prompts=["Once"])
    >>> found.points.tolist()
    [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    """

    def metrics(self, *, level: float = 0.95, replicates: int = 1000, seed: int = 0) -> SweepMetrics:
        """Hypervolume, utility, steerability and the like, with intervals; see `reporting.measures`."""
        from ..reporting.measures import measure

        return measure(self, level=level, replicates=replicates, seed=seed)

    def compare(
        self, other: SweepResult, *, level: float = 0.95, replicates: int = 1000, seed: int = 0
    ) -> SweepComparison:
        """This front against another on the same prompts, on this one's scale; see `reporting.comparison`."""
        from ..reporting.comparison import compare

        return compare(self, other, level=level, replicates=replicates, seed=seed)

    # -- what people look at ---

    def table(self, *, level: float = 0.95, replicates: int = 1000, seed: int = 0) -> str:
        """Preferences and mean rewards with half widths of their intervals, as text; * marks what nothing dominates."""
        from ..reporting.tables import sweep_table

        return sweep_table(self, self.intervals(level=level, replicates=replicates, seed=seed))

    def plot(self, path: Any = None, *, others: Sequence[SweepResult] = (), level: float = 0.95) -> Any:
        """The front as a matplotlib Figure, written to `path` where one is given; see `reporting.plots`."""
        from ..reporting.plots import plot

        figure = plot([self, *others], level=level)
        if path is not None:
            figure.savefig(path)
        return figure

    def report(self, path: Any, *, others: Sequence[SweepResult] = (), judged: Sequence[Any] = ()) -> Path:
        """One self-contained HTML page; see `reporting.page`."""
        from ..reporting.page import write_report

        return write_report(self, Path(path), others=others, judged=judged)

    # -- in and out ---

    def save(self, directory: Any) -> None:
        """Write `sweep.json`, `rewards.npy` and `generations.jsonl`."""
        from .files import save

        save(self, Path(directory))

    @classmethod
    def load(cls, directory: Any) -> Sweep:
        """Read what `save` wrote.

        Raises:
            HoEError: it is not there, or damaged.
        """
        from .files import load

        return load(Path(directory), cls)

    @classmethod
    def from_generations(cls, source: Any, rewards: Any, **options: Any) -> Sweep:
        """A sweep from any other method's or engine's completions; see `sweeps.files.from_generations`."""
        from .files import from_generations

        return from_generations(source, rewards, cls, **options)
