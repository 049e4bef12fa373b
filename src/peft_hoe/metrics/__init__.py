"""Quality of fronts, steerability and their uncertainty: plain functions on lists, arrays and tensors.

All objectives are maximised; rows are points; the last axis is objectives. Importing this needs moocore.
"""

try:
    import moocore as _moocore  # noqa: F401
except ImportError as error:
    raise ImportError(f"peft_hoe.metrics needs moocore: pip install 'peft-hoe[eval]' ({error})") from error

from .bootstrap import Replicates, bootstrap
from .comparison import Comparison, compare_fronts
from .dominance import coverage, dominates, front_dominates, non_dominated_mask, union_shares
from .indicators import epsilon, expected_utility, igd_plus, sparsity, spread
from .intervals import Interval, basic_interval, percentile_interval
from .modules import load, path
from .spacing import gap_ratio, gap_variation, mean_inner_product
from .steerability import Steerability, control_regret, order_violations, spearman, steerability
from .validation import REFERENCE_POINT
from .volume import HypervolumeRecord, hypervolume, hypervolume_record, relative_hypervolume

__all__ = [
    "REFERENCE_POINT",
    "Comparison",
    "HypervolumeRecord",
    "Interval",
    "Replicates",
    "Steerability",
    "basic_interval",
    "bootstrap",
    "compare_fronts",
    "control_regret",
    "coverage",
    "dominates",
    "epsilon",
    "expected_utility",
    "front_dominates",
    "gap_ratio",
    "gap_variation",
    "hypervolume",
    "hypervolume_record",
    "igd_plus",
    "load",
    "mean_inner_product",
    "non_dominated_mask",
    "order_violations",
    "path",
    "percentile_interval",
    "relative_hypervolume",
    "sparsity",
    "spearman",
    "spread",
    "steerability",
    "union_shares",
]
