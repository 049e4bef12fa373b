"""Rewards on a common scale: 0 is the worst, 1 the best that the single-objective experts reach.

Rewards of different scale swamp each other in a sum, and a smooth Tchebycheff gap means nothing without a scale. The payoff
table P_ij is the mean reward j of the policy steered to objective i alone; ideal_j = max_i P_ij, nadir_j = min_i P_ij, and
R̂ = (R − nadir) / (ideal − nadir). It is measured once, on held-out prompts, and frozen. A table belongs to its decoding:
sampled training and greedy evaluation have one each.

Shapes: N objectives, P prompts, rows are points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import RewardError
from ..generation.completer import Completer, steered_responses
from ..generation.decoding import Decoding
from ..generation.prompt_rows import split_rows
from ..generation.prompts import PromptBatch
from ..generation.settings import evaluating, seeded
from ..preference import FloatArray
from ..rewards.sources import Rewards
from ..tuner.functional import adapter_of

_SAMPLED = Decoding(do_sample=True)


class RewardNormalizer:
    """Maps rewards to where they lie between nadir and ideal of a payoff table.

    Args:
        payoff: `(N, N)`, row i the mean rewards of the policy steered to objective i.
        objectives: the N names.
        decoding: how the table's texts were written, as a Decoding's `record` or a method's own; plain JSON.
        measurement: what else the numbers depend on, such as the number of prompts and the seed; plain JSON.

    Raises:
        RewardError: not N x N finite numbers, or an objective that is constant over the experts.

    >>> from peft_hoe import RewardNormalizer
    >>> normalizer = RewardNormalizer([[4.0, 1.0], [2.0, 3.0]], ["helpful", "harmless"])
    >>> normalizer.normalize([[3.0, 2.0], [4.0, 3.0]]).tolist()
    [[0.5, 0.5], [1.0, 1.0]]
    """

    def __init__(
        self,
        payoff: Any,
        objectives: Sequence[str],
        decoding: Mapping[str, Any] | None = None,
        measurement: Mapping[str, Any] | None = None,
    ) -> None:
        self.objectives = tuple(objectives)
        self.payoff: FloatArray = np.array(payoff, dtype=np.float64)
        self.decoding = dict(decoding or {})
        self.measurement = dict(measurement or {})
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
            "measurement": self.measurement,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> RewardNormalizer:
        """What `state_dict` came from."""
        return cls(state["payoff"], state["objectives"], state["decoding"], state["measurement"])


def payoff_table(
    model: nn.Module,
    prompts: Any,
    rewards: Any,
    *,
    processing_class: Any,
    decoding: Any = _SAMPLED,
    batch_size: int = 64,
    seed: int = 0,
) -> RewardNormalizer:
    """Steer the model to each objective alone, and measure all rewards there.

    N · P completions; a batch mixes preferences, row by row. The model's own generation settings play no part but for stop
    tokens. They, its modes and the global random state are as before afterwards.

    Args:
        model: carries HoE layers; its first active HoE adapter is measured.
        prompts: P held-out prompts: texts, lists of chat messages, or rows with `prompt` and columns for the rewards.
        rewards: a Rewards, or what makes one.
        processing_class: the policy's tokenizer.
        decoding: what `Decoding.of` takes; by default sampled from the whole vocabulary, as in training, and not greedy as
            sweeps are: a table belongs to its decoding.
        batch_size: completions at once. The random numbers of a sampled table depend on it.
        seed: of sampling.

    Returns:
        a normaliser that records the decoding. Samples without a reward (NaN) are left out of their objective's mean.

    Raises:
        HoEError: the decoding is none.
        RewardError: there are no prompts, a reward fails, or an objective is constant.

    >>> from peft_hoe import Decoding, demo, payoff_table
    >>> model, tokenizer = demo.load_demo_adapter(), demo.load_tokenizer()
    >>> table = payoff_table(
    ...     model, demo.load_prompts()[:4], demo.REWARDS, processing_class=tokenizer, decoding=Decoding(24)
    ... )
    >>> table.payoff.shape, table.decoding["do_sample"]
    ((2, 2), False)
    """
    adapter = adapter_of(model)
    scorer = Rewards.of(rewards, adapter.objectives)
    texts, columns = split_rows(prompts)
    if not texts:
        raise RewardError("there are no prompts to measure the payoff table on; give at least one")
    completer = Completer(model, processing_class, decoding)
    batch = completer.batch(model, texts)
    batch.columns = columns
    return measure_payoff(
        model, adapter.name, batch, scorer, processing_class=processing_class, decoding=completer.decoding,
        batch_size=batch_size, seed=seed,
    )  # fmt: skip


def measure_payoff(
    model: nn.Module,
    adapter: str,
    prompts: PromptBatch,
    rewards: Rewards,
    *,
    processing_class: Any,
    decoding: Decoding,
    batch_size: int,
    seed: int,
    bf16: bool = False,
) -> RewardNormalizer:
    """The payoff table of an adapter on prompts that are tokens already, as trainers have them.

    Args:
        model: carries HoE layers.
        adapter: which is measured.
        prompts: P of them, with what the rewards see.
        rewards: of N objectives.
        processing_class: the policy's tokenizer.
        decoding: how completions are written.
        batch_size: completions at once.
        seed: of sampling.
        bf16: whether the model runs in bfloat16 autocast.

    Raises:
        RewardError: a reward fails, or an objective is constant.
    """
    n, count = len(rewards.objectives), len(prompts.ids)
    decoding = decoding.resolved(model, processing_class)
    rows = prompts.select([row for row in range(count) for _ in range(n)])
    device = next(model.parameters()).device
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)
    with evaluating(model), seeded(seed), autocast:
        found, _ = steered_responses(
            model, adapter, rows, np.tile(np.eye(n), (count, 1)), processing_class, decoding, batch_size
        )
    payoff = []
    for i in range(n):
        corner = found.select(range(i, n * count, n))
        table = rewards(
            prompts.texts,
            corner.texts,
            prompts.columns,
            input_ids=torch.cat([prompts.ids, corner.ids], dim=1),
            attention_mask=torch.cat([prompts.mask, corner.mask], dim=1),
        )
        payoff.append(np.nanmean(table, axis=0))  # Rewards sees to it that no objective is all NaN
    measurement: dict[str, Any] = {"prompts": count}
    if decoding.do_sample:
        measurement |= {"seed": seed, "batch_size": batch_size}
    if bf16:
        measurement["bf16"] = True
    return RewardNormalizer(payoff, rewards.objectives, decoding.record, measurement)
