"""Rewards of completions: from functions, modules, classifiers and URLs to one column for each objective."""

from .classifier import ClassifierReward
from .module import ModuleReward
from .sources import Rewards
from .url import URLReward

__all__ = ["ClassifierReward", "ModuleReward", "Rewards", "URLReward"]
