"""Policies to build experts from, for those who have none yet."""

from .single_objective import policy_gradient_config, train_policy

__all__ = ["policy_gradient_config", "train_policy"]
