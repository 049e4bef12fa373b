"""HoEConfig: what an adapter is. Plain data, validated, written as JSON into adapter_config.json."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from peft.config import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key

from .errors import ExpertError, HoEWarning, PreferenceError
from .files import check_readable
from .model_card import complete
from .peft_type import peft_type
from .preference import FloatArray, one_hot, parse_preference, uniform
from .routing import HULL, PreferenceRouter, check_apart, coarse_weights, corner, in_hull, voting_set
from .specs import ExpertSpec, RouterSpec, as_spec, check_names, checked_rank, checked_temperature

INTERPOLATIONS = ("linear", "norm")


@dataclass
class HoEConfig(PeftConfig):
    """Configuration of a HoE adapter (hierarchical experts, arXiv 2505.20925).

    Args:
        objectives: names of the N objectives, in the order of every preference.
        experts: the LoRA experts, as preferences or `ExpertSpec`. Default: the N one-hot experts and the centroid.
        routers: the router experts, as preferences or `RouterSpec`. Default: none.
        r: rank of an expert that states none.
        target_modules: names, a regular expression, or "all-linear", as in LoRA.
        exclude_modules: names or a regular expression of modules to leave out.
        layers_to_transform: layer index or indices to adapt (0 is an index); default all.
        layers_pattern: name of the layer list that `layers_to_transform` counts.
        modules_to_save: modules that are trained and saved whole, such as a classification head.
        fan_in_fan_out: whether target weights are stored (in, out). Conv1D is recognised without it.
        init_weights: True starts every expert at a zero delta. False draws random experts and routers (for tests).
        rank_pattern: `{module: rank, or one rank per expert}`; beats `ExpertSpec.r`, which beats `r`. A rank of 0 in a list
            says that this expert has nothing in this module.
        default_preference: the preference in effect when none is given; default uniform.
        train_experts: whether the experts' own weights train. Off, only routers and `modules_to_save` do.
        router_temperature: T of the routers' softmax; not trained.
        interpolation: "linear" averages the experts (paper eq. 12); "norm" gives each module's average the mean length of what
            it averages (`tuner/lengths.py`).

    Raises:
        ExpertError: experts or routers that contradict each other or the objectives.
        PreferenceError: a preference that is not a point of the simplex.
    """

    objectives: list[str] | None = None
    experts: list[Any] | None = None
    routers: list[Any] | None = None
    r: int = 16
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    fan_in_fan_out: bool = False
    init_weights: bool = True
    rank_pattern: dict[str, Any] | None = field(default_factory=dict)
    default_preference: Any = None
    train_experts: bool = False
    router_temperature: float = 1.0
    interpolation: str = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type()
        self._owner: str | None = None
        self._claimed: tuple[list[float] | None, list[bool]] = (None, [])
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("`layers_to_transform` cannot be used when `target_modules` is a str.")
        if isinstance(self.target_modules, str) and self.layers_pattern is not None:
            raise ValueError("`layers_pattern` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")
        self.r = checked_rank(self.r, "r")
        self.router_temperature = checked_temperature(self.router_temperature)
        self.check_interpolation()
        if self.objectives is not None:
            self._resolve()

    def check_interpolation(self) -> None:
        """Check again what may have been assigned since.

        Raises:
            ExpertError: another value, or one that does not go with `train_experts`.
        """
        if self.interpolation not in INTERPOLATIONS:
            raise ExpertError(f"interpolation is {self.interpolation!r}; allowed are {list(INTERPOLATIONS)}")
        if self.interpolation == "norm" and self.train_experts:
            raise ExpertError(
                'interpolation="norm" needs experts whose lengths stay as they are, but train_experts=True changes them; use '
                'interpolation="linear" while experts train'
            )

    # -- resolving what the user wrote ---

    def _resolve(self) -> None:
        self.objectives = check_names(self.objectives, "objective")
        n = len(self.objectives)
        if n == 0:
            raise ExpertError("objectives is empty; name at least one objective")
        given = self.experts if self.experts is not None else _default_experts(n)
        experts = [as_spec(item, ExpertSpec) for item in given]
        routers = [as_spec(item, RouterSpec) for item in (() if self.routers is None else self.routers)]
        if not experts:
            raise ExpertError("experts is empty; leave it out for the one-hot experts and the centroid")
        for index, expert in enumerate(experts):
            expert.preference = self._parse(expert.preference, f"expert {index}")
            expert.name = expert.name or self._expert_name(expert.preference, index)
            expert.r = checked_rank(self.r if expert.r is None else expert.r, f"the rank of expert {expert.name!r}")
        for index, router in enumerate(routers):
            router.preference = self._parse(router.preference, f"router {index}")
            router.name = router.name or f"r{index}"
        check_names([spec.name for spec in (*experts, *routers)], "expert or router")
        self.experts, self.routers = experts, routers
        check_apart(self.expert_preferences, self.expert_names, "expert")
        check_apart(self.router_preferences, self.router_names, "router")
        for router in routers:
            router.votes_for = self._voting_names(router)
        self._check_corners()
        self.rank_pattern = {key: self._ranks(value, key) for key, value in (self.rank_pattern or {}).items()}
        if self.default_preference is not None:
            self.default_preference = parse_preference(self.default_preference, self.objectives).tolist()

    def _parse(self, preference: Any, what: str) -> list[float]:
        try:
            point: list[float] = parse_preference(preference, self.objectives or []).tolist()
        except PreferenceError as error:
            raise PreferenceError(f"{what}: {error}") from None
        return point

    def _expert_name(self, preference: Sequence[float], index: int) -> str:
        objectives = self.objectives or []
        if (served := corner(preference)) is not None:
            return objectives[served]
        if np.allclose(preference, uniform(len(objectives)), atol=1e-6):
            return "centroid"
        return f"e{index}"

    def _voting_names(self, router: RouterSpec) -> list[str]:
        names, point = self.expert_names, np.asarray(router.preference)
        if router.votes_for is None:
            return [names[i] for i in voting_set(point, self.expert_preferences)]
        chosen = names if router.votes_for == "all" else list(router.votes_for)
        if (
            isinstance(router.votes_for, str)
            and router.votes_for != "all"
            or not set(chosen) <= set(names)
            or not chosen
        ):
            raise ExpertError(
                f"router {router.name!r} votes for {router.votes_for!r}; use 'all' or names among the experts {names}"
            )
        chosen = [name for name in names if name in chosen]
        members = self.expert_preferences[[names.index(name) for name in chosen]]
        if not in_hull(point, members):
            raise ExpertError(
                f"router {router.name!r} at {router.preference} votes for {chosen}, whose preferences "
                f"{members.tolist()} do not enclose it; add experts to votes_for, or leave it out"
            )
        return chosen

    def _check_corners(self) -> None:
        corners = np.eye(len(self.objectives or []))
        missing = [
            name
            for name, point in zip(self.objectives or [], corners, strict=True)
            if np.linalg.norm(self.expert_preferences - point, axis=1).min() > HULL
        ]
        if missing:
            warnings.warn(
                f"no expert serves {missing} alone; preferences outside the hull of the experts will be projected on it",
                HoEWarning,
                stacklevel=5,
            )

    def _ranks(self, value: Any, key: str) -> list[int]:
        what, n = f"rank_pattern[{key!r}]", len(self.experts or [])
        if isinstance(value, (int, np.integer, float, str)):
            return [checked_rank(value, what)] * n
        ranks = list(value)
        if len(ranks) != n:
            raise ExpertError(
                f"{what} has {len(ranks)} ranks for {n} experts {self.expert_names}; give one number, or one per expert"
            )
        if not any(ranks):
            raise ExpertError(f"{what} is {ranks}; at least one expert must have a rank above 0")
        return [0 if rank == 0 else checked_rank(rank, what) for rank in ranks]

    def claim(self, owner: str) -> tuple[list[float] | None, list[bool]]:
        """Default preference and `trained` marks for a model that is made from this configuration.

        PEFT keeps the caller's object, and a model writes its own of both into it. A second model or adapter made from the
        same object starts from what they were before the first.
        """
        if self._owner in (None, owner):
            self._owner, self._claimed = owner, (self.default_preference, [spec.trained for spec in self.routers or []])
        return self._claimed

    # -- what the tuner reads ---

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
        return _stack([expert.preference for expert in self.experts or []], len(self.objectives or []))

    @property
    def router_preferences(self) -> FloatArray:
        """`(R, N)`."""
        return _stack([router.preference for router in self.routers or []], len(self.objectives or []))

    def ranks(self, module: str) -> list[int]:
        """Rank of each expert, `(L,)`, in the module of that name."""
        pattern = self.rank_pattern or {}
        key = get_pattern_key(list(pattern), module)
        ranks: list[int] = pattern[key] if key in pattern else [expert.r for expert in self.experts or []]
        return ranks

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

    def preference_router(self) -> PreferenceRouter:
        """The geometry that turns a preference into weights over experts and routers."""
        return PreferenceRouter(
            self.expert_preferences, self.router_preferences, [*self.expert_names, *self.router_names]
        )

    # -- JSON ---

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, sets as sorted lists, everything resolved."""
        plain = asdict(self)
        for key, value in plain.items():
            if isinstance(value, set):
                plain[key] = sorted(value)
        return plain

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> HoEConfig:
        """Read a configuration; see PEFT.

        Raises:
            CheckpointError: the weights beside it, where they are local, are not a readable safetensors file.
        """
        config: HoEConfig = super().from_pretrained(str(pretrained_model_name_or_path), subfolder=subfolder, **kwargs)
        weights = os.path.join(pretrained_model_name_or_path, subfolder or "", SAFETENSORS_WEIGHTS_NAME)
        if os.path.isfile(weights):
            check_readable(weights)
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json, and complete the model card beside it (see `model_card.complete`)."""
        super().save_pretrained(save_directory, **kwargs)
        complete(save_directory, self.to_dict())


def _default_experts(n: int) -> list[FloatArray]:
    corners = [one_hot(i, n) for i in range(n)]
    return corners if n == 1 else [*corners, uniform(n)]


def _stack(preferences: Sequence[Any], n: int) -> FloatArray:
    return np.asarray(preferences, dtype=np.float64).reshape(len(preferences), n)
