"""Training of routers: four trainers, one folder each, over what they share in `run`.

Nothing here imports trl but the trainers that need it.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .distillation.config import HoEDistillationConfig
    from .distillation.trainer import HoEDistillationTrainer
    from .dpo.config import HoEDPOConfig
    from .dpo.trainer import HoEDPOTrainer
    from .every_router import train_routers
    from .grpo.config import HoEGRPOConfig
    from .grpo.trainer import HoEGRPOTrainer
    from .ppo.config import HoERouterConfig
    from .ppo.trainer import HoERouterTrainer
else:
    # Resolved when they are first used, so that importing peft_hoe imports no trl.
    _LAZY = {
        "HoEDPOConfig": "dpo.config",
        "HoEDPOTrainer": "dpo.trainer",
        "HoEDistillationConfig": "distillation.config",
        "HoEDistillationTrainer": "distillation.trainer",
        "HoEGRPOConfig": "grpo.config",
        "HoEGRPOTrainer": "grpo.trainer",
        "HoERouterConfig": "ppo.config",
        "HoERouterTrainer": "ppo.trainer",
        "train_routers": "every_router",
    }

    def __getattr__(name):
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from .trl_versions import missing, unavailable

        reason = missing(name)
        found = unavailable(name, reason) if reason else getattr(import_module(f".{_LAZY[name]}", __name__), name)
        globals()[name] = found
        return found

    def __dir__():
        return sorted(set(globals()) | set(__all__))


__all__ = [
    "HoEDPOConfig",
    "HoEDPOTrainer",
    "HoEDistillationConfig",
    "HoEDistillationTrainer",
    "HoEGRPOConfig",
    "HoEGRPOTrainer",
    "HoERouterConfig",
    "HoERouterTrainer",
    "train_routers",
]
