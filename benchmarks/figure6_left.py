"""Which experts besides the single-objective ones (the paper's Figure 6, left), for two objectives.

    python benchmarks/figure6_left.py --shared DIR --output figures --seeds 2 --plot figure6_left.png

| configuration | besides the two single-objective LoRA experts |
|---|---|
| none | nothing: the soup of the two experts, its length kept |
| 1 router | a router at [.5, .5] |
| 1 LoRA | a merged expert at [.5, .5], the build's default |
| 1 LoRA + 1 router | that, and a router at [.25, .75] |
| 2 LoRA | merged experts at [1/3, 2/3] and [2/3, 1/3] |

Routers are trained with the settings of `router_training.py`; an interrupted run goes on where it was. Test prompts,
greedy, 48 new tokens. Intervals are 95 %, over prompts and, where there are routers, seeds of training; differences
are paired over prompts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from figures_setting import Setting, cell, gain, hypervolume, parser, plain, stored_parameters, write
from fronts_tables import markdown
from peft_hoe.evaluation import Sweep
from router_training import UPDATES
from trained_routers import trained_routers

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "none": {"experts": []},
    "1 router": {"experts": [], "routers": [[0.5, 0.5]]},
    "1 LoRA": {},
    "1 LoRA + 1 router": {"routers": [[0.25, 0.75]]},
    "2 LoRA": {"experts": [[1 / 3, 2 / 3], [2 / 3, 1 / 3]]},
}
FOLDERS = {"none": "no-middle", "1 LoRA": "hoe"}  # as other scripts call the same adapters


def folder_of(name: str) -> str:
    """Where a configuration's adapter is kept."""
    return FOLDERS.get(name, name.replace(" + ", "-").replace(" ", "-").lower())


def sweep_configuration(setting: Setting, name: str, seeds: int, updates: int) -> Sweep:
    """Of a configuration; with routers, of all seeds of training."""
    folder = folder_of(name)
    adapter = setting.adapter(folder, **CONFIGURATIONS[name])
    if "routers" not in CONFIGURATIONS[name]:
        kept = {"none": "no merged expert", "1 LoRA": "HoE"}.get(name, name)
        return setting.sweep(kept, adapter)
    runs = []
    for seed in range(seeds):
        ready = trained_routers(setting, adapter, folder, seed, updates)
        runs.append(setting.sweep(name, ready, folder=f"{folder}-seed{seed}"))
        print(f"{name}, seed {seed}: {float(hypervolume(runs[-1]).estimate):.3f}", flush=True)
    return Sweep.stack(runs)


def draw(sweeps: dict[str, Sweep], path: Path) -> None:
    """The fronts, one line for each configuration."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(7.2, 5.6), layout="constrained")
    colours = ("#888888", "#E69F00", "#0072B2", "#D55E00", "#009E73")
    for (name, sweep), colour, marker in zip(sweeps.items(), colours, "os^Dv", strict=True):
        label = f"{name} ({float(hypervolume(sweep).estimate):.3f})"
        panel.plot(*sweep.points.T, marker=marker, color=colour, label=label, alpha=0.85, linewidth=1.4, markersize=5.5)
    first, second = next(iter(sweeps.values())).objectives
    panel.set(xlabel=f"mean reward: {first}", ylabel=f"mean reward: {second}")
    panel.set_title("Experts besides the two single-objective ones")
    panel.legend(title="configuration (hypervolume)")
    panel.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Train, sweep, write, print."""
    command = parser(__doc__)
    command.add_argument("--objectives", nargs=2, default=["positive", "rich"])
    command.add_argument("--seeds", type=int, default=2, help="of training (default 2)")
    command.add_argument("--updates", type=int, default=UPDATES, help=f"of each router (default {UPDATES})")
    command.add_argument("--plot", type=Path, help="PNG to write")
    args = command.parse_args()
    setting = Setting(args.shared, args.output, args.objectives)
    sweeps = {name: sweep_configuration(setting, name, args.seeds, args.updates) for name in CONFIGURATIONS}
    result, rows = {}, []
    for name, sweep in sweeps.items():
        volume, runs = hypervolume(sweep), len(sweep.rewards)
        gains = {other: gain(sweep, sweeps[other]) if name != other else None for other in ("none", "1 LoRA")}
        parameters = stored_parameters(setting.folder / "adapters" / folder_of(name))
        result[name] = {
            "hypervolume": plain(volume), "runs": runs, "parameters": parameters, "points": sweep.points.tolist(),
            **{f"against {other}": plain(found) if found else None for other, found in gains.items()},
        }  # fmt: skip
        against = [cell(found, True) if found else "-" for found in gains.values()]
        rows.append([name, str(runs), cell(volume), *against, f"{parameters:,}"])
    content = {
        "objectives": args.objectives, "updates": args.updates,
        "preferences": next(iter(sweeps.values())).preferences.tolist(), "configurations": result,
    }  # fmt: skip
    write(setting.folder / "figure6_left.json", content)
    print(
        markdown(["configuration", "runs", "hypervolume", "against none", "against 1 LoRA", "stored parameters"], rows)
    )
    if args.plot:
        draw(sweeps, args.plot)


if __name__ == "__main__":
    main()
