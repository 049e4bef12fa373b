"""Experts and routers where a front is weak, by measurement (paper D.2)."""

from .budget import Budget
from .by_measurement import place
from .placement import Placement, Trial

__all__ = ["Budget", "Placement", "Trial", "place"]
