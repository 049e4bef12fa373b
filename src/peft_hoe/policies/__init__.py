"""Policies to build experts from, for those who have none yet."""

from .single_objective import train_policy

__all__ = ["train_policy"]
