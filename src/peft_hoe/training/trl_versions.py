"""Whether the installed TRL has what our trainers extend; imports no trl."""

from __future__ import annotations

from importlib import metadata
from typing import Any, NoReturn

from packaging.version import Version

SINCE = "1.9"
PPO_SINCE, PPO_UNTIL = SINCE, "1.13"


def _installed() -> str | None:
    try:
        return metadata.version("trl")
    except metadata.PackageNotFoundError:
        return None


def missing_trl(name: str) -> str | None:
    """Why a trainer that needs no PPOTrainer cannot be used, and what to do about it; None where it can."""
    installed = _installed()
    if installed is not None and Version(installed).release >= Version(SINCE).release:
        return None
    found = "trl is not installed" if installed is None else f"trl {installed} is installed"
    return f"{name} needs trl>={SINCE}, but {found}: install it with pip install 'peft-hoe[train]'"


def missing_ppo() -> str | None:
    """What is wrong with the installed TRL and what to do about it; None where nothing is."""
    installed = _installed()
    if installed is not None and Version(PPO_SINCE).release <= Version(installed).release < Version(PPO_UNTIL).release:
        return None
    found = "trl is not installed" if installed is None else f"trl {installed} is installed"
    return (
        f"HoERouterTrainer needs TRL's PPOTrainer, trl>={PPO_SINCE},<{PPO_UNTIL}, but {found}. TRL removed PPOTrainer in "
        f"{PPO_UNTIL}: install it with pip install 'peft-hoe[ppo]', or use the trainers for newer TRL"
    )


def unavailable(name: str, reason: str) -> type:
    """A class of that name that says why it cannot be used."""

    def refuse(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise ImportError(reason)

    return type(name, (), {"__init__": refuse, "__doc__": reason})
