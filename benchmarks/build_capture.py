"""Whether experts of embeddings and norms help, on validation prompts of a TinyStories Llama.

    python benchmarks/build_capture.py --shared DIR --output build_capture.json

Adapters with the three policies and the midpoint of each pair, built with the defaults but for `capture` and the rank, scored
as in `build_defaults.py`: hypervolume of each pair's front at 11 preferences, normalised to the pair's two policies, greedy, 48
new tokens. The difference of a row to the one without capture at the same rank has the standard error of a bootstrap over
prompts that both share. Corners are the gains of the single experts over the base, 1 being the policy's own. About 7 minutes
on one core.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

import peft_hoe
from build_defaults import OBJECTIVES, Evaluator, Search, difference_error
from peft_hoe.experts import Merging, Pruning
from peft_hoe.experts.options import CAPTURES, DEFAULT_INTERPOLATION, DEFAULT_RESCALE

CHOICES = ((), ("embeddings",), ("norms",), CAPTURES)
HEADER = (
    "| r | capture | mean HV | difference | error | pos x rich | pos x dialog | rich x dialog | positive | rich | dialog |\n"
    + "|---" * 11
    + "|"
)


def compare(run: Search, ranks: list[Any]) -> list[dict[str, Any]]:
    """One row for each rank and choice."""
    found = []
    for rank in ranks:
        first: str | None = None
        for capture in CHOICES:
            settings = {
                "r": rank, "prune": Pruning.share, "rescale": DEFAULT_RESCALE, "interpolation": DEFAULT_INTERPOLATION,
                "density": Merging("ties").options["density"], "capture": list(capture),
            }  # fmt: skip
            run.adapter("capture", **settings)
            key = json.dumps(settings, sort_keys=True)
            first = first or key
            row = run.rows[-1]
            without = next(each for each in found if each["r"] == rank) if found and capture else row
            row["difference"] = row["hypervolume"] - without["hypervolume"]
            row["error"] = difference_error(run.rewards[first], run.rewards[key], run.scale)
            found.append(row)
    return found


def format_row(row: dict[str, Any]) -> str:
    """One line of the table."""
    cells = [row["r"], " and ".join(row["capture"]) or "nothing", f"{row['hypervolume']:.3f}"]
    cells += [f"{row['difference']:+.3f}", f"{row['error']:.3f}"]
    cells += [f"{value:.3f}" for value in row["pairs"]] + [f"{value:.2f}" for value in row["corners"]]
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, required=True, help="folder with models/ and data/")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--ranks", nargs="*", default=["16", "32", "full"], help="numbers, or full")
    parser.add_argument("--limit", type=int, help="use the first prompts only")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    models = arguments.shared / "models"
    prompts = json.loads((arguments.shared / "data/stories/prompts.json").read_text())["validation"]
    base = models / "stories260k"
    start = time.time()
    run = Search(
        base,
        {name: models / "policies" / f"stories260k-{name}" for name in OBJECTIVES},
        Evaluator(base, prompts[: arguments.limit]),
    )
    rows = compare(run, [int(rank) if rank.isdigit() else rank for rank in arguments.ranks])
    content = {
        "peft_hoe": peft_hoe.__version__, "torch": torch.__version__, "prompts": len(run.evaluator.prompts),
        "payoff": run.scale.policies.tolist(), "rows": rows, "seconds": round(time.time() - start),
    }  # fmt: skip
    arguments.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print("\n".join([HEADER, *map(format_row, rows)]))


if __name__ == "__main__":
    main()
