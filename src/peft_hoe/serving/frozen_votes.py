"""Votes that no longer depend on the input: what is left of routing when an engine knows only ordinary weights.

A LoRA expert's vote is static anyway, and so is that of a router before training. A trained router is frozen to the mean of
its votes over calibration prompts, module by module; `routers=` can also take its training or the router itself away. One that
votes by module is exact: its votes are read from its bias.
Shapes: N objectives, L experts, R routers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import HoEConfig
from ..errors import check_choice
from ..preference import parse_preference
from ..routing import Route
from ..tuner.adapter import ROUTERS
from .source import AdapterSource

STATIC = "no router votes by the input here"
_METHODS = {  # what becomes of trained routers, in words for a report
    "keep": "votes before training",
    "static": "votes before training",
    "drop": "left out: the interpolation of the LoRA experts",
}


@dataclass(frozen=True)
class FrozenVotes:
    """The votes of one preference.

    Attributes:
        route: where the preference leads; weights of experts and routers.
        shared: `(L,)` float64, summing to 1, the votes of every module that `by_module` leaves out.
        by_module: votes of modules that have their own.
        trained: names of the trained routers that would vote by the input here.
        method: how `trained` were frozen, in words for a report.
        modular: weights of the trained routers that vote by module here, by name.
    """

    route: Route
    shared: Tensor
    trained: tuple[str, ...]
    method: str
    by_module: Mapping[str, Tensor] = field(default_factory=dict)
    modular: Mapping[str, float] = field(default_factory=dict)

    def of(self, module: str) -> Tensor:
        """Votes `(L,)` in a module."""
        return self.by_module.get(module, self.shared)

    def calibrated(self, by_module: Mapping[str, Tensor], method: str) -> FrozenVotes:
        """The same with the votes that were measured."""
        return replace(self, method=method, by_module=by_module)

    def read(self, source: AdapterSource) -> FrozenVotes:
        """The same with the votes of the routers that vote by module, from the adapter's weights."""
        if not self.modular:
            return self
        config = source.config
        members, static = config.votes(), config.static_votes()
        starts = np.cumsum([0, *map(len, members)])
        by_module = {}
        for module in source.modules:
            if config.votes_statically(module):
                continue
            bias, votes = source.router_bias(module).double(), self.shared.clone()
            for name, weight in self.modular.items():
                r = config.router_names.index(name)
                votes -= weight * torch.from_numpy(static[r])
                votes[members[r]] += weight * (bias[starts[r] : starts[r + 1]] / config.router_temperature).softmax(0)
            by_module[module] = votes
        return replace(self, by_module=by_module)


def freeze(config: HoEConfig, preference: Any, routers: str = "keep") -> FrozenVotes:
    """The votes of a preference, trained routers voting as they did before training.

    Args:
        config: of the adapter.
        preference: N numbers or `{objective: weight}`.
        routers: "keep" or "static": as said. "drop": without routers, by the interpolation of the LoRA experts.

    Raises:
        PreferenceError: not a point of the simplex.
        HoEError: `routers` is none of these.
    """
    check_choice("routers", routers, ROUTERS)
    point = parse_preference(preference, config.objectives or [])
    geometry, n_experts = config.preference_router(), len(config.expert_names)
    fine, _ = geometry.weights(point)
    coarse, effective = geometry.coarse(point)
    voting = {
        spec.name: float(weight)
        for spec, weight in zip(config.routers or [], fine[n_experts:], strict=True)
        if spec.trained and weight
    }
    by_module = {spec.name for spec in config.routers or [] if spec.kind == "module"}
    trained = [name for name in voting if name not in by_module]
    weights = coarse if routers == "drop" else fine
    votes = weights[:n_experts] + weights[n_experts:] @ config.static_votes()
    names = [*config.expert_names, *config.router_names]
    route = Route(
        experts={names[i]: float(weights[i]) for i in np.flatnonzero(weights)},
        requested=tuple(point.tolist()),
        effective=tuple(effective.tolist()),
        distance=float(np.linalg.norm(effective - point)),
    )
    return FrozenVotes(
        route,
        torch.from_numpy(votes),
        tuple(trained),
        _METHODS[routers] if trained else STATIC,
        modular={name: weight for name, weight in voting.items() if name in by_module and routers == "keep"},
    )
