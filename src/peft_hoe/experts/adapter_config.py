"""Which experts and routers the adapter of a build has, and at what ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ..config import HoEConfig
from ..preference import FloatArray, one_hot, parse_preference, uniform
from ..routing import corner
from ..specs import ExpertSpec, as_spec
from .architecture import Architecture
from .options import DEFAULT_RANK, BuildOptions


class Declared(Protocol):
    """What must be known of base and policies: `BuildInputs`, or what stands for it where nothing is opened."""

    @property
    def architecture(self) -> Architecture:
        """Of the base."""

    @property
    def policies(self) -> Mapping[str, Any]:
        """By objective; a LoRA policy has a rank."""


def adapter_config(
    inputs: Declared,
    options: BuildOptions,
    experts: Sequence[Any] | None,
    routers: Sequence[Any] | None,
    **fields: Any,
) -> HoEConfig:
    """The configuration of the adapter to build; its target modules and rank pattern are filled in as it is built.

    Args:
        inputs: base and policies.
        options: the settings.
        experts: besides one expert for each policy; one at a corner replaces that of the policy. Default: the centroid.
        routers: preferences or `RouterSpec`.
        fields: of `HoEConfig`, as they are.

    Raises:
        ExpertError: experts or routers that contradict each other.
        PreferenceError: a preference is not a point of the simplex.
    """
    objectives = list(inputs.policies)
    return HoEConfig(
        objectives=objectives,
        experts=_expert_specs(experts, inputs, options.r),
        routers=list(routers or []),
        r=_rank(list(inputs.policies.values()), inputs, options.r),
        task_type=inputs.architecture.task_type,
        inference_mode=True,
        interpolation=options.interpolation,
        **fields,
    )


def _expert_specs(experts: Sequence[Any] | None, inputs: Declared, r: int | str) -> list[ExpertSpec]:
    """One expert per policy, then the multi-objective ones, each with its rank."""
    objectives = list(inputs.policies)
    n = len(objectives)
    if experts is None:
        experts = [uniform(n)] if n > 1 else []
    corners = [ExpertSpec(one_hot(i, n)) for i in range(n)]
    others = []
    for item in experts:
        spec: ExpertSpec = as_spec(item, ExpertSpec)
        index = corner(parse_preference(spec.preference, objectives))
        if index is None:
            others.append(spec)
        else:
            corners[index] = spec
    for spec in (*corners, *others):
        if spec.r is None:
            point: FloatArray = parse_preference(spec.preference, objectives)
            used = [policy for policy, weight in zip(inputs.policies.values(), point, strict=True) if weight > 0]
            spec.r = _rank(used, inputs, r)
    return [*corners, *others]


def _rank(used: Sequence[Any], inputs: Declared, r: int | str) -> int:
    """The rank of an expert that is made from these policies and states none."""
    if isinstance(r, int):
        return r
    own = [policy.rank for policy in used if hasattr(policy, "rank")]  # LoRA policies have one
    if len(used) == 1 and own:
        return own[0]
    if r == "full":
        return max(min(target.shape) for target in inputs.architecture.targets)
    return max(DEFAULT_RANK, *own) if own else DEFAULT_RANK
