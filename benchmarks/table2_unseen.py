"""Prompts unlike those of training and of the scale: instructions in place of story openings (the paper's Table 2).

    python benchmarks/table2_unseen.py --shared DIR --output figures

The instructions of self-instruct's `user_oriented_instructions.jsonl`, without their inputs, continued as they are;
for comparison the same on the stories' test prompts. Three objectives, at the paper's seven mixtures: each objective,
each pair alike, all alike. HoE is at build defaults; "pairs merged" has an expert in the middle of each pair too;
"linear" has the paper's linear interpolation, which loses length. RS is all weights of the policies, interpolated;
"norm restored" is the soup of HoE's own one-hot experts with that length given back, module by module. Greedy, 48 new
tokens; the scale is that of the stories' validation prompts; intervals are 95 %, over prompts.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np

from figures_setting import Setting, cell, gain, hypervolume, markdown, means, parser, plain, write
from peft_hoe.evaluation import Sweep

LONGEST = 300  # characters


def mixtures(n: int) -> list[list[float]]:
    """Each objective, each pair alike, all alike."""
    sets = [subset for size in (1, 2, n) for subset in itertools.combinations(range(n), size)]
    return [[1 / len(subset) if i in subset else 0.0 for i in range(n)] for subset in sets]


def label(preference: list[float], names: tuple[str, ...]) -> str:
    """The objectives of a mixture."""
    return " & ".join(name for name, weight in zip(names, preference, strict=True) if weight > 0)


def measure(setting: Setting, where: str, prompts: list[str]) -> dict[str, Sweep]:
    """All methods on some prompts."""
    points = mixtures(len(setting.objectives))
    kept: dict[str, Any] = {"preferences": points, "prompts": prompts}
    return {
        "HoE": setting.sweep("HoE", setting.adapter("hoe"), folder=f"mixtures-{where}-hoe", **kept),
        "HoE, pairs merged": setting.sweep(
            "HoE, pairs merged", setting.pairs_merged(), folder=f"mixtures-{where}-pairs", **kept
        ),
        "RS, norm restored": setting.sweep(
            "RS, norm restored", generate=setting.baseline("rs_norm"), folder=f"mixtures-{where}-rs-norm", **kept
        ),
        "RS": setting.sweep("RS", generate=setting.baseline("rs", dense=True), folder=f"mixtures-{where}-rs", **kept),
        "HoE, linear": setting.sweep("HoE, linear", setting.linear(), folder=f"mixtures-{where}-linear", **kept),
    }


def main() -> None:
    """Sweep the methods on both kinds of prompts."""
    command = parser(__doc__)
    command.add_argument("--objectives", nargs="+", default=["positive", "rich", "dialog"])
    args = command.parse_args()
    setting = Setting(args.shared, args.output, args.objectives)
    lines = (
        (args.shared / "data/self_instruct/user_oriented_instructions.jsonl").read_text(encoding="utf-8").splitlines()
    )
    instructions = [text for text in (json.loads(line)["instruction"] for line in lines) if len(text) <= LONGEST]
    result: dict[str, Any] = {
        "objectives": args.objectives,
        "preferences": mixtures(len(args.objectives)),
        "prompts": {},
    }
    for where, prompts in {"instructions": instructions, "stories": setting.test}.items():
        sweeps = measure(setting, where, prompts)
        volumes = {name: hypervolume(sweep) for name, sweep in sweeps.items()}
        gains = {name: gain(sweeps["HoE"], sweep) for name, sweep in sweeps.items() if name != "HoE"}
        result["prompts"][where] = {
            "number": len(prompts), "points": {name: sweep.points.tolist() for name, sweep in sweeps.items()},
            "hypervolume": {name: plain(volume) for name, volume in volumes.items()},
            "HoE minus": {name: plain(difference) for name, difference in gains.items()},
        }  # fmt: skip
        rows = [
            [label(point, setting.objectives), *(means(sweep.points[k]) for sweep in sweeps.values())]
            for k, point in enumerate(mixtures(len(args.objectives)))
        ]
        utility = [
            np.diag(sweep.preferences @ setting.scale().normalize(sweep.points).T).mean() for sweep in sweeps.values()
        ]
        rows.append(["mean λ · normalised reward", *(f"{value:.3f}" for value in utility)])
        rows.append(["hypervolume", *(cell(volume) for volume in volumes.values())])
        rows.append(["HoE minus it", "-", *(cell(difference, True) for difference in gains.values())])
        print(f"{len(prompts)} {where}\n\n" + markdown(["mixture", *sweeps], rows) + "\n", flush=True)
        write(setting.folder / "table2_unseen.json", result)


if __name__ == "__main__":
    main()
