"""What `fronts.py` measures with: prompts, policies, scales, and adapters that are built and trained once and then reused.

    python benchmarks/fronts_adapters.py --shared DIR --output fronts --pairs positive,rich --seeds 5

trains the routers of `hoe_trained` alone, so that `fronts.py --output fronts` finds them. Settings are those that
`router_training.py` chose on validation prompts; each router has its default voting set. An interrupted run goes on where
it was.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

import peft_hoe
from peft_hoe.training.normalization import RewardNormalizer, payoff_table
from router_training import NEW_TOKENS, TEXTS, UPDATES
from stories_rewards import REWARDS
from trained_routers import trained_routers

OBJECTIVES = ("positive", "rich", "dialog")
SETS = {"positive,rich": OBJECTIVES[:2], "positive,dialog": ("positive", "dialog"), "all": OBJECTIVES}


def router_preferences(n: int, centroid: bool) -> list[list[float]]:
    """[.25, .75] and [.75, .25] for two objectives, for three the permutations of [.25, .25, .5]; and the centroid, or not."""
    between = [0.25, 0.75] if n == 2 else [0.25, 0.25, 0.5]
    found = [list(point) for point in sorted(set(itertools.permutations(between)))]
    return [*found, [1 / n] * n] if centroid else found


class Problem:
    """One set of objectives: its policies, prompts, rewards and scales.

    Args:
        shared: folder with models/ and data/.
        output: folder of all sets; what is kept for this one is in a folder of its own there.
        key: of `SETS`.
        limit: use the first prompts only.
    """

    def __init__(self, shared: Path, output: Path, key: str, limit: int | None = None) -> None:
        self.key, self.names, self.folder = key, SETS[key], output / key.replace(",", "-")
        self.base = str(shared / "models/stories260k")
        self.policies = {name: str(shared / f"models/policies/stories260k-{name}") for name in self.names}
        self.prompts = json.loads((shared / "data/stories/prompts.json").read_text(encoding="utf-8"))
        self.test, self.validation = self.prompts["test"][:limit], self.prompts["validation"][:limit]
        self.rewards = {name: REWARDS[name] for name in self.names}
        self.tokenizer = AutoTokenizer.from_pretrained(self.base, padding_side="left")
        self.folder.mkdir(parents=True, exist_ok=True)

    def model(
        self, name: str, adapter: Path | None = None, policies: dict[str, str] | None = None, **options: Any
    ) -> Any:
        """The base with an adapter: the one in `adapter`, or one that is built once in `adapters/<name>`."""
        path = adapter or self.folder / "adapters" / name
        if not (path / "adapter_config.json").exists():
            peft_hoe.build_adapter(self.base, policies or self.policies, path, progress=False, **options)
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(self.base), path).eval()

    def scale(self, sampled: bool) -> RewardNormalizer:
        """The payoff table of HoE's one-hot experts on the validation prompts, measured once."""
        path = self.folder / f"payoff-{'sampled' if sampled else 'greedy'}.json"
        if not path.exists():
            found = payoff_table(
                self.model("hoe"), list(self.validation) * (TEXTS if sampled else 1), self.rewards,
                processing_class=self.tokenizer, max_new_tokens=NEW_TOKENS, do_sample=sampled, batch_size=240,
            )  # fmt: skip
            path.write_text(
                json.dumps({"payoff": found.payoff.tolist(), "decoding": dict(found.decoding)}, default=str)
            )
        kept = json.loads(path.read_text(encoding="utf-8"))
        return RewardNormalizer(np.asarray(kept["payoff"]), self.names, kept["decoding"])

    def trained_hoe(self, name: str, seed: int, policies: dict[str, str] | None = None, merged: bool = False) -> Path:
        """HoE with routers that are trained on the training prompts; the folder, with its CPU time in `training.json`.

        Args:
            name: of the folder.
            seed: of training.
            policies: in place of the set's own.
            merged: whether the centroid has a merged expert, or a router.
        """
        routers = [{"preference": preference} for preference in router_preferences(len(self.names), not merged)]
        experts = {} if merged else {"experts": []}
        return trained_routers(
            self.folder / "trained" / f"{name}-seed{seed}",
            lambda: self.model(f"{name}-untrained", policies=policies, routers=routers, **experts),
            tokenizer=self.tokenizer, rewards=self.rewards, prompts=self.prompts["train"],
            normalizer=self.scale(True), seed=seed, updates=UPDATES,
        )  # fmt: skip


def quiet() -> None:
    """One thread, no bars, no notes on generation settings."""
    torch.set_num_threads(1)
    disable_progress_bar()
    set_verbosity_error()


def main() -> None:
    """Train HoE's routers for some sets of objectives and seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with models/ and data/")
    parser.add_argument("--output", type=Path, required=True, help="directory to write, that of fronts.py")
    parser.add_argument("--pairs", nargs="+", choices=SETS, default=list(SETS), help="sets of objectives")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (default 5)")
    arguments = parser.parse_args()
    quiet()
    for key, seed in itertools.product(arguments.pairs, range(arguments.seeds)):
        problem = Problem(arguments.shared, arguments.output, key)
        print(f"{key}, seed {seed}: {problem.trained_hoe('hoe_trained', seed)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
