"""HoEConfig: what an adapter is. Plain data, validated, written as JSON into adapter_config.json."""

from __future__ import annotations

import os
import warnings
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from peft.config import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from .base_sample import checked_sample
from .calibration import Calibration
from .configured_experts import ConfiguredExperts
from .contents import check_contents
from .errors import ExpertError, HoEWarning, check_choice
from .files import read_header, read_hub_header
from .model_card import complete
from .peft_type import peft_type
from .preference import parse_preference
from .resolution import (
    check_count,
    check_fingerprint,
    check_layers,
    resolve_experts,
    resolve_ranks,
    resolve_routers,
)
from .routing import HULL
from .specs import (
    Assigned,
    FixedList,
    User,
    check_names,
    checked_flag,
    checked_rank,
    checked_temperature,
    helpful,
)

INTERPOLATIONS = ("linear", "norm")
_FLAGS = ("fan_in_fan_out", "init_weights", "train_experts")


@helpful
@dataclass
class HoEConfig(Assigned, ConfiguredExperts, PeftConfig):
    """Configuration of a HoE adapter (hierarchical experts, arXiv 2505.20925).

    A model reads it, as `model.peft_config[adapter]`, as long as it lives: what is assigned to `default_preference`, or to a
    router's `trained`, takes effect and is saved; what the adapter was made with cannot be assigned any more. A second adapter
    made from the same object takes it over as it is, and the first goes on with a copy: they share nothing.

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
        target_embeddings: names of embeddings and output heads that get low-rank experts. Routers vote there as before their
            training. A head that is tied to embeddings follows them, and need not be named.
        target_norms: names of norms whose weights (and biases) get a delta from each expert; routers vote as there.
        fan_in_fan_out: whether target weights are stored (in, out). Conv1D is recognised without it.
        init_weights: True starts every expert at a zero delta. False draws random experts and routers (for tests).
        rank_pattern: `{module: rank, or one rank per expert}`; beats `ExpertSpec.r`, which beats `r`. A rank of 0 in a list
            says that this expert has nothing in this module.
        default_preference: the preference in effect when none is given; default uniform.
        train_experts: whether the experts' own weights train. Off, only routers and `modules_to_save` do.
        router_temperature: T of the routers' softmax; not trained.
        interpolation: "linear" averages the experts (paper eq. 12); "norm" gives each module's average the mean length of what
            it averages (`tuner/lengths.py`).
        calibration: the map of a calibrated dial, as `evaluation.calibrate` makes it; see `set_preference(λ, calibrated=True)`.
        fingerprint: leave empty. `to_dict` and so adapter_config.json fill it: which experts and routers, in which order, the
            saved tensors hold, since their shapes do not tell.
        base_sample: leave empty. `build_adapter` fills it: a few of the base's weights, by which another base is noticed when
            the adapter is loaded.

    Raises:
        ExpertError: experts or routers that contradict each other or the objectives.
        CheckpointError: experts, ranks or routers that contradict the fingerprint.
        PreferenceError: a preference that is not a point of the simplex.

    >>> from peft_hoe import HoEConfig
    >>> config = HoEConfig(objectives=["helpful", "harmless"], routers=[[0.25, 0.75]], target_modules="all-linear")
    >>> [expert.name for expert in config.experts], config.routers[0].votes_for
    (['helpful', 'harmless', 'centroid'], ['harmless', 'centroid'])
    """

    followed = frozenset({"default_preference", "calibration"})
    free = frozenset(PeftConfig.__dataclass_fields__) | {"modules_to_save"}  # PEFT's to write, also later

    objectives: list[str] | None = None
    experts: list[Any] | None = None
    routers: list[Any] | None = None
    r: int = 16
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    target_embeddings: list[str] | None = None
    target_norms: list[str] | None = None
    fan_in_fan_out: bool = False
    init_weights: bool = True
    rank_pattern: dict[str, Any] | None = field(default_factory=dict)
    default_preference: Any = None
    train_experts: bool = False
    router_temperature: float = 1.0
    interpolation: str = "linear"
    calibration: dict[str, Any] | None = None
    fingerprint: str | None = None
    base_sample: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type()
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        self._check()
        self._check_fingerprint()
        self._warn_of_corners()
        if self.objectives is not None:
            self._made = True

    # -- assignments ---

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "r" and "_made" in self.__dict__ and value != self.r:
            raise ExpertError(
                f"r cannot become {value!r}: the experts took {self.r} when the configuration was made. Assign to the r of "
                "each expert, or make another configuration",
                argument="r",
                value=value,
            )
        if name == "default_preference" and value is not None and self.user is not None:
            value = FixedList(parse_preference(value, self.objectives or []).tolist())
        if name == "calibration" and value is not None and self.user is not None:
            value = Calibration.of(value, len(self.objectives or [])).to_dict()
        super().__setattr__(name, value)

    def renew(self) -> None:
        """Make this ready for a new adapter. One that uses it goes on with a copy, and everything that was assigned is checked.

        Raises:
            ExpertError, PreferenceError: as when a configuration is made; or there are no objectives.
        """
        if self.user is not None:
            self.user.go_on_with(deepcopy(self))
        self.release()
        if self.objectives is None:
            raise ExpertError(
                'HoEConfig names no objectives; write HoEConfig(objectives=["helpful", "harmless"], ...)',
                argument="objectives",
            )
        self._check()

    def use(self, user: User) -> None:
        """See `Assigned.use`; the same for the experts and routers."""
        for spec in self._specs():
            spec.use(user)
        super().use(user)

    def release(self) -> None:
        """See `Assigned.release`; the same for the experts and routers."""
        super().release()
        for spec in self._specs():
            spec.release()

    def become(self, other: HoEConfig) -> HoEConfig:
        """Take over all of another configuration, also while a model uses this one.

        Experts and routers of the same name stay the same objects: whoever holds one goes on to see, and to assign to, what the
        model uses.
        """
        user, known = self.user, {spec.name: spec for spec in self._specs()}
        self.release()
        for item in fields(self):
            super().__setattr__(item.name, getattr(other, item.name))
        for specs in (self.experts or [], self.routers or []):
            for place, spec in enumerate(specs):
                if spec.name in known:
                    specs[place] = known[spec.name].become(spec)
        if user is not None:
            self.use(user)
        return self

    def _specs(self) -> list[Any]:
        given = (*(self.experts or ()), *(self.routers or ())) if "_made" in self.__dict__ else ()
        return [spec for spec in given if isinstance(spec, Assigned)]

    # -- checks ---

    def _check(self) -> None:
        check_layers(self.target_modules, self.layers_to_transform, self.layers_pattern)
        self.r = checked_rank(self.r, "r")
        for name in ("target_embeddings", "target_norms"):
            given = getattr(self, name)
            setattr(self, name, check_names(given, f"{name}' module") if given else None)
        for name in _FLAGS:
            setattr(self, name, checked_flag(getattr(self, name), name))
        self.router_temperature = checked_temperature(self.router_temperature)
        check_choice("interpolation", self.interpolation, INTERPOLATIONS, ExpertError)
        self.base_sample = checked_sample(self.base_sample)
        if self.interpolation == "norm" and self.train_experts:
            raise ExpertError(
                'interpolation="norm" needs experts whose lengths stay as they are, but train_experts=True changes them; use '
                'interpolation="linear" while experts train',
                argument="interpolation",
                value="norm",
                allowed=["linear"],
            )
        if self.objectives is None:
            return
        self.objectives = check_names(self.objectives, "objective")
        if not self.objectives:
            raise ExpertError(
                "objectives is empty; name at least one objective", argument="objectives", value=self.objectives
            )
        check_count(self.objectives, "objectives")
        experts = resolve_experts(self.experts, self.objectives, self.r)
        routers = resolve_routers(self.routers, self.objectives, experts)
        self.experts, self.routers = experts, routers
        self.rank_pattern = resolve_ranks(self.rank_pattern, experts)
        if self.calibration is not None:
            self.calibration = Calibration.of(self.calibration, len(self.objectives)).to_dict()
        if self.default_preference is not None:
            self.default_preference = parse_preference(self.default_preference, self.objectives).tolist()

    def _check_fingerprint(self) -> None:
        given, self.fingerprint = self.fingerprint, None  # what is made from this may have other experts
        if given is not None and self.objectives is not None:
            check_fingerprint(given, self.own_fingerprint())

    def _warn_of_corners(self) -> None:
        if self.objectives is None:
            return
        best = self.expert_preferences.max(axis=0)
        missing = [name for name, weight in zip(self.objectives, best, strict=True) if weight <= 1 - HULL]
        if missing:
            warnings.warn(
                f"no expert serves {missing} alone; preferences outside the hull of the experts will be projected on it",
                HoEWarning,
                stacklevel=4,
            )

    # -- JSON ---

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, sets as sorted lists, everything resolved."""
        plain = asdict(deepcopy(self))  # a copy's lists are ordinary ones
        for expert in plain["experts"] or ():
            if isinstance(expert, dict):
                expert.pop("policy", None)  # for building alone
        plain["fingerprint"] = None if self.objectives is None else self.own_fingerprint()
        return {key: sorted(value) if isinstance(value, set) else value for key, value in plain.items()}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> HoEConfig:
        """Read a configuration; see PEFT.

        Raises:
            CheckpointError: the weights beside it are not a readable safetensors file, or not this configuration's. Of weights
                on the Hub only the header is fetched.
        """
        place = str(pretrained_model_name_or_path)
        config: HoEConfig = super().from_pretrained(place, subfolder=subfolder, **kwargs)
        if not isinstance(config, HoEConfig) or config.objectives is None:  # PEFT reads any method's by any class
            return config
        weights = os.path.join(place, subfolder or "", SAFETENSORS_WEIGHTS_NAME)
        if os.path.isfile(weights):
            check_contents(config, read_header(weights), weights)
        elif not os.path.isdir(place):
            name = f"{subfolder}/{SAFETENSORS_WEIGHTS_NAME}" if subfolder else SAFETENSORS_WEIGHTS_NAME
            header = read_hub_header(place, name, **cls._split_kwargs(kwargs)[0])
            if header is not None:
                check_contents(config, header, f"{place}/{name}")
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json, and complete the model card beside it (see `model_card.complete`)."""
        super().save_pretrained(save_directory, **kwargs)
        complete(save_directory, self.to_dict())
