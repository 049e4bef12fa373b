"""peft_hoe: one language model, many preferences (HoE, hierarchical experts, arXiv 2505.20925).

Importing the package registers the `HOE` tuner with PEFT and does nothing else.
"""

from importlib import import_module
from typing import Any

from . import versions

versions.check()

from .config import HoEConfig  # noqa: E402
from .errors import (  # noqa: E402
    CheckpointError,
    ExpertError,
    HoEError,
    HoEWarning,
    PreferenceError,
    StaticMergeError,
)
from .experts import build_adapter  # noqa: E402
from .preference import das_dennis, parse_preference, preference_grid  # noqa: E402
from .registration import register  # noqa: E402
from .routing import Route  # noqa: E402
from .specs import ExpertSpec, RouterSpec  # noqa: E402
from .tuner.functional import (  # noqa: E402
    get_preference,
    mark_trained,
    record_votes,
    route,
    set_preference,
    use_preference,
)
from .tuner.layer import HoELayer  # noqa: E402
from .tuner.model import HoEModel  # noqa: E402

register()

# Resolved when they are first used: importing peft_hoe imports no trl.
_TRAINING = {
    "HoEDPOConfig": "training",
    "HoEDPOTrainer": "training",
    "HoEDistillationConfig": "training",
    "HoEDistillationTrainer": "training",
    "HoEGRPOConfig": "training",
    "HoEGRPOTrainer": "training",
    "HoERouterConfig": "training",
    "HoERouterTrainer": "training",
    "ObjectiveWeights": "training.objective_weights",
    "RewardNormalizer": "training.normalization",
    "Sweep": "evaluation",
    "payoff_table": "training.normalization",
    "sweep": "evaluation",
    "train_routers": "training.train_routers",
}


def __getattr__(name: str) -> Any:
    if name == "metrics":  # needs moocore
        return import_module(".metrics", __name__)
    if name not in _TRAINING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_TRAINING[name]}", __name__), name)


__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ExpertError",
    "ExpertSpec",
    "HoEConfig",
    "HoEError",
    "HoELayer",
    "HoEModel",
    "HoEWarning",
    "PreferenceError",
    "Route",
    "RouterSpec",
    "StaticMergeError",
    "build_adapter",
    "das_dennis",
    "get_preference",
    "mark_trained",
    "parse_preference",
    "preference_grid",
    "record_votes",
    "route",
    "set_preference",
    "use_preference",
]
