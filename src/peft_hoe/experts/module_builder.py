"""One module's experts: prune or merge, truncate, rescale."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import HoEConfig
from ..routing import corner
from .adapter_config import Declared
from .architecture import LinearModule
from .build_inputs import BuildInputs
from .lora_policy import LoraPolicy
from .merging import METHODS, merge
from .options import BuildOptions
from .pieces import Memory, count_nonzero, frobenius_norm
from .pruning import drop_below, magnitude_threshold
from .report import ModuleReport
from .rescale import rescale_factor
from .svd import LowRank, keep_factors, reduce_factors, truncated_svd
from .task_vectors import TaskVectors


@dataclass(frozen=True)
class _Expert:
    """One expert: its name, its rank, and the weights above 0 that its preference gives to policies."""

    name: str
    rank: int
    shares: dict[str, float]

    @property
    def policy(self) -> str | None:
        """The policy of an expert that is made of one."""
        return next(iter(self.shares)) if len(self.shares) == 1 else None


class ModuleBuilder:
    """Makes the factors of all experts in one module after the other.

    Args:
        inputs: base and policies.
        options: the settings.
        config: names, preferences and ranks of the experts.
        thresholds: `{policy: t}` where pruning uses one threshold for all modules.

    Attributes:
        needed: names of the policies whose task vectors are needed; a LoRA policy's only where a merge takes its entries.
    """

    def __init__(
        self, inputs: BuildInputs, options: BuildOptions, config: HoEConfig, thresholds: Mapping[str, float]
    ) -> None:
        self.inputs, self.options, self.thresholds = inputs, options, thresholds
        specs = zip(config.experts or [], expert_shares(inputs, config), strict=True)
        self._experts = [_Expert(spec.name, spec.r, shares) for spec, shares in specs]
        self._memory = Memory(options.device)
        self._entries: dict[str, list[int]] = {}  # policy: entries dropped, entries seen
        dense = {name for expert in self._experts if not self._by_factors(expert) for name in expert.shares}
        self.needed = [name for name in inputs.policies if name in dense]

    def build(self, target: LinearModule, vectors: TaskVectors) -> tuple[list[LowRank], dict[str, ModuleReport]]:
        """Factors and report of every expert in one module, in the configuration's order.

        Args:
            target: the module.
            vectors: the task vectors there, of the policies in `needed` at least.
        """
        factors, rows = [], {}
        for expert in self._experts:
            if self._by_factors(expert):
                factor, row = self._of_factors(expert, target)
            elif expert.policy is not None:
                factor, row = self._pruned(expert, expert.policy, target, vectors)
            else:
                factor, row = self._merged(expert, target, vectors)
            factors.append(factor)
            rows[expert.name] = row
        return factors, rows

    def take_dropped(self) -> dict[str, list[int]]:
        """`{policy: [entries that pruning dropped, entries]}` of the modules built since the last call."""
        taken, self._entries = self._entries, {}
        return taken

    def _by_factors(self, expert: _Expert) -> bool:
        """Whether an expert is a weighted sum of LoRA policies, exact in their factors, without a weight of full size."""
        lora = all(isinstance(self.inputs.policies[name], LoraPolicy) for name in expert.shares)
        return lora and (expert.policy is not None or METHODS[self.options.merging.of_expert(expert.name).method].sums)

    def _of_factors(self, expert: _Expert, target: LinearModule) -> tuple[LowRank, ModuleReport]:
        """A weighted sum of LoRA policies, reduced only where a smaller rank was asked for; one alone is taken as it is."""
        read = {name: self._factors(name, target) for name in expert.shares}
        total = sum(expert.shares.values())
        b = torch.cat([factors[0] * (expert.shares[name] / total) for name, factors in read.items()], dim=1)
        a = torch.cat([factors[1] for factors in read.values()])
        rank = self._rank(expert, target)
        factor = reduce_factors(b, a, rank) if len(a) > rank else keep_factors(b, a)
        norm = math.hypot(factor.norm, factor.residual)
        scale = 1.0
        if expert.policy is None:
            norms = {name: keep_factors(*factors).norm for name, factors in read.items()}
            scale = self._scale(expert, factor, norm, norms)
        return _with_report(factor, scale, 1.0, norm)

    def _factors(self, name: str, target: LinearModule) -> tuple[Tensor, Tensor]:
        """B and A of a LoRA policy; of rank 0 where it leaves the module alone."""
        policy = self.inputs.policies[name]
        read = policy.factors(target.name) if isinstance(policy, LoraPolicy) else None
        b, a = read or (torch.zeros(target.d_out, 0), torch.zeros(0, target.d_in))
        return b.to(self.options.device), a.to(self.options.device)

    def _pruned(
        self, expert: _Expert, policy: str, target: LinearModule, vectors: TaskVectors
    ) -> tuple[LowRank, ModuleReport]:
        """The expert of a full fine-tune: task-SVD. What is apart is not pruned: few of its rows change at all."""
        delta, pruning = vectors.deltas[policy], self.options.pruning
        threshold = 0.0 if target.apart else self.thresholds.get(policy, 0.0)
        if pruning.share > 0 and pruning.scope == "module" and not target.apart:
            threshold = magnitude_threshold(delta, pruning.share)
        pruned = drop_below(delta, threshold, out=self._memory.take("pruned", *delta.shape))
        kept = count_nonzero(pruned) if threshold > 0 else delta.numel()  # what stays is at least the threshold
        if not target.apart:
            self._entries[policy] = [delta.numel() - kept, delta.numel()]
        factor = self._truncated(pruned, self._rank(expert, target))
        norm = vectors.norms[policy]
        return _with_report(factor, self._scale(expert, factor, norm, vectors.norms), kept / delta.numel(), norm)

    def _merged(self, expert: _Expert, target: LinearModule, vectors: TaskVectors) -> tuple[LowRank, ModuleReport]:
        """A multi-objective expert: merge the raw task vectors, then task-SVD without pruning again."""
        raw, weights = [vectors.deltas[name] for name in expert.shares], list(expert.shares.values())
        seeds = [_seed(self.options.seed, target.name, name) for name in expert.shares]
        merging = self.options.merging.of_expert(expert.name)
        delta = merge(raw, weights, merging.method, merging.options, seeds)
        factor, norm = self._truncated(delta, self._rank(expert, target)), frobenius_norm(delta)
        return _with_report(factor, self._scale(expert, factor, norm, vectors.norms), 1.0, norm)

    def _truncated(self, delta: Tensor, rank: int) -> LowRank:
        svd = self.options.svd
        return truncated_svd(
            delta,
            rank,
            share=self.options.r.energy,
            solver=svd.solver,
            tolerance=svd.tolerance,
            seed=self.options.seed,
        )

    def _rank(self, expert: _Expert, target: LinearModule) -> int:
        return self.options.r.in_module(target.name, expert.rank)

    def _scale(self, expert: _Expert, factor: LowRank, norm: float, norms: Mapping[str, float]) -> float:
        """The factor that gives an expert its length back; `norms` are those of the policies' task vectors."""
        policy_norm = sum(weight * norms[name] for name, weight in expert.shares.items())
        return rescale_factor(self.options.rescale, factor.norm, norm, policy_norm)


def _seed(seed: int, module: str, policy: str) -> int:
    """A seed of its own for each module and policy, the same in whatever order and company they are built."""
    return int.from_bytes(hashlib.sha256(f"{seed} {module} {policy}".encode()).digest()[:8], "little") >> 1


def expert_shares(inputs: Declared, config: HoEConfig) -> list[dict[str, float]]:
    """For each expert the weights above 0 of the policies that it is made of: its own alone, or those of its preference."""
    own = set(inputs.policies) - set(inputs.objectives)
    return [
        {spec.name: 1.0} if spec.name in own else _shares(inputs.objectives, spec.preference)
        for spec in config.experts or []
    ]


def _shares(names: list[str], preference: list[float]) -> dict[str, float]:
    """The weights above 0 by policy; of a preference for one policy alone, that one."""
    served = corner(preference)
    if served is not None:
        return {names[served]: 1.0}
    return {name: weight for name, weight in zip(names, preference, strict=True) if weight > 0}


def _with_report(factor: LowRank, scale: float, kept: float, norm: float) -> tuple[LowRank, ModuleReport]:
    scaled = factor.scaled(scale) if scale != 1.0 else factor
    row = ModuleReport(
        rank=factor.rank,
        kept=kept,
        energy=factor.energy,
        half_energy=factor.half_energy,
        residual=factor.residual,
        tau_norm=norm,
        norm=scaled.norm,
        rescale=scale,
        solver=factor.solver,
    )
    return scaled, row
