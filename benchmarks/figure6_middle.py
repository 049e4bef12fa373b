"""The rank of LoRA experts (the paper's Figure 6, middle): hypervolume and stored parameters.

    python benchmarks/figure6_middle.py --shared DIR --output figures --plot figure6_middle.png

Build defaults but for the rank; the scale is that of the default rank for all. Test prompts, greedy, 48 new tokens;
intervals are 95 %, over prompts; differences are paired over prompts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from figures_setting import Setting, cell, gain, hypervolume, parser, plain, stored_parameters, write
from fronts_tables import markdown
from peft_hoe import HoEConfig

RANKS: tuple[int | str, ...] = (2, 4, 8, 16, 32, 64, "full")


def draw(result: dict[str, Any], path: Path) -> None:
    """Hypervolume over rank, with the parameters below."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(6.4, 5.6), layout="constrained", sharex=True, height_ratios=[2, 1]
    )
    places = range(len(result))
    values = [row["hypervolume"] for row in result.values()]
    heights = [value[0] for value in values]
    bars = [[value[0] - value[1] for value in values], [value[2] - value[0] for value in values]]
    top.errorbar(places, heights, yerr=bars, fmt="o-", color="#0072B2", capsize=3)
    top.set(ylabel="hypervolume", title="Rank of the LoRA experts, 95 % intervals over prompts")
    drawn = bottom.bar(places, [row["parameters"] / 1000 for row in result.values()], color="#56B4E9")
    bottom.bar_label(drawn, fmt="%.0f", padding=2, fontsize=9)
    bottom.set(ylabel="stored parameters,\nthousands", xlabel="rank")
    bottom.margins(y=0.2)
    bottom.set_xticks(places, list(result))
    for panel in (top, bottom):
        panel.grid(axis="y", alpha=0.3)
        panel.set_axisbelow(True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Sweep one adapter for each rank."""
    command = parser(__doc__)
    command.add_argument("--objectives", nargs="+", default=["positive", "rich"])
    command.add_argument("--plot", type=Path, help="PNG to write")
    args = command.parse_args()
    setting = Setting(args.shared, args.output, args.objectives)
    adapters = {r: setting.adapter("hoe" if r == HoEConfig.r else f"rank-{r}", r=r) for r in RANKS}
    sweeps = {r: setting.sweep("HoE" if r == HoEConfig.r else f"rank {r}", adapters[r]) for r in RANKS}
    result: dict[str, Any] = {}
    rows = []
    for rank, sweep in sweeps.items():
        volume, parameters = hypervolume(sweep), stored_parameters(adapters[rank])
        difference = None if rank == HoEConfig.r else gain(sweep, sweeps[HoEConfig.r])
        result[str(rank)] = {
            "hypervolume": plain(volume), "against default": plain(difference) if difference else None,
            "parameters": parameters, "points": sweep.points.tolist(),
        }  # fmt: skip
        rows.append([str(rank), cell(volume), cell(difference, True) if difference else "-", f"{parameters:,}"])
    content = {"objectives": args.objectives, "preferences": sweeps[HoEConfig.r].preferences.tolist(), "ranks": result}
    write(setting.folder / "figure6_middle.json", content)
    print(markdown(["rank", "hypervolume", f"against rank {HoEConfig.r}", "stored parameters"], rows))
    if args.plot:
        draw(result, args.plot)


if __name__ == "__main__":
    main()
