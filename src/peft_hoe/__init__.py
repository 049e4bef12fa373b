"""peft_hoe: one language model, many preferences (HoE, hierarchical experts, arXiv 2505.20925).

Importing the package registers the `HOE` tuner with PEFT and does nothing else: what trains and measures is imported when it
is first used, so that neither trl nor moocore need be installed to steer a model.
"""

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

from . import versions as _versions

_versions.check()

from .config import HoEConfig  # noqa: E402
from .errors import (  # noqa: E402
    CheckpointError,
    ExpertError,
    HoEError,
    HoEWarning,
    MetricError,
    PreferenceError,
    RewardError,
    RowsError,
    StaticMergeError,
)
from .experts import BuildReport, Loading, Merging, Pruning, Ranks, TaskSVD, build_adapter  # noqa: E402
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
from .tuner.kernels.choice import use_kernel  # noqa: E402
from .tuner.layer import HoELayer  # noqa: E402
from .tuner.model import HoEModel  # noqa: E402
from .tuner.trace import RoutingTrace, trace_routing  # noqa: E402

register()


def _export_lora(self: HoEModel, preference: Any, output: Any, **options: Any) -> Any:
    """Write a preference as an ordinary PEFT LoRA that any engine serves; see `peft_hoe.export_lora` for the options.

    Returns:
        an `ExportReport`.
    """
    from .serving import export_lora

    return export_lora(self.model, preference, output, **options)


HoEModel.export_lora = _export_lora

__version__ = metadata.version("peft-hoe")

if TYPE_CHECKING:
    from . import demo, metrics
    from .evaluation import Sweep
    from .evaluation import sweep as sweep
    from .generation import Decoding
    from .objectives import ObjectiveWeights, RewardNormalizer, payoff_table
    from .person import PreferenceEstimate
    from .placing import place
    from .policies import train_policy
    from .serving import export_lora
    from .training import (
        HoEDistillationConfig,
        HoEDistillationTrainer,
        HoEDPOConfig,
        HoEDPOTrainer,
        HoEGRPOConfig,
        HoEGRPOTrainer,
        HoERouterConfig,
        HoERouterTrainer,
        train_routers,
    )
else:
    # Where each of these names lives; a type checker reads the imports above, and so knows which names there are.
    _LAZY = {
        "Decoding": "generation",
        "HoEDPOConfig": "training",
        "HoEDPOTrainer": "training",
        "HoEDistillationConfig": "training",
        "HoEDistillationTrainer": "training",
        "HoEGRPOConfig": "training",
        "HoEGRPOTrainer": "training",
        "HoERouterConfig": "training",
        "HoERouterTrainer": "training",
        "ObjectiveWeights": "objectives",
        "PreferenceEstimate": "person",
        "RewardNormalizer": "objectives",
        "Sweep": "evaluation",
        "demo": "demo",
        "export_lora": "serving",
        "metrics": "metrics",
        "payoff_table": "objectives",
        "place": "placing",
        "sweep": "evaluation",
        "train_policy": "policies",
        "train_routers": "training",
    }

    def __getattr__(name):
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = import_module(f".{_LAZY[name]}", __name__)
        found = module if name == _LAZY[name] else getattr(module, name)
        globals()[name] = found
        return found

    def __dir__():
        return sorted(set(globals()) | set(__all__))


__all__ = [
    "BuildReport",
    "CheckpointError",
    "Decoding",
    "ExpertError",
    "ExpertSpec",
    "HoEConfig",
    "HoEDPOConfig",
    "HoEDPOTrainer",
    "HoEDistillationConfig",
    "HoEDistillationTrainer",
    "HoEError",
    "HoEGRPOConfig",
    "HoEGRPOTrainer",
    "HoELayer",
    "HoEModel",
    "HoERouterConfig",
    "HoERouterTrainer",
    "HoEWarning",
    "Loading",
    "Merging",
    "MetricError",
    "ObjectiveWeights",
    "PreferenceError",
    "PreferenceEstimate",
    "Pruning",
    "Ranks",
    "RewardError",
    "RewardNormalizer",
    "Route",
    "RouterSpec",
    "RoutingTrace",
    "RowsError",
    "StaticMergeError",
    "Sweep",
    "TaskSVD",
    "build_adapter",
    "das_dennis",
    "demo",
    "export_lora",
    "get_preference",
    "mark_trained",
    "metrics",
    "parse_preference",
    "payoff_table",
    "place",
    "preference_grid",
    "record_votes",
    "route",
    "set_preference",
    "sweep",
    "trace_routing",
    "train_policy",
    "train_routers",
    "use_kernel",
    "use_preference",
]
