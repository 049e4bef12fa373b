"""Prompts unlike those of training and of the scale: instructions in place of story openings (the paper's Table 2).

    python benchmarks/table2_unseen.py --shared DIR --output figures

The instructions of self-instruct's `user_oriented_instructions.jsonl`, without their inputs, continued as they are;
for comparison the same on the stories' test prompts. Three objectives, at the paper's seven mixtures: each objective,
each pair alike, all alike. HoE is at build defaults; "router" has a trained one at the centroid in place of the merged
expert; "pairs merged" has an expert in the middle of each pair too; "linear" has the paper's linear interpolation,
which loses length. The others are the baselines of `fronts.py`. The router and the LoRAMoE-like mixture are trained on
stories, with the settings of `router_training.py` and one seed. Greedy, 48 new tokens; the scale
is that of the stories' validation prompts; intervals are 95 %, over prompts.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

from figures_setting import Setting, cell, gain, hypervolume, means, parser, plain, write
from fronts_tables import markdown
from peft_hoe.evaluation import Sweep
from trained_routers import lora_moe_options, trained_routers

LONGEST = 300  # characters
BASELINES: dict[str, tuple[str, dict[str, Any]]] = {
    "RS": ("rs", {}), "RS, norm restored": ("rs_norm", {}), "RS, all weights": ("rs_dense", {}), "TA": ("ta", {}),
    "TIES": ("ties", {}), "PCB-Merging": ("pcb", {}), "MOD": ("mod", {}), "prompting": ("prompting", {}),
    "LoRAMoE-like": ("lora_moe", {}),
}  # fmt: skip


def mixtures(n: int) -> list[list[float]]:
    """Each objective, each pair alike, all alike."""
    sets = [subset for size in (1, 2, n) for subset in itertools.combinations(range(n), size)]
    return [[1 / len(subset) if i in subset else 0.0 for i in range(n)] for subset in sets]


def label(preference: list[float], names: tuple[str, ...]) -> str:
    """The objectives of a mixture."""
    return " & ".join(name for name, weight in zip(names, preference, strict=True) if weight > 0)


def routed(setting: Setting) -> Path:
    """HoE with a trained router at the centroid in place of the merged expert."""
    n = len(setting.objectives)
    untrained = setting.adapter("centroid-router", experts=[], routers=[{"preference": [1 / n] * n}])
    return trained_routers(setting, untrained, "centroid-router", 0)


def measure(setting: Setting, where: str, prompts: list[str]) -> dict[str, Sweep]:
    """All methods on some prompts."""
    kept: dict[str, Any] = {"preferences": mixtures(len(setting.objectives)), "prompts": prompts}
    adapters = {
        "HoE": setting.adapter("hoe"), "HoE, router": routed(setting), "HoE, pairs merged": setting.pairs_merged(),
        "HoE, linear": setting.linear(),
    }  # fmt: skip
    found = {
        name: setting.sweep(name, adapter, folder=f"mixtures-{where}-{name}", **kept)
        for name, adapter in adapters.items()
    }
    for name, (key, options) in BASELINES.items():
        options = options if key != "lora_moe" else lora_moe_options(setting)
        folder = f"mixtures-{where}-{name}"
        found[name] = setting.sweep(name, generate=setting.baseline(key, **options), folder=folder, **kept)
    return found


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
        utility = {
            name: np.diag(sweep.preferences @ setting.scale().normalize(sweep.points).T).mean()
            for name, sweep in sweeps.items()
        }
        rows = [
            [
                name, *(means(point) for point in sweep.points), f"{utility[name]:.3f}", cell(volumes[name]),
                cell(gains[name], True) if name in gains else "-",
            ]
            for name, sweep in sweeps.items()
        ]  # fmt: skip
        header = [label(point, setting.objectives) for point in mixtures(len(args.objectives))]
        header = ["method", *header, "mean λ · normalised reward", "hypervolume", "HoE minus it"]
        print(f"{len(prompts)} {where}\n\n" + markdown(header, rows) + "\n", flush=True)
        write(setting.folder / "table2_unseen.json", result)


if __name__ == "__main__":
    main()
