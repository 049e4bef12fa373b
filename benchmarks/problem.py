"""One set of objectives on one base, for benchmarks that compare fronts: models, prompts, rewards, one scale, adapters.

Adapters are built once and kept in the folder, so that a script that is run again goes on where it was. The scale is one
payoff table, that of the one-hot experts of HoE at build defaults at the same decoding on the validation prompts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

import peft_hoe
from peft_hoe import Decoding
from peft_hoe.evaluation.baselines import BASELINES
from peft_hoe.objectives import RewardNormalizer, payoff_table

BATCH = 240  # texts at once, for the scale


def quiet() -> None:
    """One thread, no bars, no notes on generation settings (max_new_tokens beats the model's max_length)."""
    torch.set_num_threads(1)
    disable_progress_bar()
    set_verbosity_error()


class Problem:
    """A base, policies, rewards and prompts.

    Args:
        folder: for everything that is kept.
        base: folder of the base.
        policies: folder of each objective's policy.
        rewards: of each objective.
        prompts: `train`, `validation` and `test`; texts or chats.
        new_tokens: at most, in a text.
        stop_strings: where texts end besides at the stop tokens.
    """

    def __init__(
        self,
        folder: Path,
        *,
        base: str | Path,
        policies: Mapping[str, str],
        rewards: Mapping[str, Any],
        prompts: Mapping[str, Sequence[Any]],
        new_tokens: int,
        stop_strings: tuple[str, ...] = (),
    ) -> None:
        quiet()
        self.objectives, self.folder, self.base = tuple(policies), folder, str(base)
        self.policies, self.rewards = dict(policies), {name: rewards[name] for name in policies}
        self.prompts = {split: list(given) for split, given in prompts.items()}
        self.test, self.validation = self.prompts["test"], self.prompts["validation"]
        self.new_tokens, self.stop_strings = new_tokens, stop_strings
        self.tokenizer = AutoTokenizer.from_pretrained(self.base, padding_side="left")
        self.folder.mkdir(parents=True, exist_ok=True)

    def decoding(self, sampled: bool = False) -> Decoding:
        """How texts are written."""
        return Decoding(self.new_tokens, do_sample=sampled, stop_strings=self.stop_strings)

    def model(self, path: str | None = None) -> Any:
        """A model without adapter, in float32; by default the base."""
        return AutoModelForCausalLM.from_pretrained(path or self.base, dtype=torch.float32).eval()

    def adapter(self, name: str, policies: Mapping[str, str] | None = None, **options: Any) -> Path:
        """The folder of an adapter that is built once, with `build_adapter`'s options; of other policies, where given."""
        path = self.folder / "adapters" / name
        if not (path / "adapter_config.json").exists():
            peft_hoe.build_adapter(self.base, policies or self.policies, path, progress=False, **options)
        return path

    def steered(self, path: Path) -> Any:
        """The base with an adapter."""
        return PeftModel.from_pretrained(self.model(), path).eval()

    def scale(self, sampled: bool = False) -> RewardNormalizer:
        """The payoff table of HoE's one-hot experts on the validation prompts, five texts each if sampled; measured once."""
        path = self.folder / f"payoff-{'sampled' if sampled else 'greedy'}.json"
        if not path.exists():
            found = payoff_table(
                self.steered(self.adapter("hoe")), self.validation * (5 if sampled else 1), self.rewards,
                processing_class=self.tokenizer, decoding=self.decoding(sampled), batch_size=BATCH,
            )  # fmt: skip
            path.write_text(json.dumps(found.state_dict()), encoding="utf-8")
        table = RewardNormalizer.from_state_dict(json.loads(path.read_text(encoding="utf-8")))
        return by_prompt(table, len(self.validation))

    def baseline(
        self, name: str, policies: Mapping[Any, str] | None = None, *, sampled: bool = False, **options: Any
    ) -> Any:
        """One of `BASELINES` on these policies, or others, where given."""
        return BASELINES[name].make(
            self.base, policies or self.policies, tokenizer=self.tokenizer, folder=self.folder / "baselines" / name,
            decoding=self.decoding(sampled), **options,
        )  # fmt: skip


def by_prompt(table: RewardNormalizer, prompts: int) -> RewardNormalizer:
    """A table that was measured on all its prompts several times over, as one of so many prompts with several texts each.

    Its numbers stay. But what chance has drawn is prompts, not texts: taken for independent, the texts of a prompt would make
    the table look surer than it is. A table without samples stays as it is.
    """
    if table.samples is None:
        return table
    n = len(table.objectives)
    rewards = table.samples.reshape(n, -1, prompts, n).swapaxes(1, 2)  # (N, P, T, N)
    measurement = {**table.measurement, "prompts": prompts, "texts": rewards.shape[2]}
    found = RewardNormalizer.measured(rewards, table.objectives, table.decoding, measurement)
    found.payoff = table.payoff  # to the last bit: sweeps of the same table are stacked
    return found
