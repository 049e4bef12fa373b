"""HoEConfig: what an adapter is. Plain data, validated, written as JSON into adapter_config.json."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from peft.config import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key

from .errors import ExpertError, HoEWarning, PreferenceError
from .preference import FloatArray, one_hot, parse_preference, uniform
from .routing import HULL, PreferenceRouter, check_apart, coarse_weights, in_hull, voting_set


@dataclass
class ExpertSpec:
    """One LoRA expert.

    Args:
        preference: the point of the simplex that it serves, a sequence of N numbers or `{objective: weight}`.
        name: unique among experts and routers. Default: the objective's name for a one-hot preference, "centroid" for the
            uniform one, "e<index>" otherwise.
        r: its rank; default `HoEConfig.r`.
    """

    preference: Any
    name: str | None = None
    r: int | None = None


@dataclass
class RouterSpec:
    """One router expert.

    Args:
        preference: the point of the simplex that it serves, a sequence of N numbers or `{objective: weight}`.
        name: unique among experts and routers; default "r<index>".
        votes_for: names of the LoRA experts that it chooses among, or "all". Default: the experts that carry its
            preference, completed to N by distance. Fixed from then on: experts added later do not change it.
        trained: whether its weights have been set. An untrained router votes its static weights exactly, so it prevents
            neither merging nor export.
    """

    preference: Any
    name: str | None = None
    votes_for: Any = None
    trained: bool = False


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

    Raises:
        ExpertError: experts or routers that contradict each other or the objectives.
        PreferenceError: a preference that is not a point of the simplex.
    """

    objectives: list[str] | None = field(default=None, metadata={"help": "Names of the objectives."})
    experts: list[Any] | None = field(default=None, metadata={"help": "LoRA experts: preferences or ExpertSpec."})
    routers: list[Any] | None = field(default=None, metadata={"help": "Router experts: preferences or RouterSpec."})
    r: int = field(default=16, metadata={"help": "Rank of an expert that states none."})
    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Module names, a regular expression, or 'all-linear'."}
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Module names or a regular expression to leave out."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Layer index or indices to adapt; 0 is an index."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the layer list that layers_to_transform counts."}
    )
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained and saved whole."})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Whether target weights are stored (in, out)."})
    init_weights: bool = field(default=True, metadata={"help": "Start at a zero delta; False draws random weights."})
    rank_pattern: dict[str, Any] | None = field(
        default_factory=dict, metadata={"help": "Ranks by module: one, or one per expert."}
    )
    default_preference: Any = field(default=None, metadata={"help": "Preference when none is given; None: uniform."})
    train_experts: bool = field(default=False, metadata={"help": "Whether the experts' own weights train."})
    router_temperature: float = field(default=1.0, metadata={"help": "Temperature of the routers' softmax."})

    def __post_init__(self) -> None:
        super().__post_init__()
        from .registration import peft_type

        self.peft_type = peft_type()
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("`layers_to_transform` cannot be used when `target_modules` is a str.")
        if isinstance(self.target_modules, str) and self.layers_pattern is not None:
            raise ValueError("`layers_pattern` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")
        _check_rank(self.r, "r")
        if not self.router_temperature > 0:
            raise ExpertError(f"router_temperature is {self.router_temperature}; it must be above 0")
        if self.objectives is not None:
            self._resolve()

    # -- resolving what the user wrote ---

    def _resolve(self) -> None:
        self.objectives = _check_names(self.objectives, "objective")
        n = len(self.objectives)
        if n == 0:
            raise ExpertError("objectives is empty; name at least one objective")
        given = self.experts if self.experts is not None else _default_experts(n)
        experts = [as_spec(item, ExpertSpec) for item in given]
        routers = [as_spec(item, RouterSpec) for item in self.routers or []]
        if not experts:
            raise ExpertError("experts is empty; leave it out for the one-hot experts and the centroid")
        for index, expert in enumerate(experts):
            expert.preference = self._parse(expert.preference, f"expert {index}")
            expert.name = expert.name or self._expert_name(expert.preference, index)
            expert.r = self.r if expert.r is None else expert.r
            _check_rank(expert.r, f"the rank of expert {expert.name!r}")
        for index, router in enumerate(routers):
            router.preference = self._parse(router.preference, f"router {index}")
            router.name = router.name or f"r{index}"
        _check_names([spec.name for spec in (*experts, *routers)], "expert or router")
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
        if max(preference) > 1 - HULL:
            return objectives[int(np.argmax(preference))]
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
            for name, corner in zip(self.objectives or [], corners, strict=True)
            if np.linalg.norm(self.expert_preferences - corner, axis=1).min() > HULL
        ]
        if missing:
            warnings.warn(
                f"no expert serves {missing} alone; preferences outside the hull of the experts will be projected on it",
                HoEWarning,
                stacklevel=5,
            )

    def _ranks(self, value: Any, key: str) -> list[int]:
        ranks = [value] * len(self.experts or []) if isinstance(value, int) else list(value)
        if len(ranks) != len(self.experts or []):
            raise ExpertError(
                f"rank_pattern[{key!r}] has {len(ranks)} ranks for {len(self.experts or [])} experts "
                f"{self.expert_names}; give one number, or one per expert"
            )
        if isinstance(value, int) or not any(ranks):
            _check_rank(ranks[0], f"rank_pattern[{key!r}]")
        for rank in ranks:
            if rank != 0:
                _check_rank(rank, f"rank_pattern[{key!r}]")
        return ranks

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
            from .tuner.loading import check_readable

            check_readable(weights)
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json, and complete the model card beside it (see `model_card.complete`)."""
        super().save_pretrained(save_directory, **kwargs)
        from .model_card import complete

        complete(save_directory, self)


def _default_experts(n: int) -> list[FloatArray]:
    corners = [one_hot(i, n) for i in range(n)]
    return corners if n == 1 else [*corners, uniform(n)]


def as_spec(item: Any, kind: Any) -> Any:
    """A new `ExpertSpec` or `RouterSpec` from one, from its dictionary, or from a preference alone."""
    if isinstance(item, kind):
        return kind(**asdict(item))
    if isinstance(item, Mapping) and "preference" in item:
        unknown = set(item) - set(kind.__dataclass_fields__)
        if unknown:
            raise ExpertError(
                f"{kind.__name__} has no field {sorted(unknown)}; it has {list(kind.__dataclass_fields__)}"
            )
        return kind(**item)
    return kind(preference=item)


def _check_rank(rank: Any, what: str) -> None:
    if isinstance(rank, bool) or not isinstance(rank, (int, np.integer)) or rank < 1:
        raise ExpertError(f"{what} is {rank!r}; a rank is a whole number of at least 1")


def _check_names(names: Any, what: str) -> list[str]:
    if isinstance(names, str) or not all(isinstance(name, str) and name for name in names):
        raise ExpertError(f"{what} names are {names!r}; give a list of non-empty strings")
    names = list(names)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ExpertError(f"the {what} names {twice} are used twice in {names}; every name must be unique")
    return names


def _stack(preferences: Sequence[Any], n: int) -> FloatArray:
    return np.asarray(preferences, dtype=np.float64).reshape(len(preferences), n)
