"""An adapter that gains or loses an expert, a router or an objective: what its configuration becomes.

A change is worked out whole, or refused, before anything of an adapter is touched. Experts and routers that stay keep their
weights and their order; what is added stands behind them. A new objective pads every preference with 0, which changes nothing
on the old face of the simplex (`routing.py`). Routers keep the experts that they vote for.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .config import HoEConfig
from .errors import ExpertError, HoEWarning
from .preference import one_hot, uniform
from .specs import ExpertSpec, RouterSpec, as_spec, check_names


@dataclass(frozen=True)
class Change:
    """From one configuration of an adapter to the next.

    Attributes:
        before: the configuration in use.
        after: the next one, checked; nobody uses it.
        experts: of each expert of `after` its index in `before`, None for a new one.
        routers: likewise.
    """

    before: HoEConfig
    after: HoEConfig
    experts: tuple[int | None, ...]
    routers: tuple[int | None, ...]


def with_expert(config: HoEConfig, expert: Any, ranks: Mapping[str, int]) -> Change:
    """One more expert.

    Args:
        config: of the adapter.
        expert: a preference or `ExpertSpec`.
        ranks: `{module: its rank there}` for every module of the adapter; 0 where it has nothing.

    Raises:
        ExpertError: its name or its preference is taken.
        PreferenceError: its preference is no point of the simplex.
    """
    experts = [*_copies(config.experts), _ranked(expert, ranks)]
    return _change(config, ranks, range(len(experts) - 1), experts=experts)


def without_expert(config: HoEConfig, name: str, modules: Iterable[str]) -> Change:
    """One expert less.

    A module where this expert alone has weights keeps a rank of 1, with a delta of zero, for the first one that is left.

    Args:
        config: of the adapter.
        name: of the expert.
        modules: names of the adapter's modules.

    Raises:
        ExpertError: there is no such expert, it is the only one, or routers vote for it.
    """
    index = _index(config.expert_names, name, "expert")
    voting = [router.name for router in config.routers or [] if name in router.votes_for]
    if voting:
        raise ExpertError(
            f"expert {name!r} cannot be removed, because the routers {voting} vote for it; remove these first, with "
            "remove_router",
            argument="name",
            value=name,
        )
    if len(config.expert_names) == 1:
        raise ExpertError(
            f"expert {name!r} cannot be removed: it is the adapter's only one", argument="name", value=name
        )
    kept = [i for i in range(len(config.expert_names)) if i != index]
    experts = _copies(config.experts)
    return _change(config, dict.fromkeys(modules, 0), kept, experts=[experts[i] for i in kept])


def with_router(config: HoEConfig, router: Any) -> Change:
    """One more router, which is not trained: it votes as the interpolation of the experts does.

    Args:
        config: of the adapter.
        router: a preference or `RouterSpec`.

    Raises:
        ExpertError: its name or its preference is taken, it votes for experts that do not enclose it, or it says that it is
            trained.
        PreferenceError: its preference is no point of the simplex.
    """
    spec = as_spec(router, RouterSpec)
    if spec.trained is not False:
        raise ExpertError(
            f"trained is {spec.trained!r} for a router that is added, which has no weights yet; leave it out, then train the "
            "router, or set its weights and call mark_trained",
            argument="trained",
            value=spec.trained,
            allowed=[False],
        )
    taken = {*config.expert_names, *config.router_names}
    spec.name = spec.name or next(name for i in range(len(taken) + 1) if (name := f"r{i}") not in taken)
    return _change(config, {}, range(len(config.expert_names)), routers=[*_copies(config.routers), spec])


def without_router(config: HoEConfig, name: str) -> Change:
    """One router less.

    Raises:
        ExpertError: there is no such router.
    """
    index = _index(config.router_names, name, "router")
    routers = _copies(config.routers)
    del routers[index]
    return _change(config, {}, range(len(config.expert_names)), routers=routers)


def with_objective(config: HoEConfig, name: str, expert: Any, ranks: Mapping[str, int]) -> Change:
    """One more objective, the last, and an expert for it.

    Args:
        config: of the adapter.
        name: of the objective.
        expert: a preference of the N + 1 objectives or an `ExpertSpec`; None for the new objective alone.
        ranks: as in `with_expert`.

    Raises:
        ExpertError: the name is taken, or the expert's is, or its preference.
        PreferenceError: the expert's preference is no point of the simplex.
    """
    objectives = check_names([*(config.objectives or []), name], "objective")
    n = len(objectives)
    experts, routers = _copies(config.experts), _copies(config.routers)
    for spec in (*experts, *routers):
        spec.preference = [*spec.preference, 0.0]
    default = config.default_preference
    if default is None:  # a call without a preference goes on as before
        default = uniform(n - 1).tolist()
    experts.append(_ranked(one_hot(n - 1, n) if expert is None else expert, ranks))
    return _change(
        config,
        ranks,
        range(len(experts) - 1),
        objectives=objectives,
        experts=experts,
        routers=routers,
        default_preference=[*default, 0.0],
    )


def _ranked(expert: Any, ranks: Mapping[str, int]) -> ExpertSpec:
    spec: ExpertSpec = as_spec(expert, ExpertSpec)
    if spec.r is None:
        spec.r = max(1, *ranks.values())
    return spec


def _copies(specs: list[Any] | None) -> list[Any]:
    return [replace(spec, preference=list(spec.preference)) for spec in specs or []]


def _index(names: list[str], name: Any, kind: str) -> int:
    if name not in names:
        raise ExpertError(
            f"there is no {kind} {name!r}; the {kind}s are {names}", argument="name", value=name, allowed=names
        )
    return names.index(name)


def _change(config: HoEConfig, ranks: Mapping[str, int], kept: Iterable[int], **changed: Any) -> Change:
    """The change to a configuration with other fields.

    Args:
        config: of the adapter.
        ranks: `{module: rank of a new expert}`, for every module where experts change.
        kept: the experts that stay, ascending; a new one stands behind them.
        changed: the fields that are others, `rank_pattern` left aside.
    """
    kept = list(kept)
    wanted = {module: [*(config.ranks(module)[i] for i in kept), rank] for module, rank in ranks.items()}
    new = len(changed.get("experts", kept)) - len(kept)
    patterns: dict[str, list[int]] = {}
    for module, values in wanted.items():
        values = values[: len(kept) + new]
        patterns[module] = values if any(values) else [1, *values[1:]]
    before = {router.name: i for i, router in enumerate(config.routers or [])}
    after = _configured(config, patterns, **changed)
    return Change(
        before=config,
        after=after,
        experts=(*kept, *[None] * new),
        routers=tuple(before.get(name) for name in after.router_names),
    )


def _configured(config: HoEConfig, ranks: Mapping[str, list[int]], **changed: Any) -> HoEConfig:
    """A configuration with other fields, whose modules have these ranks."""
    pattern = dict(config.rank_pattern or {})
    if ranks:
        usual = [spec.r for spec in changed["experts"]]
        pattern = {module: values for module, values in ranks.items() if values != usual}
    if config.calibration is not None:
        warnings.warn(
            "the adapter's calibration was made for other experts and routers, so it is dropped; calibrate again",
            HoEWarning,
            stacklevel=5,
        )
    return replace(config, rank_pattern=pattern, calibration=None, **changed)
