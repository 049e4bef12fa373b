"""One module's experts: prune or merge, truncate, rescale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import HoEConfig
from ..routing import corner
from .architecture import LinearModule
from .build_inputs import BuildInputs
from .lora_policy import LoraPolicy
from .merging import merge
from .options import BuildOptions
from .pruning import drop_below, magnitude_threshold
from .report import ModuleReport
from .rescale import rescale_factor
from .svd import LowRank, keep_factors, reduce_factors, truncated_svd
from .task_vectors import task_vectors


@dataclass(frozen=True)
class _Expert:
    name: str
    weights: list[float]  # the preference, one per policy
    policy: str | None  # the policy of a one-hot expert
    rank: int


class ModuleBuilder:
    """Makes the factors of all experts in one module after the other.

    Args:
        inputs: base and policies.
        options: the settings.
        config: names, preferences and ranks of the experts.
        thresholds: `{policy: t}` where pruning uses one threshold for all modules.
    """

    def __init__(
        self, inputs: BuildInputs, options: BuildOptions, config: HoEConfig, thresholds: Mapping[str, float]
    ) -> None:
        self.inputs, self.options, self.thresholds = inputs, options, thresholds
        names = list(inputs.policies)
        self.experts = []
        self._entries: dict[str, tuple[float, int]] = {}  # policy: entries dropped, entries seen
        for spec in config.experts or []:
            index = corner(spec.preference)
            policy = None if index is None else names[index]
            self.experts.append(_Expert(spec.name, list(spec.preference), policy, spec.r))
        # A LoRA policy's weights are multiplied out only where a merge needs them.
        merged = [expert for expert in self.experts if expert.policy is None]
        self._dense = {
            name: policy
            for i, (name, policy) in enumerate(inputs.policies.items())
            if not isinstance(policy, LoraPolicy) or any(expert.weights[i] > 0 for expert in merged)
        }

    def build(self, target: LinearModule) -> tuple[list[LowRank], dict[str, ModuleReport]]:
        """Factors and report of every expert in one module, in the config's order."""
        deltas = task_vectors(self.inputs.base, self._dense, target)
        norms = {name: float(torch.linalg.vector_norm(delta, dtype=torch.float64)) for name, delta in deltas.items()}
        factors, rows = [], {}
        for expert in self.experts:
            if expert.policy is None:
                factor, row = self._merged(expert, deltas, norms)
            elif isinstance(self.inputs.policies[expert.policy], LoraPolicy):
                factor, row = self._taken(expert, target)
            else:
                factor, row = self._pruned(expert, deltas[expert.policy], norms)
            factors.append(factor)
            rows[expert.name] = row
        return factors, rows

    @property
    def dropped(self) -> dict[str, float]:
        """`{policy: share of its entries that pruning dropped}` over the modules built so far."""
        return {name: lost / seen for name, (lost, seen) in self._entries.items()}

    def _pruned(self, expert: _Expert, delta: Tensor, norms: dict[str, float]) -> tuple[LowRank, ModuleReport]:
        """The expert of a full fine-tune: task-SVD."""
        name = str(expert.policy)
        threshold = self.thresholds.get(name, 0.0)
        if self.options.pruning.share > 0 and self.options.pruning.scope == "module":
            threshold = magnitude_threshold(delta, self.options.pruning.share)
        lost = int((delta.abs() < threshold).sum())
        before = self._entries.get(name, (0, 0))
        self._entries[name] = before[0] + lost, before[1] + delta.numel()
        kept = 1 - lost / delta.numel()
        return self._truncated(expert, drop_below(delta, threshold), kept, norms[name], norms)

    def _merged(
        self, expert: _Expert, deltas: dict[str, Tensor], norms: dict[str, float]
    ) -> tuple[LowRank, ModuleReport]:
        """A multi-objective expert: merge the raw task vectors, then task-SVD without pruning again."""
        used = [i for i, weight in enumerate(expert.weights) if weight > 0]
        names = list(self.inputs.policies)
        raw, weights = [deltas[names[i]] for i in used], [expert.weights[i] for i in used]
        delta = merge(raw, weights, self.options.merging.method, self.options.merging.options)
        norm = float(torch.linalg.vector_norm(delta, dtype=torch.float64))
        return self._truncated(expert, delta, 1.0, norm, norms)

    def _truncated(
        self, expert: _Expert, delta: Tensor, kept: float, norm: float, norms: dict[str, float]
    ) -> tuple[LowRank, ModuleReport]:
        factor = truncated_svd(
            delta,
            expert.rank,
            solver=self.options.svd.solver,
            tolerance=self.options.svd.tolerance,
            seed=self.options.seed,
        )
        shares = {name: weight for name, weight in zip(self.inputs.policies, expert.weights, strict=True) if weight > 0}
        policy_norm = sum(weight * norms[name] for name, weight in shares.items())
        scale = rescale_factor(self.options.rescale, factor.norm, norm, policy_norm)
        return _with_report(factor, scale, kept, norm)

    def _taken(self, expert: _Expert, target: LinearModule) -> tuple[LowRank, ModuleReport]:
        """The expert of a LoRA policy: its own factors, reduced only where a smaller rank was asked for."""
        policy = self.inputs.policies[str(expert.policy)]
        read = policy.factors(target.name) if isinstance(policy, LoraPolicy) else None
        if read is None:
            read = torch.zeros(target.d_out, 0), torch.zeros(0, target.d_in)
        b, a = read
        factor = reduce_factors(b, a, expert.rank) if a.shape[0] > expert.rank else keep_factors(b, a)
        return _with_report(factor, 1.0, 1.0, (factor.norm**2 + factor.residual**2) ** 0.5)


def _with_report(factor: LowRank, scale: float, kept: float, norm: float) -> tuple[LowRank, ModuleReport]:
    scaled = factor.scaled(scale) if scale != 1.0 else factor
    row = ModuleReport(
        rank=factor.rank,
        kept=kept,
        energy=factor.energy,
        residual=factor.residual,
        tau_norm=norm,
        norm=scaled.norm,
        rescale=scale,
        solver=factor.solver,
    )
    return scaled, row
