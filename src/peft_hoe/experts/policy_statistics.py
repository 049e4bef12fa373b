"""The first passes over all weights: pruning thresholds, agreement of the policies, what experts cannot hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from .architecture import FUSED, HEAD
from .build_inputs import BuildInputs
from .lora_policy import LoraPolicy
from .model_weights import ModelWeights
from .options import Pruning
from .out_of_scope import change_out_of_scope
from .pruning import ThresholdSearch
from .report import PolicyReport
from .task_heads import heads_agree
from .task_vectors import Agreement, task_vectors


@dataclass(frozen=True)
class PolicyStatistics:
    """What is known of the policies before the first expert is made.

    Attributes:
        thresholds: `{policy: t}` of the policies pruned with one threshold; entries below it are dropped.
        reports: one for each policy; `dropped` is filled in later where thresholds are per module.
        pairs: agreement of every pair of policies.
        notes: what is probably not as it was meant: policies that changed nothing, or the same; fused experts.
    """

    thresholds: dict[str, float]
    reports: dict[str, PolicyReport]
    pairs: list[dict[str, Any]]
    notes: list[str]


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
    captured = heads_agree(inputs)
    reports = {name: _policy_report(name, inputs, agreement.squared[name], captured) for name in inputs.policies}
    for name, search in searches.items():
        reports[name].prune_threshold, reports[name].dropped = search.threshold, search.dropped
    notes = [*_notes_on_changes(agreement), *_notes_on_fused_experts(inputs, reports)]
    if not captured:
        notes.append(
            f"the policies have different heads {sorted(inputs.architecture.heads)}; the adapter has the base's"
        )
    return PolicyStatistics(thresholds, reports, agreement.pairs(), notes)


def _notes_on_changes(agreement: Agreement) -> list[str]:
    unchanged = [name for name, squared in agreement.squared.items() if squared == 0]
    return [
        *(
            f"policy {name!r} equals the base in every weight in scope, so its expert is empty; is it the base itself?"
            for name in unchanged
        ),
        *(
            f"policies {first!r} and {second!r} changed the base in exactly the same way, so their experts are the same; is "
            "one model given under two names?"
            for first, second in agreement.equal()
            if first not in unchanged
        ),
    ]


def _notes_on_fused_experts(inputs: BuildInputs, reports: dict[str, PolicyReport]) -> list[str]:
    """What is lost where an architecture keeps all experts of a layer in one tensor, which is no linear layer."""
    shares = {name: report.not_captured.get(FUSED, 0.0) for name, report in reports.items()}
    if not any(shares.values()):
        return []
    fused = [name for name, kind in inputs.architecture.kinds.items() if kind == FUSED]
    which = f"{len(fused)} fused expert tensors, such as {fused[0]!r}," if fused else "fused expert tensors"
    lost = ", ".join(f"{share:.1%} of {name!r}" for name, share in shares.items() if share)
    return [
        f"{which} get no expert, because experts live in linear layers; they hold {lost} (share of the squared change)"
    ]


def _policy_report(name: str, inputs: BuildInputs, in_scope: float, heads_captured: bool) -> PolicyReport:
    """Of the policy `name`, whose squared norm in scope is known."""
    policy = inputs.policies[name]
    if isinstance(policy, LoraPolicy) or inputs.base is None:
        return PolicyReport(source=inputs.given[name], kind="lora", in_scope_norm=in_scope**0.5)
    change = change_out_of_scope(inputs.base, policy, inputs.architecture)
    in_heads = change.squared.pop(HEAD, 0.0) if heads_captured else 0.0
    total = in_scope + in_heads + sum(change.squared.values())
    return PolicyReport(
        source=inputs.given[name],
        kind="full",
        in_scope_norm=in_scope**0.5,
        not_captured={kind: squared / total if total else 0.0 for kind, squared in sorted(change.squared.items())},
        notes=change.notes,
    )
