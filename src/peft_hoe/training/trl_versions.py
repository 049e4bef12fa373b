"""Which trainers of TRL there are for ours to extend; imports trl only where that is asked for."""

from __future__ import annotations

import functools
import warnings
from importlib import import_module, metadata
from types import ModuleType
from typing import Any, NoReturn

from packaging.version import Version

TRL_SINCE = "1.9"
PPO_UNTIL = "1.13"  # from here on TRL has no PPOTrainer
_NO_TRL = ("HoERouter", "HoEDistillation", "train_routers")


def missing(name: str) -> str | None:
    """What is wrong with the installed TRL for a trainer or its configuration, and the remedy; None where nothing is."""
    found = None if name.startswith(_NO_TRL) else _not_between(TRL_SINCE)
    return found and f"{name} needs trl>={TRL_SINCE}, but {found}: install it with pip install 'peft-hoe[train]'"


@functools.cache
def trl_ppo() -> ModuleType | None:
    """TRL's module with PPOTrainer and PPOConfig; None where the installed TRL has none that HoERouterTrainer can extend."""
    if _not_between(TRL_SINCE, PPO_UNTIL):
        return None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You are importing from 'trl.experimental'")
        try:
            return import_module("trl.experimental.ppo")
        except ImportError:
            return None


def _not_between(since: str, until: str | None = None) -> str | None:
    """What is installed where it is not one of these versions."""
    try:
        installed = metadata.version("trl")
    except metadata.PackageNotFoundError:
        return "trl is not installed"
    release = Version(installed).release
    fits = release >= Version(since).release and (until is None or release < Version(until).release)
    return None if fits else f"trl {installed} is installed"


def unavailable(name: str, reason: str) -> type:
    """A class of that name that says why it cannot be used."""

    def refuse(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise ImportError(reason)

    return type(name, (), {"__init__": refuse, "__doc__": reason})
