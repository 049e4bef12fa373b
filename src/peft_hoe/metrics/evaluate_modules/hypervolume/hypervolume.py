"""Hypervolume of a front, as a module for Hugging Face `evaluate`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import datasets
import evaluate

from peft_hoe.metrics import hypervolume_record
from peft_hoe.metrics.validation import check_reference_point

_DESCRIPTION = """
The volume of the objective space that a front of points dominates above a reference point. All objectives are maximised.
"""

_INPUTS = """
Args:
    predictions: the points, (points, objectives).
    reference_point: one number for all objectives, or one for each. Required, and recorded in the answer; use the same
        one for everything that you compare.

Returns:
    hypervolume: the volume.
    reference_point: one number for each objective.
    points, non_dominated, clipped: how many points there were, how many of them no other one dominates, and how many lie
        below the reference point in some objective.
    warnings: what to know about the value, such as that no point is above the reference point.
"""

_CITATION = """
@inproceedings{zitzler1998multiobjective,
  title={Multiobjective optimization using evolutionary algorithms: a comparative case study},
  author={Zitzler, Eckart and Thiele, Lothar},
  booktitle={Parallel Problem Solving from Nature},
  pages={292--301},
  year={1998}
}
"""


class Hypervolume(evaluate.Metric):
    """Predictions are points; `reference_point` is an argument of `compute`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.List(datasets.Value("float64"))}),
        )

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, Any] | None:
        """Compute the hypervolume of all points that were added.

        A missing reference point is found before `evaluate` gives up what was added.
        """
        if self.process_id == 0:
            check_reference_point(kwargs.get("reference_point"))
        return super().compute(predictions=predictions, references=references, **kwargs)

    def _compute(self, predictions: Any, reference_point: Any = None) -> dict[str, Any]:
        return asdict(hypervolume_record(predictions, reference_point=reference_point))
