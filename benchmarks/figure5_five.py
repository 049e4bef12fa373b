"""Five objectives (the paper's Figure 5): the paper's three preferences side by side, and the hypervolume over a grid.

    python benchmarks/figure5_five.py --shared DIR --policies DIR2 --output figures --plot figure5_five.png

`DIR2` holds the policies that `morlhf_policies.py` trains. HoE is at build defaults: five one-hot experts and one at
the centroid; "pairs merged" has ten more, in the middle of each pair; "linear" has the paper's linear interpolation,
which loses length. RS is all weights of the policies, interpolated; "norm restored" is the soup of HoE's own one-hot
experts with that length given back. The grid is Das and Dennis' with three partitions, 35 points, and the paper's
three preferences. Test prompts, greedy, 48 new tokens; intervals are 95 %, over prompts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from figures_setting import Setting, cell, gain, hypervolume, parser_of_five, plain, write
from fronts_tables import markdown
from peft_hoe.evaluation import Sweep
from peft_hoe.preference import das_dennis

OBJECTIVES = ("positive", "rich", "dialog", "past", "pronouns")
PAPER = [[1 / 5] * 5, [1 / 6] * 3 + [1 / 4] * 2, [1 / 9] * 3 + [1 / 3] * 2]  # [.17 ..., .25 ...], [.11 ..., .33 ...]
COLOURS = {  # what is drawn
    "HoE": "#0072B2",
    "HoE, linear": "#56B4E9",
    "HoE, pairs merged": "#E69F00",
    "RS, norm restored": "#D55E00",
    "RS": "#009E73",
    "base": "#888888",
}


def measure(setting: Setting) -> dict[str, Sweep]:
    """Sweeps of the methods."""
    grid = [*das_dennis(len(OBJECTIVES), 3).tolist(), *PAPER]
    dense = setting.baseline("rs_dense")
    return {
        "HoE": setting.sweep("HoE", setting.adapter("hoe"), preferences=grid),
        "HoE, pairs merged": setting.sweep("HoE, pairs merged", setting.pairs_merged(), preferences=grid),
        "RS, norm restored": setting.sweep("RS, norm restored", generate=setting.baseline("rs_norm"), preferences=grid),
        "RS": setting.sweep("RS", generate=dense, preferences=grid),
        "HoE, linear": setting.sweep("HoE, linear", setting.linear(), preferences=grid),
        "HoE, pairs merged, linear": setting.sweep(
            "HoE, pairs merged, linear", setting.pairs_merged("linear"), preferences=grid
        ),
    }


def draw(found: dict[str, NDArray[Any]], path: Path) -> None:
    """One panel for each of the paper's preferences; normalised rewards `(3, N)` of each method."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(14, 5), layout="constrained", sharey=True)
    places = range(len(OBJECTIVES))
    for k, (panel, preference) in enumerate(zip(panels, PAPER, strict=True)):
        for name, marker in zip(COLOURS, "osP^Dv", strict=True):
            style = ":" if name == "base" else "-"
            panel.plot(
                places, found[name][k], style, color=COLOURS[name], marker=marker, markersize=6, alpha=0.85, label=name
            )
        for place in places:
            panel.axvline(place, color="#444444", linewidth=0.8, zorder=0)
        panel.set_xticks(places, [f"{name}\n{weight:.2f}" for name, weight in zip(OBJECTIVES, preference, strict=True)])
        panel.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("normalised reward")
    figure.suptitle("The paper's three preferences (weights below the names)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Sweep, write, print, draw."""
    args = parser_of_five(__doc__).parse_args()
    setting = Setting(args.shared, args.output, OBJECTIVES, args.policies)
    sweeps = measure(setting)
    base = setting.sweep("base", generate=setting.whole(), preferences=PAPER[:1]).points[0]
    normalize = setting.scale().normalize
    found = {name: normalize(sweep.points[-len(PAPER) :]) for name, sweep in sweeps.items()}
    found["base"] = normalize(np.tile(base, (len(PAPER), 1)))
    volumes = {name: hypervolume(sweep) for name, sweep in sweeps.items()}
    utilities = {name: sweep.metrics().values["expected utility"] for name, sweep in sweeps.items()}
    gains = {name: gain(sweeps["HoE"], sweep) for name, sweep in sweeps.items() if name != "HoE"}
    content = {
        "objectives": OBJECTIVES, "payoff": setting.scale().payoff.tolist(), "base": base.tolist(),
        "preferences": sweeps["HoE"].preferences.tolist(),
        "points": {name: sweep.points.tolist() for name, sweep in sweeps.items()},
        "hypervolume": {name: plain(volume) for name, volume in volumes.items()},
        "expected utility": {name: plain(utility) for name, utility in utilities.items()},
        "HoE minus": {name: plain(difference) for name, difference in gains.items()},
    }  # fmt: skip
    write(setting.folder / "figure5_five.json", content)
    rows = [
        [
            ", ".join(f"{weight:.2f}" for weight in preference), name, *(f"{value:.2f}" for value in table[k]),
            f"{table[k].mean():.3f}", f"{table[k] @ np.asarray(preference):.3f}",
        ]
        for k, preference in enumerate(PAPER)
        for name, table in found.items()
    ]  # fmt: skip
    print(markdown(["preference", "method", *OBJECTIVES, "average", "λ-weighted"], rows) + "\n")
    rows = [
        [name, cell(volume), cell(gains[name], True) if name in gains else "-", cell(utilities[name])]
        for name, volume in volumes.items()
    ]
    print(markdown(["method", "hypervolume", "HoE minus it", "expected utility"], rows))
    if args.plot:
        draw(found, args.plot)


if __name__ == "__main__":
    main()
