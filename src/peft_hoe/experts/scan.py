"""The first passes over all weights: pruning thresholds, agreement of the policies, what experts cannot hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from ..errors import CheckpointError
from .lora_policy import LoraPolicy
from .options import BuildOptions
from .pruning import ThresholdSearch
from .report import PolicyReport
from .sources import Sources
from .task_vectors import Agreement, Weights, outside_scope, task_vectors


@dataclass
class Scan:
    """What is known before the first expert is made.

    Attributes:
        thresholds: `{policy: t}` of the policies pruned with one threshold.
        policies: their reports; `dropped` is filled by the build where thresholds are per module.
        pairs: agreement of every pair of policies.
        notes: for the report.
    """

    thresholds: dict[str, float]
    policies: dict[str, PolicyReport]
    pairs: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)

    def check_any(self, modules: Sequence[str]) -> None:
        """Refuse policies that changed nothing in scope.

        Raises:
            CheckpointError: no module has a task vector.
        """
        if not modules:
            raise CheckpointError(
                f"policies {list(self.policies)} equal the base in every weight in scope; nothing can be built"
            )


def scan_policies(sources: Sources, options: BuildOptions, bar: tqdm[Any]) -> Scan:
    """Read all task vectors once, or twice where a threshold over all weights is wanted."""
    targets = sources.architecture.targets
    full = {name: policy for name, policy in sources.policies.items() if isinstance(policy, Weights)}
    searched = full if options.prune > 0 and options.prune_scope == "global" else {}
    searches = {name: ThresholdSearch(options.prune) for name in searched}
    bar.reset(total=len(targets) * (3 if searches else 2))
    agreement = Agreement()
    for target in targets:
        deltas = task_vectors(sources.base, sources.policies, target)
        agreement.add(deltas)
        for name, search in searches.items():
            search.count(deltas[name])
        bar.update()
    for search in searches.values():
        search.narrow()
    for target in targets if searches else []:
        for name, delta in task_vectors(sources.base, searched, target).items():
            searches[name].count_inside(delta)
        bar.update()
    thresholds = {name: search.threshold for name, search in searches.items()}
    reports = {name: _policy_report(name, sources, agreement.squared[name]) for name in sources.policies}
    for name, search in searches.items():
        reports[name].prune_threshold, reports[name].dropped = search.threshold, search.dropped
    return Scan(thresholds, reports, agreement.pairs())


def _policy_report(name: str, sources: Sources, in_scope: float) -> PolicyReport:
    policy = sources.policies[name]
    if isinstance(policy, LoraPolicy) or sources.base is None:
        return PolicyReport(source="", kind="lora", in_scope_norm=in_scope**0.5)
    outside = outside_scope(sources.base, policy, sources.architecture)
    total = in_scope + sum(outside.squared.values())
    return PolicyReport(
        source="",
        kind="full",
        in_scope_norm=in_scope**0.5,
        not_captured={kind: squared / total if total else 0.0 for kind, squared in sorted(outside.squared.items())},
        notes=outside.notes,
    )
