"""What training a router gains on three real experts of a TinyStories Llama, over seeds.

    python benchmarks/router_training.py --shared DIR --output router_training.json --seeds 5

One adapter (policies positive and rich, and the expert between them; build defaults, but the paper's linear
interpolation unless `--interpolation` says otherwise), one router. For each seed and arm the router is trained on the
training prompts; then trained and untrained are compared on the test prompts (`--split`; the settings below were chosen
with `--split validation`). The measure is the worst gap max_i λ_i (1.05 − R̂_i), R̂ normalised by the payoff table of
the validation prompts at the same decoding; lower is better. Sampled rewards: temperature 1, five texts per prompt,
drawn alike for both. 48 new tokens. Intervals: paired over seeds, Student's t, 95 %.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PrinterCallback
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

import peft_hoe
import stories_rewards
from peft_hoe import Decoding
from peft_hoe.config import INTERPOLATIONS
from peft_hoe.objectives import RewardNormalizer, payoff_table
from peft_hoe.router_recipe import RESPONSES, UPDATES
from peft_hoe.training import HoERouterConfig, HoERouterTrainer

OBJECTIVES = ("positive", "rich")
NEW_TOKENS, TEXTS = 48, 5
REFERENCE_POINT = 1.05
FloatArray = NDArray[np.float64]

# HoERouterConfig's defaults, in one forward.
SETTINGS: dict[str, Any] = {"per_device_train_batch_size": RESPONSES, "gradient_accumulation_steps": 1}

# Arm: (votes_for, changed settings)
ARMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "default": (None, {}),
    "votes for all": ("all", {}),
    "objective scaling": (None, {"advantage_scaling": "objective"}),
    "linear scalarisation": (None, {"step": 0.0}),
}

REWARDS = {name: stories_rewards.REWARDS[name] for name in OBJECTIVES}


class Bench:
    """The models, prompts and scales that all runs share."""

    def __init__(
        self, shared: Path, folder: Path, split: str, preference: Sequence[float], interpolation: str = "linear"
    ) -> None:
        self.interpolation = interpolation
        self.base, self.folder, self.preference = shared / "models/stories260k", folder, list(preference)
        self.policies = {name: shared / f"models/policies/stories260k-{name}" for name in OBJECTIVES}
        prompts = json.loads((shared / "data/stories/prompts.json").read_text(encoding="utf-8"))
        self.train, self.test = prompts["train"], prompts[split]
        self.tokenizer = AutoTokenizer.from_pretrained(self.base, padding_side="left")
        self.scales = {sampled: self._scale(prompts["validation"], sampled) for sampled in (True, False)}

    def model(self, votes_for: Any) -> Any:
        """The adapter with an untrained router; built once for each voting set."""
        path = self.folder / f"adapter-{votes_for}"
        if not path.exists():
            router = {"preference": self.preference, "name": "router", "votes_for": votes_for}
            peft_hoe.build_adapter(
                str(self.base), self.policies, path, routers=[router], interpolation=self.interpolation, progress=False
            )
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(self.base), path).eval()

    def _scale(self, prompts: Sequence[str], sampled: bool) -> RewardNormalizer:
        texts = list(prompts) * (TEXTS if sampled else 1)
        return payoff_table(
            self.model(None), texts, REWARDS, processing_class=self.tokenizer,
            decoding=Decoding(NEW_TOKENS, do_sample=sampled), batch_size=240,
        )  # fmt: skip

    @torch.no_grad()
    def texts(self, model: Any, sampled: bool, seed: int) -> list[str]:
        """Completions of the test prompts."""
        how: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if sampled else {}
        settings = GenerationConfig(
            max_new_tokens=NEW_TOKENS, do_sample=sampled, pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.tokenizer.eos_token_id, **how,
        )  # fmt: skip
        batch = self.tokenizer(self.test, return_tensors="pt", padding=True)
        texts: list[str] = []
        torch.manual_seed(10_000 + seed)
        for _ in range(TEXTS if sampled else 1):
            ids = model.generate(**batch, generation_config=settings, preference=self.preference)
            texts += self.tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return texts

    def score(self, texts: Sequence[str], sampled: bool) -> dict[str, Any]:
        """Mean rewards and worst gap of completions."""
        means = np.asarray([np.mean(REWARDS[name](texts, texts)) for name in OBJECTIVES])
        gaps = np.asarray(self.preference) * (REFERENCE_POINT - self.scales[sampled].normalize(means))
        return {"rewards": means.tolist(), "worst gap": float(gaps.max())}

    def measure(self, model: Any, seed: int) -> dict[str, Any]:
        """Rewards and worst gap at both decodings."""
        return {
            name: self.score(self.texts(model, sampled, seed), sampled)
            for name, sampled in (("sampled", True), ("greedy", False))
        }

    def run(self, arm: str, seed: int, updates: int, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Train one router, and compare it with its untrained self."""
        votes_for, own = ARMS[arm]
        model = self.model(votes_for)
        before = self.measure(model, seed)
        started = time.monotonic()
        trainer = HoERouterTrainer(
            args=HoERouterConfig(
                output_dir=str(self.folder / "run"), router="router", max_steps=updates, seed=seed, stop_token="eos",
                response_length=NEW_TOKENS, local_rollout_forward_batch_size=128, save_strategy="no",
                num_sample_generations=0, report_to=[], disable_tqdm=True, use_cpu=True,
                **{**SETTINGS, **own, **changes},
            ),
            processing_class=self.tokenizer,
            model=model,
            reward_model=REWARDS,
            train_dataset=[{"prompt": prompt} for prompt in self.train],
            normalizer=self.scales[True],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        curve = [[entry[f"reward/{name}"] for name in OBJECTIVES] for entry in trainer.state.log_history]
        seconds = round(time.monotonic() - started)
        return {
            "arm": arm, "seed": seed, "before": before, "after": self.measure(model, seed), "curve": curve,
            "u": [entry["advantage_weight/positive"] for entry in trainer.state.log_history], "seconds": seconds,
        }  # fmt: skip


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of the 95 % interval."""
    values = np.asarray(differences)
    if len(values) < 2:
        return float(values.mean()), math.nan
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean()), float(half)


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """One row for each arm and decoding."""
    header = "| arm | decoding | seeds | untrained gap | trained gap | difference, 95 % | untrained rewards | trained rewards |"
    lines = [header, "|" + "---|" * 8]
    for arm in dict.fromkeys(run["arm"] for run in runs):
        mine = [run for run in runs if run["arm"] == arm]
        for decoding in ("sampled", "greedy"):
            before, after = ([run[when][decoding] for run in mine] for when in ("before", "after"))
            gaps = [np.asarray([item["worst gap"] for item in items]) for items in (before, after)]
            mean, half = interval((gaps[1] - gaps[0]).tolist())
            rewards = [
                " / ".join(f"{x:.3f}" for x in np.mean([i["rewards"] for i in items], 0)) for items in (before, after)
            ]
            lines.append(
                f"| {arm} | {decoding} | {len(mine)} | {gaps[0].mean():.4f} | {gaps[1].mean():.4f} | "
                f"{mean:+.4f} ± {half:.4f} | {rewards[0]} | {rewards[1]} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Train, measure, write JSON after every run, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with models/ and data/")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (default 5)")
    parser.add_argument("--first-seed", type=int, default=0, help="default 0")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), help="default all")
    parser.add_argument(
        "--preference", type=float, nargs=2, default=[0.25, 0.75], help="the router's (default .25 .75)"
    )
    parser.add_argument("--updates", type=int, default=UPDATES, help=f"default {UPDATES}")
    parser.add_argument("--interpolation", default="linear", choices=INTERPOLATIONS, help="default linear, the paper's")
    parser.add_argument("--split", default="test", choices=["validation", "test"], help="prompts to report on")
    parser.add_argument("--set", type=json.loads, default={}, metavar="JSON", help="other settings, for the search")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    set_verbosity_error()  # max_new_tokens beats the model's max_length, it would say at every call
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments.shared, Path(folder), arguments.split, arguments.preference, arguments.interpolation)
        result: dict[str, Any] = {
            "peft_hoe": peft_hoe.__version__, "torch": torch.__version__, "split": arguments.split,
            "preference": arguments.preference, "interpolation": arguments.interpolation, "updates": arguments.updates,
            "settings": {**SETTINGS, **arguments.set},
            "payoff": {name: bench.scales[name == "sampled"].payoff.tolist() for name in ("sampled", "greedy")},
            "runs": [],
        }  # fmt: skip
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
            for arm in arguments.arms:
                run = bench.run(arm, seed, arguments.updates, arguments.set)
                result["runs"].append(run)
                arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
                print(f"{arm}, seed {seed}: {run['seconds']} s", file=sys.stderr, flush=True)
    print(table(result["runs"]))


if __name__ == "__main__":
    main()
