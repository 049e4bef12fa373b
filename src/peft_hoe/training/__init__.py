"""Training of routers: rewards, their normalisation, the weights of objectives, the mixed advantage and the trainers.

Nothing here imports trl but the trainers that need it, each in a module of its own.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Resolved when they are first used, so that importing peft_hoe imports no trl.
_MODULES = {
    "HoEDPOConfig": "dpo_config",
    "HoEDPOTrainer": "dpo_trainer",
    "HoEDistillationConfig": "distillation_config",
    "HoEDistillationTrainer": "distillation_trainer",
    "HoEGRPOConfig": "grpo_config",
    "HoEGRPOTrainer": "grpo_trainer",
    "HoERouterConfig": "router_config",
    "HoERouterTrainer": "router_trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .trl_versions import missing, unavailable

    reason = missing(name)
    found = unavailable(name, reason) if reason else getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = found
    return found
