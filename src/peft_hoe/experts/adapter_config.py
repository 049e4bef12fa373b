"""Which experts and routers the adapter of a build has, and at what ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from ..config import HoEConfig
from ..errors import ExpertError
from ..preference import FloatArray, one_hot, parse_preference, uniform
from ..resolution import resolve_experts
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
    def objectives(self) -> list[str]:
        """The N names."""

    @property
    def policies(self) -> Mapping[str, Any]:
        """By objective, then those of single experts by the expert's name; a LoRA policy has a rank."""


def adapter_config(
    inputs: Declared,
    options: BuildOptions,
    experts: Sequence[ExpertSpec],
    routers: Sequence[Any] | None,
    **fields: Any,
) -> HoEConfig:
    """The configuration of the adapter to build; its target modules and rank pattern are filled in as it is built.

    Args:
        inputs: base and policies.
        options: the settings.
        experts: what `expert_specs` gives.
        routers: preferences or `RouterSpec`.
        fields: of `HoEConfig`, as they are.

    Raises:
        ExpertError: experts or routers that contradict each other.
        PreferenceError: a preference is not a point of the simplex.
    """
    options.merging.check_experts([str(spec.name) for spec in experts if _is_merge(spec, inputs.objectives)])
    return HoEConfig(
        objectives=inputs.objectives,
        experts=_ranked(experts, inputs, options.r.rank),
        routers=list(routers or []),
        r=_rank([inputs.policies[name] for name in inputs.objectives], inputs, options.r.rank),
        task_type=inputs.architecture.task_type,
        inference_mode=True,
        interpolation=options.interpolation,
        **fields,
    )


def expert_specs(experts: Sequence[Any] | None, objectives: Sequence[str]) -> list[ExpertSpec]:
    """One expert for each objective, then the multi-objective ones, all named; a rank may be missing.

    Args:
        experts: besides one for each objective; one at a corner replaces that. Default: the centroid.
        objectives: the N names.

    Raises:
        ExpertError: experts that contradict each other, or one at a corner with a policy of its own.
        PreferenceError: a preference is not a point of the simplex.
    """
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
        elif spec.policy is not None:
            raise ExpertError(
                f"the expert of {objectives[index]!r} alone has a policy of its own, {spec.policy!r}; give that as the policy "
                "of the objective",
                argument="experts",
                value=spec.policy,
            )
        else:
            corners[index] = spec
    specs = [*corners, *others]
    names = resolve_experts([replace(spec, policy=None) for spec in specs], objectives, 1)
    for spec, named in zip(specs, names, strict=True):
        spec.name = named.name
        if spec.policy is not None and spec.name in objectives:
            raise ExpertError(
                f"the expert at {named.preference} has a policy of its own and the name of an objective, {spec.name!r}; name "
                "it otherwise",
                argument="experts",
                value=spec.name,
            )
    return specs


def _is_merge(spec: ExpertSpec, objectives: Sequence[str]) -> bool:
    return spec.policy is None and corner(parse_preference(spec.preference, objectives)) is None


def _ranked(specs: Sequence[ExpertSpec], inputs: Declared, r: int | str) -> list[ExpertSpec]:
    """The same experts with ranks, without their policies."""
    ranked = []
    for spec in specs:
        point: FloatArray = parse_preference(spec.preference, inputs.objectives)
        used = [inputs.policies[name] for name, weight in zip(inputs.objectives, point, strict=True) if weight > 0]
        if spec.name in inputs.policies and spec.policy is not None:
            used = [inputs.policies[str(spec.name)]]
        ranked.append(replace(spec, r=_rank(used, inputs, r) if spec.r is None else spec.r, policy=None))
    return ranked


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
