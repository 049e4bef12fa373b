"""What a run logs, and the sample table.

Shapes: B samples, T response positions, N objectives.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ...generation.prompts import PromptBatch
from ...generation.responses import Responses
from ...preference import FloatArray
from ..run.processes import over_processes
from ..run.votes import vote_metrics
from .rollouts import Rollout, have_end


def rollout_metrics(
    rollout: Rollout, accelerator: Any, experts: Sequence[str], voting: Sequence[str], eos: int | None
) -> dict[str, float]:
    """Divergence (with a reference), entropy, length, end-of-sequence tokens, and how the router voted, over all processes."""
    mask = rollout.responses.mask
    sums: dict[str, Any] = {
        "objective/entropy": (-rollout.logprobs * mask).sum(1).mean(),
        "policy/entropy_avg": (rollout.entropy * mask).sum() / mask.sum().clamp(min=1),
        "val/num_eos_tokens": ((rollout.responses.ids == eos) & mask).sum() * accelerator.num_processes,
        "completion/length": mask.sum(1).float().mean(),
        "completion/ended": have_end(rollout.responses, eos).float().mean(),
    }
    if rollout.reference is not None:
        ratio = (rollout.reference - rollout.logprobs).masked_fill(~mask, 0.0)
        sums["objective/kl"] = (torch.expm1(ratio) - ratio).sum(1).mean()
    means = over_processes(accelerator, [float(item) for item in sums.values()]) / accelerator.num_processes
    votes = vote_metrics(rollout.votes, experts, voting, accelerator)
    return dict(zip(sums, means.tolist(), strict=True)) | votes


def scalar_metrics(rewards: FloatArray, weights: FloatArray, non_score: float, penalty: float) -> dict[str, float]:
    """What PPOTrainer logs of its one reward, here of the reward that the update climbs.

    Args:
        rewards: normalised means `(N,)`.
        weights: u `(N,)`.
        non_score: what the KL term takes from a response on average, at most 0.
        penalty: what a response loses on average for having no end.
    """
    scores = float(np.nansum(rewards * weights)) - penalty  # NaN: an objective without a reward in this batch
    return {
        "objective/scores": scores,
        "objective/non_score_reward": non_score,
        "objective/rlhf_reward": scores + non_score,
    }


def sample_table(prompts: PromptBatch, responses: Responses, rewards: FloatArray, objectives: Sequence[str]) -> None:
    """Print up to five prompts with responses and rewards, as TRL prints its samples; nothing without `rich`."""
    if importlib.util.find_spec("rich") is None:
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("query", "model response", *objectives, show_lines=True)
    for prompt, response, row in list(zip(prompts.texts, responses.texts, rewards, strict=True))[:5]:
        numbers = (f"{number:.4g}" for number in row)
        table.add_row(*map(Text, (str(prompt), response, *numbers)))  # no markup: texts may hold brackets
    Console().print(table)
