"""Training of routers: rewards, their normalisation, the weights of objectives and the mixed advantage.

Nothing here imports trl but the trainers, each in a module of its own.
"""

from __future__ import annotations

from typing import Any

# Resolved when they are first used, so that importing peft_hoe imports no trl.
_NEED_PPO = {"HoERouterConfig": "router_config", "HoERouterTrainer": "router_trainer"}
_NEED_TRL = {"HoEDPOConfig": "dpo_config", "HoEDPOTrainer": "dpo_trainer"}


def __getattr__(name: str) -> Any:
    if name not in _NEED_PPO | _NEED_TRL:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    from .trl_versions import missing_ppo, missing_trl, unavailable

    reason = missing_ppo() if name in _NEED_PPO else missing_trl(name)
    module = (_NEED_PPO | _NEED_TRL)[name]
    found = unavailable(name, reason) if reason else getattr(import_module(f".{module}", __name__), name)
    globals()[name] = found
    return found
