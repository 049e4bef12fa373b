"""What a configuration is made of: experts, routers, their help, and what may be assigned when."""

from __future__ import annotations

import gc
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, ClassVar, NoReturn, Protocol, TypeVar

import numpy as np

from .errors import ExpertError

Class = TypeVar("Class", bound=type)
Own = TypeVar("Own", bound="Assigned")

KINDS = ("token", "module")


# -- fields and their help ---


def helpful(cls: Class) -> Class:
    """Give each field that a dataclass declares its line of the docstring's `Args` as `metadata["help"]`, as PEFT's have it."""
    arguments = (cls.__doc__ or "").partition("Args:\n")[2].partition("\n\n")[0]
    entries = re.split(r"^ {8}(\w+): ", arguments, flags=re.MULTILINE)[1:]
    texts = dict(zip(entries[::2], (" ".join(text.split()) for text in entries[1::2]), strict=True))
    for item in fields(cls):
        if item.name in cls.__annotations__:
            item.metadata = MappingProxyType({**item.metadata, "help": texts.get(item.name, "")})
    return cls


# -- what a model in use lets be assigned ---


class User(Protocol):
    """An adapter of a model, seen from the configuration that it uses."""

    def lives(self) -> bool:
        """Whether its model is still there."""

    def reread(self) -> None:
        """Something that a model in use follows has been assigned."""

    def go_on_with(self, copy: Any) -> None:
        """Another adapter is about to be made from the configuration: this one goes on with a copy."""


class Assigned:
    """A dataclass whose fields may be assigned freely until a model uses it; then only those that the model follows.

    An assignment works or is refused, but is never ignored.
    """

    followed: ClassVar[frozenset[str]] = frozenset()  # fields that a model in use follows
    free: ClassVar[frozenset[str]] = frozenset()  # fields that are not ours

    def __setattr__(self, name: str, value: Any) -> None:
        user = self.user
        if user is None or name in self.free or name not in type(self).__dataclass_fields__:  # type: ignore[attr-defined]
            super().__setattr__(name, value)
            return
        if name not in self.followed:
            gc.collect()  # a model that nobody holds any more may only wait for this: its parts refer to each other
            if self.user is None:
                super().__setattr__(name, value)
                return
            raise ExpertError(
                f"{type(self).__name__}.{name} cannot become {value!r}: a model has been made with {getattr(self, name)!r}. "
                "Make another configuration and another adapter",
                argument=name,
                value=value,
                allowed=sorted(self.followed),
            )
        before = getattr(self, name)
        super().__setattr__(name, value)
        try:
            user.reread()
        except Exception:
            super().__setattr__(name, before)
            user.reread()
            raise

    @property
    def user(self) -> User | None:
        """What uses this, if a model does."""
        user: User | None = self.__dict__.get("_user")
        if user is not None and not user.lives():
            self.release()
            return None
        return user

    def use(self, user: User) -> None:
        """A model uses this from now on. Lists cannot be changed in place meanwhile."""
        self._each_list(FixedList, FixedDict)
        self.__dict__["_user"] = user

    def release(self) -> None:
        """No model uses this any more."""
        self.__dict__.pop("_user", None)
        self._each_list(list, dict)

    def become(self: Own, other: Own) -> Own:
        """Take over all fields of another; for what is in nobody's use at the moment."""
        for item in fields(self):  # type: ignore[arg-type]
            setattr(self, item.name, getattr(other, item.name))
        return self

    def _each_list(self, kind: type[list[Any]], kind_of_dict: type[dict[str, Any]]) -> None:
        for name, value in self.__dict__.items():
            if name not in self.free and isinstance(value, (list, dict)):
                self.__dict__[name] = kind(value) if isinstance(value, list) else kind_of_dict(value)

    def __getstate__(self) -> dict[str, Any]:
        """No model uses a copy."""
        return {name: value for name, value in self.__dict__.items() if name != "_user"}


def _fixed(self: list[Any] | dict[str, Any], *unused: Any, **unused_too: Any) -> NoReturn:
    raise ExpertError(
        "a model uses this configuration, so its lists cannot be changed in place; assign the whole field, or make another "
        "configuration",
        value=self.copy(),
    )


class FixedList(list[Any]):
    """A list that stays as it is; a copy is an ordinary list."""

    append = extend = insert = pop = remove = clear = sort = reverse = _fixed  # type: ignore[assignment]
    __setitem__ = __delitem__ = __iadd__ = __imul__ = _fixed  # type: ignore[assignment]

    def __reduce__(self) -> tuple[type[list[Any]], tuple[list[Any]]]:
        return list, (list(self),)


class FixedDict(dict[str, Any]):
    """A dictionary that stays as it is; a copy is an ordinary one."""

    pop = popitem = clear = update = setdefault = _fixed  # type: ignore[assignment]
    __setitem__ = __delitem__ = __ior__ = _fixed  # type: ignore[assignment]

    def __reduce__(self) -> tuple[type[dict[str, Any]], tuple[dict[str, Any]]]:
        return dict, (dict(self),)


# -- experts and routers ---


@helpful
@dataclass
class ExpertSpec(Assigned):
    """One LoRA expert.

    Args:
        preference: the point of the simplex that it serves, a sequence of N numbers or `{objective: weight}`.
        name: unique among experts and routers. Default: the objective's name for a one-hot preference, "centroid" for the
            uniform one, "e<index>" otherwise.
        r: its rank; default `HoEConfig.r`.
        policy: directory or Hub id of a policy trained for this preference, which the expert is made of; for what builds
            adapters (`build_adapter`), and not kept.

    >>> from peft_hoe import ExpertSpec, HoEConfig
    >>> config = HoEConfig(objectives=["helpful", "harmless"], experts=[[1, 0], [0, 1], ExpertSpec([0.5, 0.5], r=8)])
    >>> [(expert.name, expert.r) for expert in config.experts]
    [('helpful', 16), ('harmless', 16), ('centroid', 8)]
    """

    preference: Any
    name: str | None = None
    r: int | None = None
    policy: Any = None


@helpful
@dataclass
class RouterSpec(Assigned):
    """One router expert.

    Args:
        preference: the point of the simplex that it serves, a sequence of N numbers or `{objective: weight}`.
        name: unique among experts and routers; default "r<index>".
        votes_for: names of the LoRA experts that it chooses among, or "all". Default: the experts that carry its
            preference, completed to N by distance. Fixed from then on: experts added later do not change it.
        kind: "token": it votes for each token by what the module reads, softmax(W x + b). "module": one vote for each module,
            softmax(b), the same for all tokens; it costs nothing when the model runs, merges and exports exactly.
        trained: whether its weights have been set. An untrained router votes its static weights exactly, so it prevents
            neither merging nor export.

    >>> from peft_hoe import HoEConfig, RouterSpec
    >>> config = HoEConfig(objectives=["helpful", "harmless"], routers=[RouterSpec([0.25, 0.75], name="careful")])
    >>> config.routers[0].votes_for
    ['harmless', 'centroid']
    """

    followed = frozenset({"trained"})

    preference: Any
    name: str | None = None
    votes_for: Any = None
    kind: str = "token"
    trained: bool = False


def as_spec(item: Any, kind: Any) -> Any:
    """A new `ExpertSpec` or `RouterSpec` from one, from its dictionary, or from a preference alone."""
    known = list(kind.__dataclass_fields__)
    if isinstance(item, kind):
        return kind(**{name: getattr(item, name) for name in known})
    if isinstance(item, Mapping) and "preference" in item:
        unknown = set(item) - set(known)
        if unknown:
            raise ExpertError(
                f"{kind.__name__} has no field {sorted(unknown)}; it has {known}", value=sorted(unknown), allowed=known
            )
        return kind(**item)
    return kind(preference=item)


# -- checks of single values ---


def checked_rank(rank: Any, what: str) -> int:
    """A rank of at least 1 as a plain int, or an ExpertError that names `what`."""
    if isinstance(rank, bool) or not isinstance(rank, (int, np.integer)) or rank < 1:
        raise ExpertError(
            f"{what} is {rank!r}; a rank is a whole number of at least 1",
            argument=what,
            value=rank,
            allowed="at least 1",
        )
    return int(rank)


def checked_temperature(temperature: Any) -> float:
    """A number between 1e-6 and 1e6 (logits are divided by it in float32) as a plain float, or an ExpertError."""
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or not 1e-6 <= temperature <= 1e6:
        raise ExpertError(
            f"router_temperature is {temperature!r}; it must be a number from 1e-6 to 1e6",
            argument="router_temperature",
            value=temperature,
            allowed="1e-6 to 1e6",
        )
    return float(temperature)


def checked_flag(value: Any, what: str) -> bool:
    """True or False, or an ExpertError that names `what`; a text that says so is neither."""
    if not isinstance(value, (bool, np.bool_)):
        raise ExpertError(f"{what} is {value!r}; use True or False", argument=what, value=value, allowed=[True, False])
    return bool(value)


def check_names(names: Any, what: str) -> list[str]:
    """Non-empty strings, each once, as a list, or an ExpertError."""
    if isinstance(names, (str, bytes, Mapping)) or not _all_texts(names):
        raise ExpertError(f"{what} names are {names!r}; give a list of non-empty strings", argument=what, value=names)
    names = list(names)
    seen: set[str] = set()
    twice = sorted({name for name in names if name in seen or seen.add(name)})  # type: ignore[func-returns-value]
    if twice:
        raise ExpertError(
            f"the {what} names {twice} are used twice in {names}; every name must be unique", argument=what, value=twice
        )
    return names


def _all_texts(names: Any) -> bool:
    try:
        return all(isinstance(name, str) and name for name in names)
    except TypeError:  # a number
        return False
