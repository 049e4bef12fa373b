"""Evaluation of whole fronts: preference sweeps, their metrics, comparisons, plots and reports, and pairwise judges."""

from .front.calibrate import CalibrationReport, calibrate
from .front.front import Front
from .front.solution import Solution, UnreachableError
from .front.weakness import Weakness, weaknesses
from .judging.url_judge import URLJudge
from .judging.win_rates import WinRates, win_rates
from .methods.hoe import Generate, HoEMethod
from .sweeps.result import REFERENCE_POINT
from .sweeps.run import sweep
from .sweeps.sweep import Sweep

__all__ = [
    "REFERENCE_POINT",
    "CalibrationReport",
    "Front",
    "Generate",
    "HoEMethod",
    "Solution",
    "Sweep",
    "URLJudge",
    "UnreachableError",
    "Weakness",
    "WinRates",
    "calibrate",
    "sweep",
    "weaknesses",
    "win_rates",
]
