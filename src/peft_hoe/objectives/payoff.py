"""Rewards on a common scale: 0 is the worst, 1 the best that the single-objective experts reach.

Rewards of different scale swamp each other in a sum, and a smooth Tchebycheff gap means nothing without a scale. The payoff
table P_ij is the mean reward j of the policy steered to objective i alone; ideal_j = max_i P_ij, nadir_j = min_i P_ij, and
R̂ = (R − nadir) / (ideal − nadir). It is measured once, on held-out prompts, and frozen. A table belongs to its decoding:
sampled training and greedy evaluation have one each.

Shapes: N objectives, P prompts, rows are points.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from ..errors import PreferenceError, RewardError
from ..generation.prompts import PromptBatch, PromptCollator, as_prompt_batch
from ..generation.responses import generate_responses
from ..generation.settings import decoding_record, evaluating, generating
from ..preference import FloatArray
from ..rewards.sources import Rewards
from ..tuner.functional import use_preference
from ..tuner.steering import Steering


class RewardNormalizer:
    """Maps rewards to where they lie between nadir and ideal of a payoff table.

    Args:
        payoff: `(N, N)`, row i the mean rewards of the policy steered to objective i.
        objectives: the N names.
        decoding: how the table's texts were generated; plain JSON, kept with the table.

    Raises:
        RewardError: not N x N finite numbers, or an objective that is constant over the experts.
    """

    def __init__(self, payoff: Any, objectives: Sequence[str], decoding: Mapping[str, Any] | None = None) -> None:
        self.objectives = tuple(objectives)
        self.payoff: FloatArray = np.array(payoff, dtype=np.float64)
        self.decoding = dict(decoding or {})
        n = len(self.objectives)
        if self.payoff.shape != (n, n) or not np.isfinite(self.payoff).all():
            raise RewardError(
                f"the payoff table is {np.asarray(payoff).tolist()}; it must hold {n} x {n} finite numbers, one row "
                f"and one column for each of {list(self.objectives)}"
            )
        spread = self.ideal - self.nadir
        for i in np.flatnonzero(spread <= 1e-9 * np.abs(self.payoff).max(axis=0)):
            raise RewardError(
                f"objective {self.objectives[i]!r} is constant: every expert's mean reward is {self.ideal[i]:.6g}, so it "
                "cannot be normalised. Check its reward and the prompts, or leave the objective out"
            )

    @property
    def ideal(self) -> FloatArray:
        """The best mean reward of any expert, `(N,)`."""
        return np.asarray(self.payoff.max(axis=0))

    @property
    def nadir(self) -> FloatArray:
        """The worst mean reward of any expert, `(N,)`."""
        return np.asarray(self.payoff.min(axis=0))

    def check_objectives(self, objectives: Sequence[str]) -> None:
        """See that the table is for these objectives, in this order.

        Raises:
            RewardError: it is for others.
        """
        if self.objectives != tuple(objectives):
            raise RewardError(
                f"the normalizer is for {list(self.objectives)}, but the objectives are {list(objectives)}"
            )

    def normalize(self, rewards: Any) -> FloatArray:
        """(R − nadir) / (ideal − nadir) of `rewards` `(..., N)`, float64; NaN stays NaN, and nothing is clipped."""
        raw = np.asarray(rewards, dtype=np.float64)
        if raw.shape[-1:] != (len(self.objectives),):
            raise RewardError(f"rewards of shape {raw.shape} do not end in the {len(self.objectives)} objectives")
        return np.asarray((raw - self.nadir) / (self.ideal - self.nadir))

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "objectives": list(self.objectives),
            "payoff": self.payoff.tolist(),
            "decoding": self.decoding,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> RewardNormalizer:
        """What `state_dict` came from."""
        return cls(state["payoff"], state["objectives"], state["decoding"])


def payoff_table(
    model: nn.Module,
    prompts: Sequence[Any],
    rewards: Any,
    *,
    processing_class: Any,
    columns: Mapping[str, Sequence[Any]] | None = None,
    max_new_tokens: int = 64,
    do_sample: bool = True,
    temperature: float = 1.0,
    batch_size: int = 64,
    seed: int = 0,
    generation_config: GenerationConfig | None = None,
) -> RewardNormalizer:
    """Steer the model to each objective alone, and measure all rewards there.

    N · P completions; a batch mixes preferences, row by row. The model's own generation settings play no part. They, its modes
    and the global random state are as before afterwards.

    Args:
        model: carries HoE layers; its first active HoE adapter is measured.
        prompts: P held-out prompts, texts or lists of chat messages.
        rewards: a Rewards, or what makes one.
        processing_class: the policy's tokenizer.
        columns: the data set's other columns, P values each, for the rewards.
        max_new_tokens: length of a completion.
        do_sample: sample from the whole vocabulary, as training does; off, greedy.
        temperature: of sampling.
        batch_size: completions at once. The random numbers of a sampled table depend on it.
        seed: of sampling.
        generation_config: any other decoding, in place of the length, sampling and temperature above, for example without a
            stop token (`eos_token_id=None`). It needs `max_new_tokens`.

    Returns:
        a normaliser that records the decoding. Samples without a reward (NaN) are left out of their objective's mean.

    Raises:
        RewardError: there are no prompts, a reward fails, or an objective is constant.
    """
    steering = Steering.of(model)
    adapter = steering.active_adapter()
    scorer = Rewards.of(rewards, steering.adapters[adapter].objectives)
    if not len(prompts):
        raise RewardError("there are no prompts to measure the payoff table on; give at least one")
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    settings = copy.deepcopy(generation_config) or _generation_config(tokenizer, max_new_tokens, do_sample, temperature)
    if settings.max_new_tokens is None:
        raise RewardError("generation_config has no max_new_tokens; say how long completions may get")
    settings.pad_token_id = tokenizer.pad_token_id
    collated = PromptCollator(tokenizer)([{"prompt": prompt} for prompt in prompts])
    batch = as_prompt_batch(collated, tokenizer, next(model.parameters()).device)
    batch.columns = {name: list(values) for name, values in (columns or {}).items()}
    corners = Corners(model, adapter, batch, tokenizer, settings, batch_size, seed)
    return measure_corners(corners, scorer)


@dataclass
class Corners:
    """The prompts, completed by the policy steered to each objective alone.

    Attributes:
        model: carries HoE layers.
        adapter: the adapter that is measured.
        prompts: P prompts, with what the rewards see of them.
        tokenizer: the policy's.
        settings: how completions are generated; nothing of it is filled in from the model's own settings.
        batch_size: completions at once.
        seed: of sampling.
        bf16: whether the model runs in bfloat16 autocast.
    """

    model: nn.Module
    adapter: str
    prompts: PromptBatch
    tokenizer: Any
    settings: GenerationConfig
    batch_size: int
    seed: int
    bf16: bool = False

    def complete(self, n: int) -> list[tuple[list[str], Tensor, Tensor]]:
        """For each of n corners: P texts, and ids and mask `(P, S)` of prompts and completions."""
        device = next(self.model.parameters()).device
        autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.bf16)
        with evaluating(self.model), _seeded(self.seed, device), generating(self.model, self.settings), autocast:
            return self._complete_all(n)

    def _complete_all(self, n: int) -> list[tuple[list[str], Tensor, Tensor]]:
        prompts = torch.arange(len(self.prompts.ids))
        try:
            texts, ids, mask = self._complete(prompts.repeat_interleave(n), np.tile(np.eye(n), (len(prompts), 1)))
            return [(texts[i::n], ids[i::n], mask[i::n]) for i in range(n)]
        except PreferenceError:  # a layer that cannot tell rows apart, such as a mixture of experts
            return [self._complete(prompts, corner) for corner in np.eye(n)]

    def _complete(self, rows: Tensor, preferences: FloatArray) -> tuple[list[str], Tensor, Tensor]:
        """Complete the prompts `rows` `(K,)` at one preference `(N,)`, or at one for each row `(K, N)`."""
        texts: list[str] = []
        ids, mask = [], []
        for start in range(0, len(rows), self.batch_size):
            some = rows[start : start + self.batch_size]
            prompts = PromptBatch(self.prompts.ids[some], self.prompts.mask[some], [], {})
            wanted = preferences if preferences.ndim == 1 else preferences[start : start + self.batch_size]
            with use_preference(self.model, {self.adapter: wanted.tolist()}):
                part = generate_responses(self.model, prompts, self.tokenizer, self.settings, len(some))
            texts += part.texts
            ids.append(torch.cat([prompts.ids, part.ids], dim=1))
            mask.append(torch.cat([prompts.mask, part.mask], dim=1))
        return texts, torch.cat(ids), torch.cat(mask)

    def decoding(self) -> dict[str, Any]:
        """What a table records, as plain JSON."""
        record = decoding_record(self.settings) | {"prompts": len(self.prompts.ids)}
        if self.settings.do_sample:
            record |= {"temperature": self.settings.temperature, "seed": self.seed, "batch_size": self.batch_size}
        if self.bf16:
            record["bf16"] = True
        return record


def measure_corners(corners: Corners, rewards: Rewards) -> RewardNormalizer:
    """The payoff table from completions at the corners.

    Raises:
        RewardError: a reward fails, or an objective is constant.
    """
    prompts = corners.prompts
    payoff = []
    for texts, ids, mask in corners.complete(len(rewards.objectives)):
        table = rewards(prompts.texts, texts, prompts.columns, input_ids=ids, attention_mask=mask)
        payoff.append(np.nanmean(table, axis=0))  # Rewards sees to it that no objective is all NaN
    return RewardNormalizer(payoff, rewards.objectives, corners.decoding())


def _generation_config(tokenizer: Any, max_new_tokens: int, do_sample: bool, temperature: float) -> GenerationConfig:
    sampling: dict[str, Any] = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if do_sample else {}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=do_sample,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **sampling,
    )


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """`generate` draws from the global generators only, so they are seeded here and put back."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
