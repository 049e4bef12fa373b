"""What a build did: returned, printed as a short table, and written as JSON beside the adapter."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import HoEWarning

REPORT_FILE = "build_report.json"
_LOW_SHARE = 0.1  # a module of which pruning keeps less is warned about
_ENOUGH, _LITTLE = (
    0.95,
    0.02,
)  # share of the energy that is enough, and of the second half of the ranks that is hardly more
_OFF_TARGET = 0.05  # and a policy of which it drops so much more or less than asked


@dataclass
class PolicyReport:
    """One policy.

    Attributes:
        source: as given.
        kind: "full" or "lora".
        in_scope_norm: norm of its task vector over all weights in scope.
        captured: `{kind: share of the squared norm of the whole change}` outside linear layers that `capture` named, which
            experts hold: embeddings and heads up to their rank, norms as they are.
        not_captured: `{kind: share of the squared norm of the whole change}` of what experts cannot hold: norms,
            biases, embeddings, lm_head, fused experts, linear layers not targeted.
        prune_threshold: entries below it were dropped; None with a threshold per module, or without pruning.
        dropped: share of entries in scope that were dropped.
        notes: tensors that are missing, extra or resized.
    """

    source: str
    kind: str
    in_scope_norm: float = 0.0
    captured: dict[str, float] = field(default_factory=dict)
    not_captured: dict[str, float] = field(default_factory=dict)
    prune_threshold: float | None = None
    dropped: float = 0.0
    notes: list[str] = field(default_factory=list)


@dataclass
class ModuleReport:
    """One expert in one module.

    Attributes:
        rank: after clamping; 0 where the policies left the module as it was.
        kept: share of the task vector's entries that pruning kept.
        energy: share of the squared norm of the (pruned or merged) task vector that the factors hold, before rescaling.
        half_energy: the same for the first half of the directions: what the second half adds says whether more would help.
        residual: norm of what they do not hold, before rescaling.
        tau_norm: norm of the task vector before pruning; of the merged one for a merge.
        norm: norm of B A as written.
        rescale: the factor folded into B.
        solver: which SVD, with the size of its space and any fallback.
    """

    rank: int
    kept: float
    energy: float
    half_energy: float
    residual: float
    tau_norm: float
    norm: float
    rescale: float
    solver: str


@dataclass
class BuildReport:
    """Everything about one build, in plain JSON types.

    Attributes:
        base: as given.
        output_dir: where the adapter is.
        options: the settings, defaults filled in.
        experts: name, preference and rank of every expert, in the adapter's order.
        routers: name and preference of every router.
        policies: by objective, then those of single experts by the expert's name.
        pairs: cosine and sign agreement of every pair of policies' task vectors.
        modules: `{module: {expert: ModuleReport}}` of every module that a policy changed.
        sources: ids, commits, licences and hashes of the base and the policies.
        search: the candidates of a search, `{"point": {setting: value}, "score": number}` in the order they were tried.
        notes: what differs from what one might expect.

    >>> from peft_hoe import demo
    >>> report = demo.build_demo_adapter("adapter")
    >>> [expert["name"] for expert in report.experts]
    ['cheerful', 'vivid', 'centroid']
    """

    base: str
    output_dir: str
    options: dict[str, Any]
    experts: list[dict[str, Any]]
    routers: list[dict[str, Any]]
    policies: dict[str, PolicyReport]
    pairs: list[dict[str, Any]]
    modules: dict[str, dict[str, ModuleReport]]
    sources: dict[str, Any] = field(default_factory=dict)
    search: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    def save(self, path: Path) -> None:
        """Write JSON to a file."""
        path.write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")

    def totals(self, expert: str) -> dict[str, float]:
        """One expert over all modules.

        Returns:
            `energy`: share of the squared norm of its (pruned or merged) task vector that is held, and `half`: by the first
            half of the directions; `kept`: mean share of entries kept; `rank`: largest; `ratio`: norm of all B A over the
            norm of its task vector.
        """
        rows = [module[expert] for module in self.modules.values()]
        held = lost = half = 0.0
        for row in rows:
            here = (row.norm / row.rescale) ** 2
            held += here
            half += here * (row.half_energy / row.energy if row.energy else 1.0)
            lost += row.residual**2
        tau = math.sqrt(sum(row.tau_norm**2 for row in rows))
        norm = math.sqrt(sum(row.norm**2 for row in rows))
        return {
            "energy": held / (held + lost) if held + lost else 1.0,
            "half": half / (held + lost) if held + lost else 1.0,
            "kept": sum(row.kept for row in rows) / len(rows),
            "rank": max(row.rank for row in rows),
            "ratio": norm / tau if tau else 0.0,
        }

    def _is_r_enough(self) -> list[str]:
        """One line: how far the ranks go, and how much the last doubling of them gave."""
        parts = []
        for expert in self.experts:
            total = self.totals(expert["name"])
            if total["energy"] < 1 - 1e-9:
                more = total["energy"] - total["half"]
                enough = total["energy"] >= _ENOUGH or more < _LITTLE
                parts.append(
                    f"{expert['name']} {'yes' if enough else 'no'} ({total['energy']:.0%}, of which the second half of the "
                    f"ranks {more:.0%})"
                )
        return [f"is r enough for the energy? {', '.join(parts)}"] if parts else []

    def _searched(self) -> list[str]:
        best = max(
            self.search, key=lambda row: row["score"], default=None
        )  # the first of equals, as the search takes it
        lines = []
        for row in self.search:
            point = ", ".join(f"{name} {value:.4g}" for name, value in row["point"].items())
            lines.append(f"searched: {point}: {row['score']:.6g}{' (best)' if row is best else ''}")
        return lines

    def table(self) -> str:
        """A short summary for a terminal."""
        counts = f"{len(self.modules)} modules, {len(self.experts)} experts, {len(self.routers)} routers"
        lines = [
            f"{counts} -> {self.output_dir}",
            "",
            f"{'expert':<20} {'preference':<24} {'rank':>5} {'kept':>7} {'energy':>7} {'length':>7}",
        ]
        for expert in self.experts:
            total = self.totals(expert["name"])
            preference = "[" + ", ".join(f"{weight:.3g}" for weight in expert["preference"]) + "]"
            lines.append(
                f"{expert['name']:<20} {preference:<24} {total['rank']:>5.0f} {total['kept']:>7.1%} "
                f"{total['energy']:>7.1%} {total['ratio']:>7.2f}"
            )
        lines += self._is_r_enough()
        for pair in self.pairs:
            first, second = pair["policies"]
            lines.append(f"{first} x {second}: cosine {pair['cosine']:.3f}, signs agree {pair['sign_agreement']:.1%}")
        for name, policy in self.policies.items():
            if policy.captured:
                shares = ", ".join(f"{kind} {share:.1%}" for kind, share in policy.captured.items())
                lines.append(f"captured of {name} besides linear layers (share of the squared change): {shares}")
            if policy.not_captured:
                shares = ", ".join(f"{kind} {share:.1%}" for kind, share in policy.not_captured.items())
                lines.append(f"not captured of {name} (share of the squared change): {shares}")
        lines += self._searched()
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def warn_about_pruning(report: BuildReport, asked: float) -> None:
    """Warn where pruning dropped another share than `asked`, or nearly everything of a module."""
    for name, policy in report.policies.items():
        changed = policy.kind == "full" and policy.in_scope_norm > 0  # else the build says what is wrong
        if changed and abs(policy.dropped - asked) > _OFF_TARGET:
            warnings.warn(
                f"pruning dropped {policy.dropped:.1%} of policy {name!r} instead of {asked:.1%}, because "
                "many of its entries are equal (16-bit checkpoints tie a lot)",
                HoEWarning,
                stacklevel=4,
            )
    low = [
        f"{module} of {expert} ({row.kept:.1%})"
        for module, rows in report.modules.items()
        for expert, row in rows.items()
        if row.kept < _LOW_SHARE
    ]
    if low:
        warnings.warn(
            f"pruning kept less than {_LOW_SHARE:.0%} of {len(low)} modules: {_first(low)}; Pruning(scope='module') "
            "(--prune-scope module) or a smaller share keeps more there",
            HoEWarning,
            stacklevel=4,
        )


def notes_on_solvers(report: BuildReport) -> list[str]:
    """Which decompositions another solver than the one asked for had to make."""
    made = [(module, expert, row.solver) for module, rows in report.modules.items() for expert, row in rows.items()]
    failed = [f"{module} of {expert} ({solver})" for module, expert, solver in made if solver.endswith("failed)")]
    if not failed:
        return []
    return [
        f"a solver failed and another took its place in {len(failed)} of {len(made)} decompositions: {_first(failed)}"
    ]


def _first(items: list[str]) -> str:
    return ", ".join(items[:5]) + (" ..." if len(items) > 5 else "")
