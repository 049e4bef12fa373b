"""Several tasks in one model (the paper's Figure 7): each objective is a task, all have the same weight.

    python benchmarks/figure7_tasks.py --shared DIR --policies DIR2 --output figures --train --plot figure7_tasks.png

A task's score is 0 % for the base and 100 % for the task's own policy, all of its weights. All methods are at the
uniform preference. There HoE without routers is its merged expert, which is what TIES-Merging gives at that
preference. RS is all weights of the policies, interpolated; "RS, norm restored" and MOD use HoE's own one-hot
experts. With `--train`: "HoE, router" has a router at the uniform preference that votes for all experts, the merged
one too; the LoRAMoE-like mixture has one over the one-hot experts; both are trained with the settings of
`router_training.py`. `DIR2` holds the policies that `morlhf_policies.py` trains. Test prompts, greedy, 48 new tokens;
intervals are 95 %, over prompts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from figure5_five import OBJECTIVES
from figures_setting import Setting, parser_of_five, write
from fronts_tables import markdown
from peft_hoe import metrics
from peft_hoe.evaluation import Sweep
from peft_hoe.metrics import Interval
from trained_routers import lora_moe_options, trained_routers

UNIFORM = [1 / len(OBJECTIVES)] * len(OBJECTIVES)
BASELINES: dict[str, tuple[str, dict[str, Any]]] = {
    "RS": ("rs_dense", {}), "RS, norm restored": ("rs_norm", {}), "TA": ("ta", {}), "PCB-Merging": ("pcb", {}),
    "MOD": ("mod", {}),
}  # fmt: skip


def measure(setting: Setting, train: bool) -> dict[str, Sweep]:
    """Sweeps at the uniform preference alone: of the base, the policies and the methods."""

    def method(name: str, generate: Any) -> Sweep:
        return setting.sweep(name, generate=generate, preferences=[UNIFORM], folder=f"uniform-{name.lower()}")

    def hoe(name: str, adapter: Path) -> Sweep:
        return setting.sweep(name, adapter, preferences=[UNIFORM], folder=f"uniform-{name.lower()}")

    found = {"base": method("base", setting.whole())}
    found |= {name: method(f"policy {name}", setting.whole(path)) for name, path in setting.policies.items()}
    found["HoE"] = hoe("HoE", setting.adapter("hoe"))
    if train:
        router = {"preference": UNIFORM, "name": "router", "votes_for": "all"}
        adapter = setting.adapter("uniform-router", routers=[router])
        found["HoE, router"] = hoe("HoE, router", trained_routers(setting, adapter, "uniform-router", 0))
    for name, (key, options) in BASELINES.items():
        found[name] = method(name, setting.baseline(key, **options))
    if train:
        found["LoRAMoE-like"] = method("LoRAMoE-like", setting.baseline("lora_moe", **lora_moe_options(setting)))
    return found


def shares(found: dict[str, Sweep]) -> dict[str, Interval]:
    """Of each method, per task and on average, `(N + 1,)`: 0 is the base, 1 the task's policy; prompts drawn alike for all."""
    drawn = metrics.bootstrap({name: sweep.values for name, sweep in found.items()})

    def share(points: NDArray[Any], base: NDArray[Any], *policies: NDArray[Any]) -> NDArray[Any]:
        best = np.asarray([policy[0, i] for i, policy in enumerate(policies)])
        each = (points[0] - base[0]) / (best - base[0])
        return np.append(each, each.mean())

    methods = [name for name in found if name not in ("base", *OBJECTIVES)]
    return {name: drawn.interval(share, name, "base", *OBJECTIVES) for name in methods}


def draw(found: dict[str, Interval], path: Path) -> None:
    """Bars for each task and the average, one for each method."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(11, 4.8), layout="constrained")
    places, width = np.arange(len(OBJECTIVES) + 1), 0.85 / len(found)
    colours = plt.get_cmap("tab10").colors
    for i, (name, interval) in enumerate(found.items()):
        values = 100 * interval.estimate
        bars = 100 * np.abs(np.stack([interval.estimate - interval.low, interval.high - interval.estimate]))
        left = places + (i - (len(found) - 1) / 2) * width
        panel.bar(
            left, values, width, yerr=bars, color=colours[i], label=name, error_kw={"elinewidth": 0.8, "alpha": 0.6}
        )
    panel.axhline(0, color="black", linewidth=0.8)
    panel.axhline(100, color="black", linewidth=0.8, linestyle=":")
    panel.set_xticks(places, [*OBJECTIVES, "average"])
    panel.set(ylabel="% from base (0) to the task's policy (100)", title="All tasks alike, 95 % intervals over prompts")
    panel.grid(axis="y", alpha=0.3)
    panel.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=len(found), frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, write, print, draw."""
    command = parser_of_five(__doc__)
    command.add_argument("--train", action="store_true", help="also the two methods that need training")
    args = command.parse_args()
    setting = Setting(args.shared, args.output, OBJECTIVES, args.policies)
    sweeps = measure(setting, args.train)
    found = shares(sweeps)
    content = {
        "tasks": OBJECTIVES, "rewards": {name: sweep.points[0].tolist() for name, sweep in sweeps.items()},
        "shares": {
            name: {"estimate": interval.estimate.tolist(), "low": interval.low.tolist(), "high": interval.high.tolist()}
            for name, interval in found.items()
        },
    }  # fmt: skip
    write(setting.folder / "figure7_tasks.json", content)
    rows = []
    for name, interval in found.items():
        cells = zip(interval.estimate, interval.low, interval.high, strict=True)
        rows.append([name, *(f"{100 * value:.0f} [{100 * low:.0f}, {100 * high:.0f}]" for value, low, high in cells)])
    print(markdown(["method", *OBJECTIVES, "average"], rows) + "\n")
    rows = [[name, *(f"{value:.2f}" for value in sweep.points[0])] for name, sweep in sweeps.items()]
    print(markdown(["mean rewards", *OBJECTIVES], rows))
    if args.plot:
        draw(found, args.plot)


if __name__ == "__main__":
    main()
