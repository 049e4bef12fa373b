"""From what a user writes about experts and routers to what a configuration holds: everything named, numbered and checked."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .errors import CheckpointError, ExpertError, PreferenceError, check_choice
from .preference import FloatArray, one_hot, parse_preference, uniform
from .routing import HULL, Subdivision, check_apart, in_hull, point_code, voting_set
from .specs import KINDS, ExpertSpec, RouterSpec, as_spec, check_names, checked_flag, checked_rank

# What a configuration may ask for: it may be a stranger's, and everything here costs time before any weight is read.
MOST = 1024  # objectives, experts or routers
MOST_VOTES = 2**22  # votes of all routers times experts


def check_count(given: Any, what: str) -> None:
    """See that there are not more objectives, experts or routers than can be handled.

    Raises:
        ExpertError: there are.
    """
    most = MOST + (what == "experts")  # the corners of all objectives, and the centroid
    if len(given) > most:
        raise ExpertError(
            f"there are {len(given)} {what}; at most {most} are supported",
            argument=what,
            value=len(given),
            allowed=most,
        )


def resolve_experts(given: Any, objectives: Sequence[str], r: int) -> list[ExpertSpec]:
    """L experts with preferences, names and ranks; None stands for the one-hot experts and the centroid.

    Raises:
        ExpertError: there are none, two share a name or a preference, or a rank is no rank.
        PreferenceError: a preference is none.
    """
    if given is not None and len(_listed(given, "experts")) == 0:
        raise ExpertError(
            "experts is empty; leave it out for the one-hot experts and the centroid", argument="experts", value=given
        )
    check_count(() if given is None else given, "experts")
    experts = [as_spec(item, ExpertSpec) for item in (_default_experts(len(objectives)) if given is None else given)]
    for index, expert in enumerate(experts):
        if expert.policy is not None:
            raise ExpertError(
                f"expert {index} names the policy {expert.policy!r}, which only build_adapter and `peft-hoe add-expert` read; "
                "build the adapter with it, or give the expert's weights",
                argument="policy",
                value=expert.policy,
            )
        expert.preference = _point(expert.preference, objectives, f"expert {index}")
        expert.name = expert.name or _expert_name(expert.preference, index, objectives)
        expert.r = checked_rank(r if expert.r is None else expert.r, f"the rank of expert {expert.name!r}")
    check_apart(stacked(experts, len(objectives)), [str(expert.name) for expert in experts], "expert")
    check_names(
        [expert.name for expert in experts], "expert"
    )  # after the places: two at one place have one name by default
    return experts


def resolve_routers(given: Any, objectives: Sequence[str], experts: Sequence[ExpertSpec]) -> list[RouterSpec]:
    """R routers with preferences, names, and the experts that they vote for.

    Raises:
        ExpertError: two share a name or a preference, or a router votes for experts that do not enclose it.
        PreferenceError: a preference is none.
    """
    given = () if given is None else _listed(given, "routers")
    check_count(given, "routers")
    routers = [as_spec(item, RouterSpec) for item in given]
    for index, router in enumerate(routers):
        router.preference = _point(router.preference, objectives, f"router {index}")
        router.name = router.name or f"r{index}"
        check_choice(f"kind of router {router.name!r}", router.kind, KINDS, ExpertError)
        router.trained = checked_flag(router.trained, f"trained of router {router.name!r}")
    names = [str(expert.name) for expert in experts]
    check_names([*names, *(router.name for router in routers)], "expert or router")
    check_apart(stacked(routers, len(objectives)), [str(router.name) for router in routers], "router")
    _check_votes(routers, names, len(objectives))
    cells = Subdivision(stacked(experts, len(objectives)))
    for router in routers:
        router.votes_for = _voting_names(router, names, cells)
    return routers


def resolve_ranks(given: Any, experts: Sequence[ExpertSpec]) -> dict[str, list[int]]:
    """`{module: one rank per expert}`.

    Raises:
        ExpertError: names the module and what is wrong with its ranks.
    """
    if given is not None and not isinstance(given, Mapping):
        raise ExpertError(
            f"rank_pattern is {given!r}; give {{module: rank, or one rank per expert}}",
            argument="rank_pattern",
            value=given,
        )
    return {key: _ranks(value, f"rank_pattern[{key!r}]", experts) for key, value in (given or {}).items()}


def check_layers(target_modules: Any, layers_to_transform: Any, layers_pattern: Any) -> None:
    """See that a choice of layers can be read, as PEFT's LoRA asks.

    Raises:
        ExpertError: it contradicts `target_modules`, or names no list of layers.
    """
    if isinstance(target_modules, str) and layers_to_transform is not None:
        raise ExpertError(
            "`layers_to_transform` cannot be used when `target_modules` is a str.", argument="layers_to_transform"
        )
    if isinstance(target_modules, str) and layers_pattern is not None:
        raise ExpertError("`layers_pattern` cannot be used when `target_modules` is a str.", argument="layers_pattern")
    if layers_pattern and layers_to_transform is None:
        raise ExpertError(
            "When `layers_pattern` is specified, `layers_to_transform` must also be specified.",
            argument="layers_pattern",
        )
    for name in [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern or []:
        if not re.fullmatch(r"[\w.-]*", name):
            raise ExpertError(
                f"layers_pattern is {name!r}; give the name of a list of layers, such as 'layers' or 'h'",
                argument="layers_pattern",
                value=name,
            )


def fingerprint(experts: Sequence[ExpertSpec], routers: Sequence[RouterSpec], rank_pattern: Mapping[str, Any]) -> str:
    """A hash of what says which numbers of A, B and the routers' tensors are whose, of resolved specs.

    Shapes do not tell experts in another order apart. Names may change.
    """
    names = [expert.name for expert in experts]
    held = {
        "experts": [(point_code(np.asarray(expert.preference)), expert.r) for expert in experts],
        "routers": [
            (point_code(np.asarray(router.preference)), [names.index(name) for name in router.votes_for])
            for router in routers
        ],
        "rank_pattern": sorted(rank_pattern.items()),  # JSON files sort it, too
    }
    return hashlib.sha256(json.dumps(held).encode()).hexdigest()[:16]


def check_fingerprint(given: Any, expected: str) -> None:
    """Refuse a configuration file whose experts and routers are not those of the tensors that were saved with it.

    Raises:
        CheckpointError: they have another fingerprint.
    """
    if given != expected:
        raise CheckpointError(
            f"adapter_config.json has the fingerprint {given!r}, but its experts, ranks and routers have {expected!r}: they "
            "were changed or put in another order after the adapter was saved, and its tensors hold those of before. Take the "
            "adapter_config.json that was saved with the weights; names, marks, the temperature and the default preference "
            "may be edited, nothing else of them",
            value=given,
            allowed=expected,
        )


def stacked(specs: Sequence[ExpertSpec] | Sequence[RouterSpec], n: int) -> FloatArray:
    """The preferences of K specs, `(K, n)`."""
    return np.asarray([spec.preference for spec in specs], dtype=np.float64).reshape(len(specs), n)


def _listed(given: Any, argument: str) -> Any:
    if isinstance(given, (str, bytes, Mapping)) or not hasattr(given, "__len__"):
        raise ExpertError(
            f"{argument} is {given!r}; give a list of preferences or specs", argument=argument, value=given
        )
    return given


def _default_experts(n: int) -> list[FloatArray]:
    corners = [one_hot(i, n) for i in range(n)]
    return corners if n == 1 else [*corners, uniform(n)]


def _point(preference: Any, objectives: Sequence[str], what: str) -> list[float]:
    try:
        point: list[float] = parse_preference(preference, objectives).tolist()
    except PreferenceError as error:
        raise PreferenceError(f"{what}: {error}", argument=what, value=error.value, allowed=error.allowed) from None
    return point


def _expert_name(preference: Sequence[float], index: int, objectives: Sequence[str]) -> str:
    if max(preference) > 1 - HULL:
        return objectives[int(np.argmax(preference))]
    if np.allclose(preference, uniform(len(objectives)), atol=1e-6):
        return "centroid"
    return f"e{index}"


def _voting_names(router: RouterSpec, names: list[str], cells: Subdivision) -> list[str]:
    """The experts that a router votes for, in the order of `names` `(L,)`, which lie at the points of `cells`."""
    if router.votes_for is None:
        return [names[i] for i in voting_set(np.asarray(router.preference), cells)]
    chosen = _chosen_names(router, names)
    members = cells.points[[names.index(name) for name in chosen]]
    if not in_hull(np.asarray(router.preference), members):
        raise ExpertError(
            f"router {router.name!r} at {router.preference} votes for {chosen}, whose preferences {members.tolist()} do not "
            "enclose it; add experts to votes_for, or leave it out",
            argument="votes_for",
            value=chosen,
        )
    return chosen


def _check_votes(routers: Sequence[RouterSpec], names: list[str], n: int) -> None:
    """Refuse more votes of routers for the experts `names` than fit, before any voting set is found."""
    slots = sum(n if router.votes_for is None else len(_chosen_names(router, names)) for router in routers)
    if slots * len(names) > MOST_VOTES:
        raise ExpertError(
            f"{len(routers)} routers have {slots} votes for {len(names)} experts, more than fit; say votes_for, with few "
            "experts for each router",
            argument="routers",
            value=slots,
            allowed=f"at most {MOST_VOTES // len(names)} votes",
        )


def _chosen_names(router: RouterSpec, names: list[str]) -> list[str]:
    wanted = router.votes_for
    if isinstance(wanted, str) and wanted == "all":
        return names
    if isinstance(wanted, (list, tuple, set, frozenset)) and wanted and set(map(_hashable, wanted)) <= set(names):
        return [name for name in names if name in wanted]
    raise ExpertError(
        f"router {router.name!r} votes for {wanted!r}; use 'all' or a list of names among the experts {names}",
        argument="votes_for",
        value=wanted,
        allowed=names,
    )


def _ranks(value: Any, what: str, experts: Sequence[ExpertSpec]) -> list[int]:
    if isinstance(value, (int, np.integer, float, str)) or not hasattr(value, "__len__"):
        return [checked_rank(value, what)] * len(experts)
    ranks = list(value)
    if len(ranks) != len(experts) or isinstance(value, Mapping):
        raise ExpertError(
            f"{what} has {len(ranks)} ranks for {len(experts)} experts {[expert.name for expert in experts]}; give one number, "
            "or a list with one per expert",
            argument=what,
            value=value,
        )
    whole = [0 if _is_zero(rank) else checked_rank(rank, what) for rank in ranks]
    if not any(whole):
        raise ExpertError(
            f"{what} is {ranks}; at least one expert must have a rank above 0", argument=what, value=value
        )
    return whole


def _is_zero(rank: Any) -> bool:
    return isinstance(rank, (int, np.integer)) and not isinstance(rank, bool) and rank == 0


def _hashable(name: Any) -> Any:
    return name if isinstance(name, str) else repr(name)
