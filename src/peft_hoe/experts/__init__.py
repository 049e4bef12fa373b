"""Policies become experts."""

from .adapter_changes import add_expert, add_objective, add_router, remove
from .builder import build_adapter
from .inspection import Inspection, inspect_adapter
from .option_groups import Loading, Merging, Pruning, Ranks, TaskSVD
from .plan import BuildPlan, plan_build
from .report import BuildReport
from .search import Search, search

__all__ = [
    "BuildPlan",
    "BuildReport",
    "Inspection",
    "Loading",
    "Merging",
    "Pruning",
    "Ranks",
    "Search",
    "TaskSVD",
    "add_expert",
    "add_objective",
    "add_router",
    "build_adapter",
    "inspect_adapter",
    "plan_build",
    "remove",
    "search",
]
