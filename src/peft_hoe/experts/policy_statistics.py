"""What is measured of the policies: pruning thresholds, their agreement, what experts cannot hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .agreement import Agreement
from .architecture import CAPTURED, FUSED, HEAD, LinearModule
from .build_inputs import BuildInputs
from .model_weights import ModelWeights
from .module_work import Searches
from .option_groups import Pruning
from .out_of_scope import ComparisonOutOfScope
from .parentage import parentage_notes, sampled_rows
from .pruning import GUESSED, ThresholdSearch
from .report import PolicyReport
from .task_heads import heads_agree

_GUESSED_OF_FEW = 64  # buckets of the histogram: right to a quarter of the threshold
_PEEKED, _PEEKED_ROWS = 32, 16  # modules, and rows of each


@dataclass(frozen=True)
class PolicyStatistics:
    """What is known of the policies when all task vectors have been seen.

    Attributes:
        reports: one for each policy.
        pairs: agreement of every pair of policies.
        notes: what is probably not as it was meant: policies that changed nothing, or the same; fused experts.
    """

    reports: dict[str, PolicyReport]
    pairs: list[dict[str, Any]]
    notes: list[str]


class PolicyMeasurement:
    """Gathers what is measured of one module after the other.

    Where policies are pruned by one threshold for all weights, the thresholds must be known before the first expert is made,
    and the measurement is a pass of its own, or two; otherwise it goes along with the making.

    Args:
        inputs: base and policies.
        pruning: what is to be dropped.
        state: of an earlier measurement, to go on from.

    Attributes:
        goes_first: whether all modules must be seen before the first expert is made.
        counted: how many modules were seen in the present pass.
        inside: whether the present pass is the second.
        again: the policies that need a second pass, known when the first has ended.
    """

    def __init__(self, inputs: BuildInputs, pruning: Pruning, state: dict[str, Any] | None = None) -> None:
        self.inputs = inputs
        pruned = {name: policy for name, policy in inputs.policies.items() if isinstance(policy, ModelWeights)}
        self.goes_first = bool(pruned) and pruning.share > 0 and pruning.scope == "global"
        self.counted, self.inside = 0, False
        self.again: list[str] = []
        self._comparisons: list[dict[str, Any]] = []
        self._searches: Searches = {}
        base = inputs.base
        self._outside = (
            {}
            if base is None
            else {name: ComparisonOutOfScope(base, policy, inputs.architecture) for name, policy in pruned.items()}
        )
        if state is not None and self.goes_first:
            self.counted, self.inside, self._comparisons = state["counted"], state["inside"], state["comparisons"]
            self.again = state["again"]
            self._searches = {name: ThresholdSearch.from_state(found) for name, found in state["searches"].items()}
            return
        if self.goes_first:
            buckets = _GUESSED_OF_FEW if inputs.shards else GUESSED
            samples = {name: _sample(inputs, policy) for name, policy in pruned.items()}
            self._searches = {name: ThresholdSearch(pruning.share, sample, buckets) for name, sample in samples.items()}

    def state(self) -> dict[str, Any]:
        """All that was measured, to go on from in another process."""
        return {
            "counted": self.counted, "inside": self.inside, "comparisons": self._comparisons, "again": self.again,
            "searches": {name: search.state() for name, search in self._searches.items()},
        }  # fmt: skip

    def compare_what_is_here(self) -> None:
        """Compare what experts cannot hold, as far as it can be read without fetching a file."""
        for comparison in self._outside.values():
            comparison.compare_what_is_here()

    def empty_searches(self) -> Searches:
        """Searches that have counted nothing in the present pass, for some modules; then `add_counted`."""
        names = self.again if self.inside else list(self._searches)
        return {name: self._searches[name].empty() for name in names}

    def add_counted(self, modules: int, comparisons: list[dict[str, Any]], searches: Searches) -> None:
        """Add what was counted of the next modules."""
        for comparison in comparisons:
            self.add(comparison)
        for name, search in searches.items():
            self._searches[name].add(search)
        self.counted += modules

    def add(self, comparison: dict[str, Any]) -> None:
        """Add one module's comparison."""
        self._comparisons.append(comparison)

    def end_pass(self) -> bool:
        """To be called when a pass has seen all modules; whether another is needed."""
        if self.inside:
            return False
        self.again = [name for name, search in self._searches.items() if search.narrow()]
        self.counted, self.inside = 0, True
        return bool(self.again)

    @property
    def thresholds(self) -> dict[str, float]:
        """`{policy: t}` of the policies pruned with one threshold; entries below it are dropped."""
        return {name: search.threshold for name, search in self._searches.items()}

    def finish(self, dropped: dict[str, float]) -> PolicyStatistics:
        """The result, with the shares of entries that were dropped where thresholds are per module."""
        agreement, captured = Agreement(), heads_agree(self.inputs)
        for comparison in self._comparisons:
            agreement.add(comparison)
        squared = agreement.squared
        reports = {
            name: _policy_report(name, self.inputs, squared[name], captured, self._outside.get(name))
            for name in self.inputs.policies
        }
        for name, share in dropped.items():
            reports[name].dropped = share
        for name, search in self._searches.items():
            reports[name].prune_threshold, reports[name].dropped = search.threshold, search.dropped
        notes = [*_notes_on_changes(agreement), *_notes_on_fused_experts(self.inputs, reports)]
        notes += parentage_notes(self.inputs, agreement.pairs())
        if not captured:
            heads = sorted(self.inputs.architecture.heads)
            notes.append(f"the policies have different heads {heads}; the adapter has the base's")
        return PolicyStatistics(reports, agreement.pairs(), notes)


def _sample(inputs: BuildInputs, policy: ModelWeights) -> torch.Tensor:
    """Entries `(n,)` of a task vector, some rows of every module; of fewer modules where files are to be fetched."""
    if inputs.base is None:
        return torch.empty(0)
    targets = inputs.architecture.linear
    if inputs.shards:
        seen = _peeked(inputs.base, policy, targets)
        if seen is not None:
            return seen
        targets = targets[
            : len(inputs.runs(range(len(targets)))[0])
        ]  # those of the first files, which stay for the pass
    return torch.cat(
        [
            (after.float() - before.float()).reshape(-1)
            for target in targets
            for before, after in sampled_rows(inputs.base, policy, target)
        ]
    )


def _peeked(base: ModelWeights, policy: ModelWeights, targets: Sequence[LinearModule]) -> torch.Tensor | None:
    """Entries of some modules, of which nothing but these rows is fetched; None where that cannot be done."""
    entries = []
    for target in targets[:: -(-len(targets) // _PEEKED)]:
        start = target.shape[0] // 2
        rows = [weights.peek(target.weight, start, start + _PEEKED_ROWS) for weights in (base, policy)]
        if rows[0] is None or rows[1] is None:
            return None
        entries.append((rows[1].float() - rows[0].float()).reshape(-1))
    return torch.cat(entries)


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


def _policy_report(
    name: str, inputs: BuildInputs, in_scope: float, heads_captured: bool, outside: ComparisonOutOfScope | None
) -> PolicyReport:
    """Of the policy `name`, whose squared norm in scope is known."""
    if outside is None:
        return PolicyReport(source=inputs.given[name], kind="lora", in_scope_norm=in_scope**0.5)
    change = outside.finish()
    in_heads = change.squared.pop(HEAD, 0.0) if heads_captured else 0.0
    total = in_scope + in_heads + sum(change.squared.values())
    shares = {kind: squared / total if total else 0.0 for kind, squared in sorted(change.squared.items())}
    return PolicyReport(
        source=inputs.given[name],
        kind="full",
        in_scope_norm=in_scope**0.5,
        captured={kind.removeprefix(CAPTURED): share for kind, share in shares.items() if kind.startswith(CAPTURED)},
        not_captured={kind: share for kind, share in shares.items() if not kind.startswith(CAPTURED)},
        notes=change.notes,
    )
