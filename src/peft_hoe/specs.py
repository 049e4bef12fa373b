"""What a configuration is made of: experts, routers, and checks of single values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .errors import ExpertError


@dataclass
class ExpertSpec:
    """One LoRA expert.

    Args:
        preference: the point of the simplex that it serves, a sequence of N numbers or `{objective: weight}`.
        name: unique among experts and routers. Default: the objective's name for a one-hot preference, "centroid" for the
            uniform one, "e<index>" otherwise.
        r: its rank; default `HoEConfig.r`.

    >>> from peft_hoe import ExpertSpec, HoEConfig
    >>> config = HoEConfig(objectives=["helpful", "harmless"], experts=[[1, 0], [0, 1], ExpertSpec([0.5, 0.5], r=8)])
    >>> [(expert.name, expert.r) for expert in config.experts]
    [('helpful', 16), ('harmless', 16), ('centroid', 8)]
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

    >>> from peft_hoe import HoEConfig, RouterSpec
    >>> config = HoEConfig(objectives=["helpful", "harmless"], routers=[RouterSpec([0.25, 0.75], name="careful")])
    >>> config.routers[0].votes_for
    ['harmless', 'centroid']
    """

    preference: Any
    name: str | None = None
    votes_for: Any = None
    trained: bool = False


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


def checked_rank(rank: Any, what: str) -> int:
    """A rank of at least 1 as a plain int, or an ExpertError that names `what`."""
    if isinstance(rank, bool) or not isinstance(rank, (int, np.integer)) or rank < 1:
        raise ExpertError(f"{what} is {rank!r}; a rank is a whole number of at least 1")
    return int(rank)


def checked_temperature(temperature: Any) -> float:
    """A finite number above 0 as a plain float, or an ExpertError."""
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or not 0 < temperature < np.inf:
        raise ExpertError(f"router_temperature is {temperature!r}; it must be a number above 0")
    return float(temperature)


def check_names(names: Any, what: str) -> list[str]:
    """Non-empty strings, each once, as a list, or an ExpertError."""
    if isinstance(names, str) or not all(isinstance(name, str) and name for name in names):
        raise ExpertError(f"{what} names are {names!r}; give a list of non-empty strings")
    names = list(names)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ExpertError(f"the {what} names {twice} are used twice in {names}; every name must be unique")
    return names
