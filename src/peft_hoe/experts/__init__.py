"""Policies become experts."""

from .builder import build_adapter
from .report import BuildReport

__all__ = ["BuildReport", "build_adapter"]
