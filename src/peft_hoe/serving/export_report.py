"""What an export did: returned, printed as a short table, and written as JSON beside the weights."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

REPORT_FILE = "export_report.json"


@dataclass
class ExportReport:
    """One preference as ordinary weights, in plain JSON types.

    Attributes:
        source: the adapter.
        output: directory that was written.
        preference: `{objective: weight}` as asked for.
        effective: the same as in effect; differs only outside the experts' hull.
        experts: `{name: weight}` of the experts and routers that the preference leads to.
        trained_routers: names of those that would vote by the input here.
        routers: what became of their votes.
        modules: number of modules with a LoRA.
        norms: number of norms that are saved whole.
        rank: the largest of a module.
        even: whether all modules have that rank, so that engines need not read `rank_pattern`.
        dtype: of the weights.
        bytes: size of the weights.
        lost: Frobenius norm of what rounding or `rank` took, as a share of that of the exact deltas; 0 when exact.
        most_lost: the same share of the module that lost most.
        logits: how far the routed model is on the calibration prompts (`calibration.Difference`), or None.
        hypervolume: what this export's options lose along the front of a sweep (`front_lost.HypervolumeLost`), or None.
        notes: what an engine or a reader may trip over.
    """

    source: str
    output: str
    preference: dict[str, float]
    effective: dict[str, float]
    experts: dict[str, float]
    trained_routers: list[str]
    routers: str
    modules: int
    norms: int
    rank: int
    even: bool
    dtype: str
    bytes: int
    lost: float
    most_lost: float
    logits: dict[str, float] | None = None
    hypervolume: dict[str, float] | None = None
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    def save(self, path: Path) -> None:
        """Write JSON to a file."""
        path.write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")

    def table(self) -> str:
        """A short summary for a terminal."""
        shown = {"preference": self.preference, "experts": self.experts}
        lines = [f"{name + ':':<12}" + _pairs(values) for name, values in shown.items()]
        if self.trained_routers:
            lines.append(f"{'routers:':<12}{', '.join(self.trained_routers)}: {self.routers}")
        exact = "exact" if self.lost == 0 else f"off by {self.lost:.2%} of its norm (worst module {self.most_lost:.2%})"
        ranks = f"rank {self.rank}" if self.even else f"ranks up to {self.rank}"
        norms = f" and {self.norms} norm{'s' if self.norms > 1 else ''}" if self.norms else ""
        lines.append(
            f"{'LoRA:':<12}{self.modules} modules{norms}, {ranks}, {self.dtype}, {size(self.bytes)}, {exact} -> {self.output}"
        )
        if self.logits is not None:
            lines.append(
                f"{'logits:':<12}KL to the routed model {self.logits['kl']:.3g} nats a token, the same likeliest token at "
                f"{self.logits['agreement']:.1%} of {self.logits['tokens']:.0f} places"
            )
        if (front := self.hypervolume) is not None:
            lines.append(
                f"{'front:':<12}hypervolume {front['adapter']:.4f} of the adapter, {front['exported']:.4f} exported, lost "
                f"{front['lost']:.4f} [{front['low']:.4f}, {front['high']:.4f}]; {front['swept']} of {front['preferences']} "
                f"preferences differ, {front['prompts']} prompts"
            )
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def size(n_bytes: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            break
        n_bytes, unit = n_bytes / 1000, {"B": "kB", "kB": "MB", "MB": "GB", "GB": "TB"}[unit]
    return f"{n_bytes:.3g} {unit}"


def _pairs(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {weight:.4g}" for name, weight in values.items())
