"""Which of two fronts dominates the other, as a module for Hugging Face `evaluate`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import datasets
import evaluate

from peft_hoe.metrics import compare_fronts

_DESCRIPTION = """
Compares two fronts of points by Pareto dominance. All objectives are maximised. One point dominates another where it is
nowhere worse and somewhere better.
"""

_INPUTS = """
Args:
    predictions: front A, (points, objectives).
    references: front B, (points, objectives); may have another number of points.
    reference_point: not used; accepted so that `evaluate.combine` can hand it to modules that do.

Returns:
    dominates, dominated: whether each point of B is dominated by some point of A, and the other way round.
    coverage_predictions, coverage_references: C(A, B), the share of B's points that A dominates, and C(B, A).
    share_predictions, share_references: the share of A's, and of B's, points that nothing in both fronts dominates.
    epsilon_predictions, epsilon_references: by how much A's points must improve to cover B, and B's to cover A.
    points_predictions, points_references: how many points there were.
    non_dominated_predictions, non_dominated_references: how many of them no other one of their own front dominates.
    warnings: what to know about the values.
"""

_CITATION = """
@article{zitzler2003performance,
  title={Performance assessment of multiobjective optimizers: an analysis and review},
  author={Zitzler, Eckart and Thiele, Lothar and Laumanns, Marco and Fonseca, Carlos M. and Grunert da Fonseca, Viviane},
  journal={IEEE Transactions on Evolutionary Computation},
  volume={7},
  number={2},
  pages={117--132},
  year={2003}
}
"""


class ParetoDominance(evaluate.Metric):
    """Predictions are front A, references front B. Their rows are no pairs, so the fronts may differ in length."""

    def _info(self) -> evaluate.MetricInfo:
        rows = datasets.List(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": rows, "references": rows}),
        )

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add points of front A, of front B, or of both.

        `evaluate` stores both as columns of one table, so the shorter one is filled up with None.
        """
        columns = [_as_list(predictions), _as_list(references)]
        rows = max(map(len, columns))
        filled = [column + [None] * (rows - len(column)) for column in columns]
        super().add_batch(predictions=filled[0], references=filled[1], **kwargs)

    def _compute(self, predictions: Any, references: Any, reference_point: Any = None) -> dict[str, Any]:
        fronts = [[row for row in front if row is not None] for front in (predictions, references)]
        return asdict(compare_fronts(*fronts))


def _as_list(front: Any) -> list[Any]:
    if front is None:
        return []
    return front.tolist() if hasattr(front, "tolist") else list(front)
