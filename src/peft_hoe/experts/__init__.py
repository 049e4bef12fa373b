"""Policies become experts."""

from .builder import build_adapter
from .options import Loading, Merging, Pruning, TaskSVD
from .report import BuildReport

__all__ = ["BuildReport", "Loading", "Merging", "Pruning", "TaskSVD", "build_adapter"]
