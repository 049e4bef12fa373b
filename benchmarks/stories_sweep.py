"""A preference sweep of policies of a 260k-parameter TinyStories Llama, beside soups of their experts.

    python benchmarks/stories_sweep.py --shared DIR --output stories_sweep --objectives positive rich

HoE has build defaults (one expert for each policy, one at the centroid, no routers); soups have the one-hot experts only, so
that every preference is their weighted sum, with its length restored or not. For three objectives there is HoE with a
merged expert for each pair, too; "linear" is the paper's linear interpolation. Greedy, 48 new tokens, the test prompts; rewards
are normalised by HoE's own payoff table on the validation prompts. Rewards as in `build_defaults.py`, from which they are
imported.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import peft_hoe
from build_defaults import NEW_TOKENS, OBJECTIVES, score
from peft_hoe.evaluation import Sweep


def load(base: Path, policies: dict[str, str], **options: Any) -> Any:
    """The base with an adapter that is built for it."""
    with tempfile.TemporaryDirectory() as folder:
        peft_hoe.build_adapter(str(base), policies, Path(folder) / "adapter", progress=False, **options)
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), Path(folder) / "adapter").eval()


def midpoints(n: int) -> list[list[float]]:
    """The middle of each pair of n objectives, and the centroid."""
    pairs = itertools.combinations(range(n), 2)
    return [[0.5 if i in pair else 0.0 for i in range(n)] for pair in pairs] + [[1 / n] * n]


def main() -> None:
    """Sweep both, print tables, write sweeps and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with models/ and data/")
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=["positive", "rich"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    base = args.shared / "models/stories260k"
    policies = {name: str(args.shared / f"models/policies/stories260k-{name}") for name in args.objectives}
    texts = json.loads((args.shared / "data/stories/prompts.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    columns = [OBJECTIVES.index(name) for name in args.objectives]

    def rewards(prompts: Sequence[str], completions: Sequence[str]) -> list[list[float]]:
        rows: list[list[float]] = score(completions)[:, columns].tolist()
        return rows

    def measure(name: str, scale: dict[str, Any], **options: Any) -> Sweep:
        return peft_hoe.sweep(
            load(base, policies, **options), tokenizer, texts["test"], rewards, name=name,
            decoding={"max_new_tokens": NEW_TOKENS}, batch_size=256,
            output_dir=args.output / name.lower().replace(", ", "_").replace(" ", "_"), **scale,
        )  # fmt: skip

    hoe = measure("HoE", {"payoff": texts["validation"]})
    scale = {"payoff": hoe.normalizer}
    restored = measure("soup, norm restored", scale, experts=[])
    linear = measure("HoE, linear", scale, interpolation="linear")
    soup = measure("soup", scale, experts=[], interpolation="linear")
    others, compared = [restored, linear, soup], [(hoe, restored), (hoe, linear), (hoe, soup), (linear, soup)]
    if len(columns) > 2:
        pairs = midpoints(len(columns))
        merged = measure("HoE, pairs merged", scale, experts=pairs)
        others.append(merged)
        of_linear = measure("HoE, pairs merged, linear", scale, experts=pairs, interpolation="linear")
        compared += [(hoe, merged), (linear, of_linear), (merged, restored)]
    print(hoe.table() + "\n")
    for sweep in (hoe, *others):
        print(f"{sweep.name}\n{sweep.metrics().table()}\n")
    for first, second in compared:
        print(first.compare(second).table() + "\n")
    hoe.plot(args.output / "front.png", others=others)
    print(hoe.report(args.output / "report.html", others=others))


if __name__ == "__main__":
    main()
