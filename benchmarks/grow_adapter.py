"""An adapter of two real policies grows and shrinks: rewards and texts before and after.

    python benchmarks/grow_adapter.py --shared DIR

The adapter of the policies positive and rich of a TinyStories Llama, with its merged middle, gains an objective (dialog), a
merged expert in the middle of all three, and a router; then it loses the last two again. After each step the mean rewards of
greedy completions (48 new tokens) of the first test prompts are printed, at old and at new preferences, and how many texts at
the old ones are those of before. Half a minute on one core.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_hoe import ExpertSpec
from peft_hoe.experts import add_expert, add_objective, add_router, build_adapter, remove
from stories_rewards import REWARDS

OLD = ([1.0, 0.0], [0.75, 0.25], [0.5, 0.5], [0.0, 1.0])
HEADER = "| step | preference | positive | rich | dialog | texts as before |\n" + "|---" * 6 + "|"


class Stories:
    """Completions of the same prompts by adapters of one base."""

    def __init__(self, base: Path, prompts: list[str]) -> None:
        self.base, self.prompts = base, prompts
        self.tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")

    @torch.no_grad()
    def texts(self, adapter: Path, preference: list[float]) -> list[str]:
        """One completion for each prompt."""
        model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(self.base), adapter).eval()
        batch = self.tokenizer(self.prompts, return_tensors="pt", padding=True)
        output = model.generate(**batch, preference=preference, do_sample=False, max_new_tokens=48, max_length=None)
        found: list[str] = self.tokenizer.batch_decode(
            output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )
        return found


def row(step: str, preference: list[float], texts: list[str], before: list[str] | None) -> str:
    """One line of the table."""
    means = [float(np.mean(REWARDS[name](texts, texts))) for name in ("positive", "rich", "dialog")]
    same = "-" if before is None else f"{sum(a == b for a, b in zip(texts, before, strict=True))} of {len(texts)}"
    point = ", ".join(f"{weight:g}" for weight in preference)
    return f"| {step} | {point} | " + " | ".join(f"{mean:.3f}" for mean in means) + f" | {same} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, required=True, help="folder with models/ and data/")
    parser.add_argument("--prompts", type=int, default=60, help="how many (default 60)")
    arguments = parser.parse_args()
    models = arguments.shared / "models"
    prompts = json.loads((arguments.shared / "data/stories/prompts.json").read_text())["test"][: arguments.prompts]
    stories = Stories(models / "stories260k", prompts)
    policies = {name: models / "policies" / f"stories260k-{name}" for name in ("positive", "rich", "dialog")}
    with tempfile.TemporaryDirectory() as folder:
        place = [Path(folder) / str(step) for step in range(5)]
        two = {name: policies[name] for name in ("positive", "rich")}
        build_adapter(stories.base, two, place[0], progress=False)
        print(HEADER)
        before = {tuple(point): stories.texts(place[0], point) for point in OLD}
        for point in OLD:
            print(row("two objectives", point, before[tuple(point)], None), flush=True)

        def show(step: str, adapter: Path, old: Any, new: Any = (), pad: int = 1) -> None:
            for point in old:
                padded = [*point, *[0.0] * pad]
                print(row(step, padded, stories.texts(adapter, padded), before[tuple(point)]), flush=True)
            for point in new:
                print(row(step, point, stories.texts(adapter, point), None), flush=True)

        add_objective(place[0], "dialog", policies["dialog"], place[1])
        show("dialog added", place[1], OLD, [[0, 0, 1], [0.5, 0, 0.5], [1 / 3, 1 / 3, 1 / 3]])
        add_expert(place[1], ExpertSpec([1 / 3, 1 / 3, 1 / 3], name="middle"), place[2])
        show("expert in the middle added", place[2], OLD, [[0, 0, 1], [1 / 3, 1 / 3, 1 / 3]])
        add_router(place[2], [0.75, 0.25, 0], place[3])
        show("router added, not trained", place[3], OLD)
        remove(place[3], place[4], routers=["r0"], experts=["middle"])
        show("router and middle removed", place[4], OLD, [[0, 0, 1]])


if __name__ == "__main__":
    main()
