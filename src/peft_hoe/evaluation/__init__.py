"""Evaluation of whole fronts: preference sweeps, their metrics, comparisons, plots and reports, and pairwise judges."""

from .judge import WinRates, win_rates
from .methods import Generate, HoEMethod
from .result import REFERENCE_POINT, Sweep
from .sweep import sweep
from .url_judge import URLJudge

__all__ = ["REFERENCE_POINT", "Generate", "HoEMethod", "Sweep", "URLJudge", "WinRates", "sweep", "win_rates"]
