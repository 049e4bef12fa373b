"""Whether more weight on an objective gives more of it, as a module for Hugging Face `evaluate`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import datasets
import evaluate

from peft_hoe.metrics import steerability

_DESCRIPTION = """
Whether a model that is steered by a preference follows it: more weight on an objective should give more of its reward, and no
other preference should serve a user better than their own.
"""

_INPUTS = """
Args:
    predictions: rewards, (rows, objectives); larger is better. Rows of the same preference are averaged.
    references: the preference that each row was steered to, (rows, objectives); rows sum to 1.
    reference_point: not used; accepted so that `evaluate.combine` can hand it to modules that do.

Returns:
    spearman: rank correlation of weight and reward for each objective; 1 is best.
    order_violations: for each objective, the share of the pairs with more weight where the reward is smaller; 0 is best.
    expected_utility: mean over preferences of the best weighted reward that any row has.
    control_regret: what that is above the weighted rewards of the rows' own preferences; 0 is best.
    rows, preferences: how many rows and distinct preferences there were.
    warnings: what to know about the values, such as that a reward is constant and its rank correlation NaN.
"""


class Steerability(evaluate.Metric):
    """Predictions are rewards, references the preferences that they were reached at."""

    def _info(self) -> evaluate.MetricInfo:
        rows = datasets.List(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": rows, "references": rows}),
        )

    def _compute(self, predictions: Any, references: Any, reference_point: Any = None) -> dict[str, Any]:
        return asdict(steerability(predictions, references))
