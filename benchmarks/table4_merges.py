"""Methods of merging the middle expert (the paper's Table 4), at build defaults otherwise.

    python benchmarks/table4_merges.py --shared DIR --output figures

The expert at the centroid is merged by task arithmetic (`linear`), TIES and PCB-Merging, each with its default
options. One more row is task arithmetic with the policies' length restored (`rescale="policy_norm"`, which leaves
one-hot experts as they are); "none" has no merged expert; two rows have the paper's linear interpolation. Test
prompts, greedy, 48 new tokens; intervals are 95 %, over prompts; differences are paired over prompts.
"""

from __future__ import annotations

import numpy as np

from figures_setting import Setting, cell, gain, hypervolume, means, parser, plain, write
from fronts_tables import markdown


def main() -> None:
    """Sweep one adapter for each method."""
    command = parser(__doc__)
    command.add_argument("--objectives", nargs="+", default=["positive", "rich"])
    args = command.parse_args()
    setting = Setting(args.shared, args.output, args.objectives)
    names = ["linear", "pcb", "ties"]
    adapters = {name: setting.adapter("hoe" if name == "ties" else f"merge-{name}", merging=name) for name in names}
    sweeps = {name: setting.sweep("HoE" if name == "ties" else f"merge {name}", adapters[name]) for name in names}
    adapters["linear, policy_norm"] = setting.adapter("merge-linear-norm", merging="linear", rescale="policy_norm")
    sweeps["linear, policy_norm"] = setting.sweep("merge linear norm", adapters["linear, policy_norm"])
    soup = setting.sweep("no merged expert", setting.adapter("no-middle", experts=[]))
    plain_soup = setting.adapter("no-middle-linear", experts=[], interpolation="linear")
    linear = {
        "none, linear interpolation": setting.sweep("no merged expert, linear", plain_soup),
        "ties, linear interpolation": setting.sweep("HoE, linear", setting.linear()),
    }
    n = len(args.objectives)
    middle = int(np.abs(soup.preferences - 1 / n).max(1).argmin())
    result, rows = {}, []
    for name, sweep in {"none": soup, **sweeps, **linear}.items():
        volume = hypervolume(sweep)
        gains = {
            other: gain(sweep, reference) if name != other else None
            for other, reference in {"none": soup, "linear": sweeps["linear"]}.items()
        }
        result[name] = {
            "hypervolume": plain(volume), "middle": sweep.points[middle].tolist(), "points": sweep.points.tolist(),
            **{f"against {other}": plain(found) if found else None for other, found in gains.items()},
        }  # fmt: skip
        differences = [cell(found, True) if found else "-" for found in gains.values()]
        rows.append([name, cell(volume), *differences, means(sweep.points[middle])])
    content = {"objectives": args.objectives, "preferences": soup.preferences.tolist(), "methods": result}
    write(setting.folder / "table4_merges.json", content)
    print(markdown(["merge", "hypervolume", "against none", "against linear", "rewards in the middle"], rows))


if __name__ == "__main__":
    main()
