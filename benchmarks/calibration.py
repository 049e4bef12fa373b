"""What calibrating the dial does, on prompts that the calibration has not seen.

    OMP_NUM_THREADS=1 python benchmarks/calibration.py --shared DIR --output calibration --objectives positive rich

An adapter with build defaults is swept finely on the 120 validation prompts and 840 further openings, and calibrated. Then the
120 test prompts and 840 openings that no choice has read are completed at equal steps of the raw dial and the calibrated one.
Printed for both, in normalised rewards: the CV of the gaps between neighbouring positions, the CV that equal gaps would have by
the noise of these prompts, and the gap ratio; for two objectives where 0.5 lies along the arc, as a share of its length;
Spearman of each objective's weight and reward, and its ceiling: what that noise leaves of a perfect order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import peft_hoe
from figures_setting import parser
from peft_hoe import das_dennis, metrics
from peft_hoe.evaluation import Sweep, calibrate
from stories_bases import BASES, StoriesSetting
from stories_rewards import REWARDS


def middle(sweep: Sweep) -> float:
    """Where along the arc of mean rewards the middle position lies, between 0 and 1."""
    points = sweep.normalized(sweep.points)[np.argsort(sweep.preferences[:, 0])]
    lengths = np.linalg.norm(np.diff(points, axis=0), axis=1)
    return float(lengths[: len(lengths) // 2].sum() / lengths.sum())


def ceiling(sweep: Sweep, dial: NDArray[np.float64]) -> list[float]:
    """Expected Spearman where the true means have the order of the weights, and noise is that of the sweep's prompts."""
    drawn = sweep.replicates(200)
    means, replicates = drawn.estimates[sweep.name], drawn.points[sweep.name]
    ordered = np.empty_like(means)
    for i in range(means.shape[1]):
        ordered[np.argsort(dial[:, i], kind="stable"), i] = np.sort(means[:, i])
    found = [metrics.spearman(ordered + noise, dial) for noise in replicates - means]
    return np.mean(found, axis=0).tolist()


def floor(sweep: Sweep, dial: NDArray[np.float64]) -> float:
    """Expected CV of gaps that are all equal, with the noise of the sweep's prompts: no dial can be measured to be better."""
    drawn = sweep.replicates(200)
    means, replicates = drawn.estimates[sweep.name], drawn.points[sweep.name]
    corners = np.stack([means[np.argmax(dial[:, i])] for i in range(dial.shape[1])])
    return float(np.mean([metrics.gap_variation(dial @ corners + noise, dial) for noise in replicates - means]))


def row(name: str, sweep: Sweep, dial: NDArray[np.float64]) -> str:
    """One line of the table."""
    points = sweep.normalized(sweep.points)
    variation, ratio = metrics.gap_variation(points, dial), metrics.gap_ratio(points, dial)
    centre = f"{middle(sweep):.2f}" if dial.shape[1] == 2 else ""
    order = ", ".join(
        f"{a:.2f} of {b:.2f}" for a, b in zip(metrics.spearman(points, dial), ceiling(sweep, dial), strict=True)
    )
    return f"| {name} | {variation:.3f} | {floor(sweep, dial):.3f} | {ratio:.1f} | {centre} | {order} |"


def main() -> None:
    """Print the table."""
    command = parser(__doc__)
    command.add_argument("--base", choices=BASES, default="stories260k", help="default stories260k")
    command.add_argument("--policies", type=Path, help="folder with further policies BASE-OBJECTIVE")
    command.add_argument("--objectives", nargs="+", choices=REWARDS, default=["positive", "rich"])
    command.add_argument("--limit", type=int, help="use the first prompts only")
    command.add_argument(
        "--sampled", action="store_true", help="sample at temperature 1 instead of the most likely tokens"
    )
    args = command.parse_args()
    setting = StoriesSetting(
        args.shared, args.output / args.base, args.objectives, args.policies, args.limit, args.base
    )
    model = setting.steered(setting.adapter("hoe"))
    n = len(args.objectives)

    def swept(prompts: list[str], preferences: Any, payoff: Any = None) -> Sweep:
        return peft_hoe.sweep(
            model, setting.tokenizer, prompts, setting.rewards, preferences, decoding=setting.decoding(args.sampled),
            payoff=payoff, texts=4 if args.sampled else 1, batch_size=720, progress=False,
        )  # fmt: skip

    fine, steps = das_dennis(n, 20 if n == 2 else 6), das_dennis(n, 10 if n == 2 else 4)
    chosen = swept(setting.validation, fine)
    report = calibrate(model, chosen)
    print(report.table())
    moved = np.stack([report.calibration.preference(step) for step in steps])
    columns = ["CV of gaps", "by noise alone", "gap ratio", "0.5 along the arc", "Spearman of its ceiling"]
    print(f"\n| dial, {len(setting.openings)} test prompts | {' | '.join(columns)} |")
    print("|---|---|---|---|---|---|")
    print(row("raw", swept(setting.openings, steps, chosen.normalizer), steps))
    print(row("calibrated", swept(setting.openings, moved, chosen.normalizer), steps))


if __name__ == "__main__":
    main()
