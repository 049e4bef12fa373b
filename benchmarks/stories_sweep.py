"""A preference sweep of policies of a 260k-parameter TinyStories Llama, beside rewarded soups of the same policies.

    python benchmarks/stories_sweep.py --shared DIR --output stories_sweep --objectives positive rich

HoE has build defaults (one expert for each policy, one at the centroid, no routers); soups (RS) are the weighted sums of the
one-hot experts. Greedy, 48 new tokens, the test prompts; rewards are normalised by HoE's own payoff table on the validation
prompts. Rewards as in `build_defaults.py`, from which they are imported.
"""

from __future__ import annotations

import argparse
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
from peft_hoe.evaluation.baselines import BASELINES


def load(base: Path, policies: dict[str, str]) -> Any:
    """The base with an adapter that is built for it."""
    with tempfile.TemporaryDirectory() as folder:
        peft_hoe.build_adapter(str(base), policies, Path(folder) / "adapter", progress=False)
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), Path(folder) / "adapter").eval()


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

    common: dict[str, Any] = {"prompts": texts["test"], "rewards": rewards, "batch_size": 256}
    hoe = peft_hoe.sweep(
        load(base, policies), tokenizer, payoff_prompts=texts["validation"], max_new_tokens=NEW_TOKENS,
        output_dir=args.output / "hoe", **common,
    )  # fmt: skip
    soups = BASELINES["rs"].make(
        base, policies, tokenizer=tokenizer, folder=args.output / "baselines", max_new_tokens=NEW_TOKENS
    )
    soup = peft_hoe.sweep(generate=soups, normalizer=hoe.normalizer, output_dir=args.output / "rs", **common)
    for text in (hoe.table(), hoe.metrics().table(), hoe.compare(soup).table()):
        print(text + "\n")
    hoe.plot(args.output / "front.png", others=[soup])
    print(hoe.report(args.output / "report.html", others=[soup]))


if __name__ == "__main__":
    main()
