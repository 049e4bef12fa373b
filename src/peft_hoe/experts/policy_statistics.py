"""The first passes over all weights: pruning thresholds, agreement of the policies, what experts cannot hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from .build_inputs import BuildInputs
from .lora_policy import LoraPolicy
from .model_weights import ModelWeights
from .options import Pruning
from .out_of_scope import change_out_of_scope
from .pruning import ThresholdSearch
from .report import PolicyReport
from .task_vectors import Agreement, task_vectors


@dataclass(frozen=True)
class PolicyStatistics:
    """What is known of the policies before the first expert is made.

    Attributes:
        thresholds: `{policy: t}` of the policies pruned with one threshold; entries below it are dropped.
        reports: one for each policy; `dropped` is filled in later where thresholds are per module.
        pairs: agreement of every pair of policies.
    """

    thresholds: dict[str, float]
    reports: dict[str, PolicyReport]
    pairs: list[dict[str, Any]]


def measure_policies(inputs: BuildInputs, pruning: Pruning, bar: tqdm[Any]) -> PolicyStatistics:
    """Read all task vectors once, or twice where a threshold over all weights is wanted."""
    targets = inputs.architecture.targets
    full = {name: policy for name, policy in inputs.policies.items() if isinstance(policy, ModelWeights)}
    searched = full if pruning.share > 0 and pruning.scope == "global" else {}
    searches = {name: ThresholdSearch(pruning.share) for name in searched}
    bar.reset(total=len(targets) * (3 if searches else 2))
    agreement = Agreement()
    for target in targets:
        deltas = task_vectors(inputs.base, inputs.policies, target)
        agreement.add(deltas)
        for name, search in searches.items():
            search.count(deltas[name])
        bar.update()
    for search in searches.values():
        search.narrow()
    for target in targets if searches else []:
        for name, delta in task_vectors(inputs.base, searched, target).items():
            searches[name].count_inside(delta)
        bar.update()
    thresholds = {name: search.threshold for name, search in searches.items()}
    reports = {name: _policy_report(name, inputs, agreement.squared[name]) for name in inputs.policies}
    for name, search in searches.items():
        reports[name].prune_threshold, reports[name].dropped = search.threshold, search.dropped
    return PolicyStatistics(thresholds, reports, agreement.pairs())


def _policy_report(name: str, inputs: BuildInputs, in_scope: float) -> PolicyReport:
    """Of the policy `name`, whose squared norm in scope is known."""
    policy = inputs.policies[name]
    if isinstance(policy, LoraPolicy) or inputs.base is None:
        return PolicyReport(source=inputs.given[name], kind="lora", in_scope_norm=in_scope**0.5)
    change = change_out_of_scope(inputs.base, policy, inputs.architecture)
    total = in_scope + sum(change.squared.values())
    return PolicyReport(
        source=inputs.given[name],
        kind="full",
        in_scope_norm=in_scope**0.5,
        not_captured={kind: squared / total if total else 0.0 for kind, squared in sorted(change.squared.items())},
        notes=change.notes,
    )
