"""What objectives are measured and weighed by: the payoff table's scale, and the STCH-OMD weights."""

from .normalizer import RewardNormalizer
from .payoff import payoff_table
from .weights import ObjectiveWeights

__all__ = ["ObjectiveWeights", "RewardNormalizer", "payoff_table"]
