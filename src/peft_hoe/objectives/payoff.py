"""Measuring a payoff table: what the policy, steered to each objective alone, earns in all of them.

Shapes: N objectives, P prompts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import RewardError
from ..generation.checks import whole
from ..generation.completer import Completer, steered_responses
from ..generation.decoding import Decoding
from ..generation.prompt_rows import split_rows
from ..generation.prompts import PromptBatch
from ..generation.settings import evaluating, seeded
from ..rewards.sources import Rewards
from ..tuner.functional import adapter_of
from .normalizer import RewardNormalizer

_SAMPLED = Decoding(do_sample=True)


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
        HoEError: the decoding is none, or batch_size no whole number of at least 1.
        RewardError: there are no prompts, a reward fails, or an objective is constant.

    >>> from peft_hoe import Decoding, demo, payoff_table
    >>> model, tokenizer = demo.load_demo_adapter(), demo.load_tokenizer()
    >>> table = payoff_table(
    ...     model, demo.load_prompts()[:4], demo.REWARDS, processing_class=tokenizer, decoding=Decoding(24)
    ... )
    >>> table.payoff.shape, table.decoding["do_sample"]
    ((2, 2), False)
    """
    whole("batch_size", batch_size, 1)
    adapter = adapter_of(model)
    scorer = Rewards.of(rewards, adapter.objectives)
    texts, columns = split_rows(prompts)
    if not texts:
        raise RewardError("there are no prompts to measure the payoff table on; give at least one", argument="prompts")
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
    tables = []
    for i in range(n):
        corner = found.select(range(i, n * count, n))
        table = rewards(
            prompts.texts,
            corner.texts,
            prompts.columns,
            input_ids=torch.cat([prompts.ids, corner.ids], dim=1),
            attention_mask=torch.cat([prompts.mask, corner.mask], dim=1),
        )
        tables.append(table[:, None])
    measurement: dict[str, Any] = {"prompts": count, "prompts_digest": prompts.digest}
    if decoding.do_sample:
        measurement |= {"seed": seed, "batch_size": batch_size}
    if bf16:
        measurement["bf16"] = True
    return RewardNormalizer.measured(tables, rewards.objectives, decoding.record, measurement)
