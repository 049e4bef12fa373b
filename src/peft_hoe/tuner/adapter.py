"""One HoE adapter of a model: what it serves, and where a preference leads in it.

Shapes: N objectives, L experts, R routers.
"""

from __future__ import annotations

import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..calibration import Calibration
from ..config import HoEConfig
from ..errors import HoEWarning, PreferenceError
from ..preference import FloatArray, parse_preference, uniform
from ..routing import HULL, Route
from ..specs import checked_flag
from .plan import AdapterPlan, Place
from .selection import Selections

_CACHED_PLANS = 256
_CACHED_NUMBERS = 2**23  # fewer where plans are large: hundreds of experts, and routers that vote for all of them
# What a call or a block may ask of routers. keep: trained ones vote by the input. static: all vote as they did before training.
# drop: there are none, which leaves the coarse interpolation of the LoRA experts.
ROUTERS = ("keep", "static", "drop")


class Adapter:
    """A read-only view of an adapter, and its geometry; `functional.adapter_of(model)` gives it.

    Its configuration, `model.peft_config[name]`, is the one place that holds the default preference and the marks of trained
    routers: what is assigned there is read here.

    Args:
        name: of the adapter.
        configs: the model's `peft_config`.
        root: the model.

    Attributes:
        name: of the adapter.
        config: resolved, used by this model alone.
        objectives: the N names.
        default: the preference of a call that brings none, `(N,)`.
        trained: which routers' softmax votes, `(R,)`.
        places: where the model's layers lie; plans have their votes there.
    """

    def __init__(self, name: str, configs: dict[str, HoEConfig], root: nn.Module) -> None:
        self.name, self.config, self._configs = name, configs[name], configs
        self._root: Any = weakref.ref(root)
        self.places: set[Place] = set()
        self._replan: Callable[[], None] | None = None
        self._survey()
        self._read()

    def _survey(self) -> None:
        """Take over where experts and routers stand."""
        self.objectives: list[str] = list(self.config.objectives or ())
        self._router = self.config.preference_router()
        self._static_votes = self.config.static_votes()
        self._slots = tuple(map(tuple, self.votes()))
        self._selections = Selections()
        self._plans: OrderedDict[tuple[bytes, bytes, str], AdapterPlan] = OrderedDict()

    # -- the configuration in use ---

    def follow(self, replan: Callable[[], None]) -> None:
        """From now on assignments to the configuration count; `replan` is called after each."""
        self._replan = replan
        self.config.use(self)
        self.reread()

    def lives(self) -> bool:
        """Whether the model is still there; a copied one is taken to be."""
        return self._root is None or self._root() is not None

    def reread(self) -> None:
        """Take over what the configuration says about the default preference and trained routers."""
        self._read()
        if self._replan is not None:
            self._replan()

    def renew(self) -> None:
        """The configuration has other experts, routers or objectives than before."""
        self._survey()
        self.reread()

    def go_on_with(self, copy: HoEConfig) -> None:
        """Another adapter takes the configuration over; this one uses a copy of it."""
        if self._configs.get(self.name) is self.config:
            self._configs[self.name] = copy
        self.config = copy
        copy.use(self)

    def __getstate__(self) -> dict[str, Any]:
        """Without what cannot be copied."""
        return {**self.__dict__, "_root": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copied or unpickled model hears of its own configuration."""
        self.__dict__.update(state)
        if self._replan is not None:
            self.config.use(self)

    def _read(self) -> None:
        default, n = self.config.default_preference, len(self.objectives)
        marks = [checked_flag(spec.trained, f"trained of router {spec.name!r}") for spec in self.config.routers or []]
        self.default: FloatArray = uniform(n) if default is None else parse_preference(default, self.objectives)
        self.trained: NDArray[np.bool_] = np.asarray(marks, dtype=bool)
        self._by_module = np.asarray([spec.kind == "module" for spec in self.config.routers or []], dtype=bool)

    # -- what it is ---

    @property
    def expert_names(self) -> list[str]:
        """Names of the L experts."""
        return self.config.expert_names

    @property
    def router_names(self) -> list[str]:
        """Names of the R routers."""
        return self.config.router_names

    @property
    def router_preferences(self) -> FloatArray:
        """`(R, N)`."""
        return self.config.router_preferences

    def votes(self) -> list[list[int]]:
        """For each router the ascending indices of the experts that it votes for."""
        return self.config.votes()

    def describe(self) -> dict[str, Any]:
        """All that decides what a preference does, but the weights: plain JSON."""
        plain = self.config.to_dict()
        names = ("objectives", "experts", "routers", "router_temperature", "interpolation")
        return {name: plain[name] for name in names}

    # -- where a preference leads ---

    def route(self, preference: FloatArray, routers: str = "keep") -> Route:
        """The route of a preference `(N,)`, with `routers` one of `ROUTERS`."""
        return self._router.route(preference, coarse=routers == "drop")

    def calibrated(self, positions: FloatArray) -> FloatArray:
        """What positions of the calibrated dial lead to, `(N,)` or `(B, N)`.

        Raises:
            PreferenceError: there is no calibration, or it was made for other experts or routers.
        """
        if self.config.calibration is None:
            raise PreferenceError(
                f"adapter {self.name!r} has no calibration; make one with peft_hoe.evaluation.calibrate(model, sweep), or "
                "leave calibrated=True out",
                argument="calibrated",
                value=True,
            )
        calibration = Calibration.of(self.config.calibration, len(self.objectives))
        now = self.config.calibrates()
        if calibration.made_for != now:
            raise PreferenceError(
                f"the calibration of adapter {self.name!r} was made for other experts or routers ({calibration.made_for}) than "
                f"it has now ({now}); sweep and calibrate again, or leave calibrated=True out",
                argument="calibrated",
                value=calibration.made_for,
                allowed=now,
            )
        found = np.stack([calibration.preference(row) for row in np.atleast_2d(positions)])
        return found if positions.ndim == 2 else found[0]

    def plan(self, preference: FloatArray, routers: str = "keep") -> AdapterPlan:
        """The plan of a preference `(N,)`, or of one preference per row `(B, N)`, with `routers` one of `ROUTERS`."""
        key = (preference.tobytes(), self.trained.tobytes(), routers)
        known = self._plans.get(key)
        if known is not None:
            known.place(self.places)
            return known
        with torch.inference_mode(False):
            plan = self._make(np.atleast_2d(preference), routers)
        plan.place(self.places)
        self._plans[key] = plan
        while len(self._plans) > min(_CACHED_PLANS, max(1, _CACHED_NUMBERS // plan.numbers)):
            self._plans.popitem(last=False)
        return plan

    def _make(self, preferences: FloatArray, routers: str) -> AdapterPlan:
        solve = self._router.coarse if routers == "drop" else self._router.weights
        voting = self.trained if routers == "keep" else np.zeros_like(self.trained)
        solved = [solve(row) for row in preferences]
        self._warn_outside(preferences, np.stack([effective for _, effective in solved]))
        weights = np.stack([row for row, _ in solved])
        n_experts = len(self._router.experts)
        router_weights = weights[:, n_experts:]
        static = weights[:, :n_experts] + (router_weights * ~voting) @ self._static_votes
        live = router_weights * voting  # by token or by module
        reachable = np.asarray((static > 0).any(axis=0))
        for r in np.flatnonzero(live.any(axis=0)):
            reachable[list(self._slots[r])] = True
        return AdapterPlan(
            key=preferences.tobytes() + self.trained.tobytes() + routers.encode(),
            preferences=preferences,
            static=torch.from_numpy(static),
            fixed=torch.from_numpy(weights[:, :n_experts] + router_weights @ self._static_votes),
            live=torch.from_numpy(live * ~self._by_module),
            by_module=torch.from_numpy(live * self._by_module),
            is_live=bool((live * ~self._by_module).any()),
            may_be_live=self._all_trained(~self._by_module),
            may_be_by_module=self._all_trained(self._by_module),
            selected=tuple(np.flatnonzero(reachable).tolist()),
            slots=self._slots,
            selections=self._selections,
        )

    def _all_trained(self, kind: NDArray[np.bool_]) -> tuple[int, ...]:
        """All routers of a kind if one of them is trained: shapes do not change with the preference."""
        return tuple(np.flatnonzero(kind).tolist()) if bool((self.trained & kind).any()) else ()

    def _warn_outside(self, preferences: FloatArray, effective: FloatArray) -> None:
        distances = np.linalg.norm(preferences - effective, axis=1)
        worst = int(np.argmax(distances))
        if distances[worst] > HULL:
            warnings.warn(
                f"preference {preferences[worst].tolist()} lies outside the hull of the experts "
                f"{self.expert_names}; in effect is {np.round(effective[worst], 6).tolist()}, "
                f"{distances[worst]:.3g} away",
                HoEWarning,
                stacklevel=2,
            )
