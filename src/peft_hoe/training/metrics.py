"""What a run logs, and the sample table.

Shapes: B samples, T response positions, N objectives.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..preference import FloatArray
from .objective_weights import ObjectiveWeights
from .prompts import PromptBatch
from .rollouts import Responses, Rollout


def over_processes(accelerator: Any, values: Any) -> FloatArray:
    """Sum of numbers over all processes, same shape; float64 where the device has it."""
    dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
    tensor = torch.as_tensor(np.asarray(values), dtype=dtype, device=accelerator.device)
    return np.asarray(accelerator.reduce(tensor, reduction="sum").cpu(), dtype=np.float64)


def mean_rewards(accelerator: Any, rewards: FloatArray) -> FloatArray:
    """Mean over the samples `(B, N)` of all processes, `(N,)`; NaN samples are left out, an objective without any is NaN."""
    known = ~np.isnan(rewards)
    total, count = over_processes(accelerator, np.stack([np.where(known, rewards, 0.0).sum(0), known.sum(0)]))
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def rollout_metrics(
    rollout: Rollout, accelerator: Any, experts: Sequence[str], voting: Sequence[str], eos: int | None
) -> dict[str, float]:
    """Divergence, entropy, length, end-of-sequence tokens, and how the router voted, over all processes."""
    mask = rollout.responses.mask
    ratio = (rollout.reference - rollout.logprobs).masked_fill(~mask, 0.0)
    sums: dict[str, Any] = {
        "objective/kl": (torch.expm1(ratio) - ratio).sum(1).mean(),
        "objective/entropy": (-rollout.logprobs * mask).sum(1).mean(),
        "policy/entropy_avg": (rollout.entropy * mask).sum() / mask.sum().clamp(min=1),
        "val/num_eos_tokens": ((rollout.responses.ids == eos) & mask).sum() * accelerator.num_processes,
        "completion/length": mask.sum(1).float().mean(),
        "completion/ended": rollout.responses.ended.float().mean(),
    }
    means = over_processes(accelerator, [float(item) for item in sums.values()]) / accelerator.num_processes
    votes = vote_metrics(rollout.votes, experts, voting, accelerator)
    return dict(zip(sums, means.tolist(), strict=True)) | votes


def vote_metrics(
    found: tuple[torch.Tensor, float] | None, experts: Sequence[str], voting: Sequence[str], accelerator: Any
) -> dict[str, float]:
    """How the router voted: entropy in nats, mean votes of the experts that it votes for.

    Args:
        found: of `vote_statistics`, on this process; None counts in no mean, but all processes must call.
        experts: L names.
        voting: the names of those that the router votes for.
        accelerator: accelerate's.

    Returns:
        means over the processes that have some; nothing where none has.
    """
    names = ["router/entropy", *(f"router/usage/{name}" for name in voting)]
    mine = [0.0] * (1 + len(names))
    if found is not None:
        usage = dict(zip(experts, found[0].tolist(), strict=True))
        mine = [1.0, found[1], *(usage[name] for name in voting)]
    count, *sums = over_processes(accelerator, mine).tolist()
    return {name: value / count for name, value in zip(names, sums, strict=True)} if count else {}


def weighing_metrics(
    objectives: Sequence[str], raw: FloatArray, normalized: FloatArray, weights: ObjectiveWeights
) -> dict[str, float]:
    """Mean rewards `(N,)`, raw and normalised, and what the weights of objectives made of them."""
    columns = {"reward": raw, "reward_normalized": normalized}
    columns |= {"weight": weights.w, "advantage_weight": weights.u, "gap": weights.gap}
    return objective_metrics(objectives, columns)


def scalar_metrics(
    rewards: FloatArray, weights: FloatArray, kl: float, kl_coef: float, penalty: float
) -> dict[str, float]:
    """What PPOTrainer logs of its one reward, here of the reward that the update climbs.

    Args:
        rewards: normalised means `(N,)`.
        weights: u `(N,)`.
        kl: of a response, in nats.
        kl_coef: its coefficient in the loss.
        penalty: what a response loses on average for having no end.
    """
    scores = float(rewards @ weights) - penalty
    return {
        "objective/scores": scores,
        "objective/non_score_reward": -kl_coef * kl,
        "objective/rlhf_reward": scores - kl_coef * kl,
    }


def objective_metrics(objectives: Sequence[str], columns: dict[str, FloatArray]) -> dict[str, float]:
    """One number per column `(N,)` and objective: `{column/objective: number}`."""
    return {
        f"{column}/{name}": float(value)
        for column, values in columns.items()
        for name, value in zip(objectives, values, strict=True)
    }


def sample_table(prompts: PromptBatch, responses: Responses, rewards: FloatArray, objectives: Sequence[str]) -> None:
    """Print up to five prompts with responses and rewards, as TRL prints its samples; nothing without `rich`."""
    if importlib.util.find_spec("rich") is None:
        return
    import pandas as pd  # type: ignore[import-untyped,unused-ignore]
    from trl.experimental.ppo.ppo_trainer import print_rich_table

    columns: dict[str, Any] = {"query": [str(prompt) for prompt in prompts.texts], "model response": responses.texts}
    columns |= {name: np.round(column, 4) for name, column in zip(objectives, rewards.T, strict=True)}
    print_rich_table(pd.DataFrame(columns).iloc[:5])
