"""What was tried where, and what came of it: the story of a placement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..evaluation.front.weakness import Weakness
from ..evaluation.sweeps.sweep import Sweep
from ..preference import written


@dataclass(frozen=True)
class Trial:
    """An expert or router that was added, measured, and kept or taken away.

    Attributes:
        kind: "expert" or "router".
        name: in the adapter; free again where it was not kept.
        weakness: of the front there before.
        parameters: how many it has.
        before: the hypervolume without it, on the validation prompts.
        after: the hypervolume with it; None where it has more parameters than were left, so that it was not measured.
        low: of the 95 % interval of `after - before`, over prompts.
        high: likewise.
        share: of the replicates in which `after` is above `before`.
        kept: whether the adapter has it.

    >>> from peft_hoe.evaluation import Weakness
    >>> from peft_hoe.placing import Trial
    >>> here = Weakness({"kind": 0.5, "brief": 0.5}, regret=0.1, error=0.02, hull=0.05, contribution=0.0)
    >>> print(Trial("router", "r0", here, 4160, 0.5, 0.55, 0.02, 0.08, 0.99, True))
    router 'r0' at [0.5, 0.5], 4,160 parameters: hypervolume 0.500 -> 0.550, +0.050 [+0.020, +0.080], more in 99% of the
    replicates: kept
    """

    kind: str
    name: str
    weakness: Weakness
    parameters: int
    before: float
    after: float | None
    low: float | None
    high: float | None
    share: float | None
    kept: bool

    @property
    def place(self) -> tuple[float, ...]:
        """λ."""
        return tuple(self.weakness.preference.values())

    def __str__(self) -> str:
        head = f"{self.kind} {self.name!r} at [{written(list(self.place))}], {self.parameters:,} parameters"
        if self.after is None:
            return f"{head}: more than is left of the budget, so it is not tried"
        gain = f"{self.after - self.before:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"
        end = f"more in {self.share:.0%} of the replicates: {'kept' if self.kept else 'taken away again'}"
        return f"{head}: hypervolume {self.before:.3f} -> {self.after:.3f}, {gain}, {end}"

    def told_after(self, before: Trial | None) -> list[str]:
        """The lines of the story, after those of another trial: where the front is weak is said once."""
        here = [] if before is not None and before.weakness == self.weakness else [f"weakest at {self.weakness}"]
        return [*here, f"  {self}"]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Trial:
        """From `to_dict`."""
        return cls(**{**plain, "weakness": Weakness(**plain["weakness"])})


@dataclass(frozen=True, eq=False)
class Placement:
    """What `place` did.

    Attributes:
        trials: in their order.
        sweep: of the adapter as it is now, on the validation prompts that all was chosen by.
        ended: why nothing more was tried, in words.

    >>> from peft_hoe.placing import Placement
    >>> Placement.__dataclass_fields__.keys()
    dict_keys(['trials', 'sweep', 'ended'])
    """

    trials: list[Trial]
    sweep: Sweep
    ended: str

    @property
    def kept(self) -> list[Trial]:
        """What the adapter has gained."""
        return [trial for trial in self.trials if trial.kept]

    @property
    def parameters(self) -> int:
        """Of all that was kept."""
        return sum(trial.parameters for trial in self.kept)

    def story(self) -> str:
        """The log: where the front was weak, what was tried there, and what came of it."""
        lines: list[str] = []
        for before, trial in zip([None, *self.trials], self.trials, strict=False):
            lines += trial.told_after(before)
        names = ", ".join(trial.name for trial in self.kept) or "nothing"
        return "\n".join([*lines, f"{self.ended}; kept {names}, {self.parameters:,} parameters"])
