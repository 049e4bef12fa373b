"""Whether the installed TRL has the trainers that ours extend; imports no trl."""

from __future__ import annotations

from importlib import metadata
from typing import Any, NoReturn

from packaging.version import Version

PPO_SINCE, PPO_UNTIL = "1.9", "1.13"
TRL_SINCE = "1.9"


def missing(name: str) -> str | None:
    """What is wrong with the installed TRL for a trainer or its configuration, and the remedy; None where nothing is."""
    if name.startswith("HoEDistillation") or name == "train_routers":
        return None
    return missing_ppo() if name.startswith("HoERouter") else missing_trl(name)


def missing_ppo() -> str | None:
    """The same for HoERouterTrainer."""
    found = _not_between(PPO_SINCE, PPO_UNTIL)
    return found and (
        f"HoERouterTrainer needs TRL's PPOTrainer, trl>={PPO_SINCE},<{PPO_UNTIL}, but {found}. TRL removed PPOTrainer in "
        f"{PPO_UNTIL}: install it with pip install 'peft-hoe[ppo]', or use HoEGRPOTrainer"
    )


def missing_trl(name: str) -> str | None:
    """The same for what works with every TRL since 1.9."""
    found = _not_between(TRL_SINCE)
    return found and f"{name} needs trl>={TRL_SINCE}, but {found}: install it with pip install 'peft-hoe[train]'"


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
