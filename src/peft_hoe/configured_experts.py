"""The experts and routers of a configuration in numbers: what the tuner, builds and training read of it.

Shapes: N objectives, L experts, R routers, V the voting experts of all routers one after the other.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .patterns import matches
from .preference import FloatArray
from .resolution import fingerprint, stacked
from .routing import PreferenceRouter, coarse_weights


class ConfiguredExperts:
    """A base of HoEConfig, which holds the fields; what is said here follows from them."""

    objectives: list[str] | None
    experts: list[Any] | None
    routers: list[Any] | None
    rank_pattern: dict[str, Any] | None
    target_embeddings: list[str] | None
    target_norms: list[str] | None
    router_temperature: float
    interpolation: str

    @property
    def expert_names(self) -> list[str]:
        """Names of the L experts."""
        return [expert.name for expert in self.experts or []]

    @property
    def router_names(self) -> list[str]:
        """Names of the R routers."""
        return [router.name for router in self.routers or []]

    @property
    def expert_preferences(self) -> FloatArray:
        """`(L, N)`."""
        return stacked(self.experts or [], len(self.objectives or []))

    @property
    def router_preferences(self) -> FloatArray:
        """`(R, N)`."""
        return stacked(self.routers or [], len(self.objectives or []))

    def ranks(self, module: str) -> list[int]:
        """Rank of each expert, `(L,)`, in the module of that name."""
        pattern = self.rank_pattern or {}
        for key, ranks in pattern.items():
            if matches(rf"(.*\.)?({key})", module, f"rank_pattern[{key!r}]"):
                found: list[int] = ranks
                return found
        return [expert.r for expert in self.experts or []]

    def votes_statically(self, module: str) -> bool:
        """Whether `target_embeddings` or `target_norms` name a module, so that routers vote there as before their training."""
        named = (*(self.target_embeddings or ()), *(self.target_norms or ()))
        return any(module == name or module.endswith(f".{name}") for name in named)

    def votes(self) -> list[list[int]]:
        """For each router the ascending indices of the experts that it votes for."""
        names = self.expert_names
        return [[names.index(name) for name in router.votes_for] for router in self.routers or []]

    def static_votes(self) -> FloatArray:
        """`(R, L)`: what each router votes until it is trained, the interpolation that gives its own preference."""
        experts, points = self.expert_preferences, self.router_preferences
        static = np.zeros((len(points), len(experts)))
        for row, (members, point) in enumerate(zip(self.votes(), points, strict=True)):
            static[row, members] = coarse_weights(point, experts[members])
        return static

    def initial_router_bias(self) -> FloatArray:
        """`(V,)`, V the voting experts of all routers one after the other: training starts from the static votes.

        T log max(c, 1e-3), with which zero router weights give the static votes c up to 1e-3.
        """
        static = self.static_votes()
        votes = [static[row, members] for row, members in enumerate(self.votes())]
        flat = np.concatenate(votes) if votes else np.zeros(0)
        return np.asarray(self.router_temperature * np.log(np.maximum(flat, 1e-3)))

    def calibrates(self) -> dict[str, Any]:
        """What a calibration that is made now holds for: with others, a preference leads to other texts.

        Returns:
            the fingerprint of experts and routers, the names of those routers that are trained, and how votes become weights.
        """
        return {
            "fingerprint": self.own_fingerprint(),
            "trained": sorted(spec.name or "" for spec in self.routers or [] if spec.trained),
            "interpolation": self.interpolation,
            "router_temperature": self.router_temperature,
        }

    def preference_router(self) -> PreferenceRouter:
        """The geometry that turns a preference into weights over experts and routers."""
        return PreferenceRouter(
            self.expert_preferences, self.router_preferences, [*self.expert_names, *self.router_names]
        )

    def own_fingerprint(self) -> str:
        """Which experts and routers there are, in which order and of which ranks."""
        return fingerprint(self.experts or [], self.routers or [], self.rank_pattern or {})
