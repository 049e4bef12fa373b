"""Linear scalarisation against STCH-OMD (the paper's Figure 6, right), from runs of `router_training.py`.

    python benchmarks/router_training.py --shared DIR --output runs.json --arms default "linear scalarisation"
    python benchmarks/figure6_right.py runs.json [MORE.json ...] --output figure6_right.png

Prints the test prompts' rewards and worst gaps per arm over seeds, and draws where training went: the mean rewards of
every update, averaged over seeds, from the untrained router's to the trained one's.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

NAMES = {"default": "STCH-OMD", "linear scalarisation": "linear scalarisation"}
SMOOTHED = 10  # updates averaged for the curve


def by_arm(paths: list[Path]) -> dict[str, list[dict[str, Any]]]:
    runs: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for path in paths:
        for run in json.loads(path.read_text())["runs"]:
            if run["arm"] in NAMES:
                runs[run["arm"]][run["seed"]] = run
    return {arm: [found[seed] for seed in sorted(found)] for arm, found in runs.items()}


def interval(values: np.ndarray) -> float:
    """Half the 95 % interval of a mean (Student's t)."""
    if len(values) < 2:
        return float("nan")
    return float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    lines = [
        "| arm | decoding | seeds | worst gap, 95 % | rewards | weight of the second objective (u) at the end |",
        "|---" * 6 + "|",
    ]
    for arm, found in runs.items():
        for decoding in ("sampled", "greedy"):
            gaps = np.asarray([run["after"][decoding]["worst gap"] for run in found])
            rewards = np.mean([run["after"][decoding]["rewards"] for run in found], axis=0)
            weight = 1 - float(np.mean([np.mean(run["u"][-SMOOTHED:]) for run in found]))
            cells = [
                NAMES[arm], decoding, str(len(found)), f"{gaps.mean():.4f} ± {interval(gaps):.4f}",
                f"{rewards[0]:.3f} / {rewards[1]:.3f}", f"{weight:.2f}",
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(6.4, 4.6), layout="constrained")
    kernel = np.ones(SMOOTHED) / SMOOTHED
    for colour, (arm, found) in zip(("tab:blue", "tab:orange"), sorted(runs.items()), strict=False):
        mean = np.mean([run["curve"] for run in found], axis=0)
        smooth = np.stack([np.convolve(mean[:, i], kernel, mode="valid") for i in range(2)], axis=1)
        panel.plot(smooth[:, 0], smooth[:, 1], "-", color=colour, label=f"{NAMES[arm]}, {len(found)} seeds")
        panel.plot(*smooth[0], "o", color=colour, mfc="white")
        panel.plot(*smooth[-1], "o", color=colour)
    panel.set(xlabel="mean reward: positive", ylabel="mean reward: rich")
    panel.set_title("Training the router at [.25, .75], sampled rollouts")
    panel.grid(alpha=0.3)
    panel.legend(title=f"○ first, ● last {SMOOTHED} updates")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="JSON files of router_training.py")
    parser.add_argument("--output", type=Path, required=True, help="PNG to write")
    arguments = parser.parse_args()
    runs = by_arm(arguments.runs)
    print(table(runs))
    draw(runs, arguments.output)


if __name__ == "__main__":
    main()
