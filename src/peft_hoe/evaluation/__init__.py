"""Evaluation of whole fronts: preference sweeps, their metrics, comparisons, plots and reports, and pairwise judges."""

from .judging.url_judge import URLJudge
from .judging.win_rates import WinRates, win_rates
from .methods.hoe import Generate, HoEMethod
from .sweeps.result import REFERENCE_POINT
from .sweeps.run import sweep
from .sweeps.sweep import Sweep

__all__ = ["REFERENCE_POINT", "Generate", "HoEMethod", "Sweep", "URLJudge", "WinRates", "sweep", "win_rates"]
