"""Updates: the PPO loss of a rollout, and the optimizer steps over its mini-batches.

Shapes: B rows, T response positions, N objectives. Every loss is a sum over valid tokens divided by a number that the caller
gives, the valid tokens of the whole mini-batch on all processes. So micro-batches and processes add up to the gradient of the
large batch, whatever the lengths of their responses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .advantages import kl_loss
from .likelihoods import token_logprobs
from .rollouts import Rollout


@dataclass
class Targets:
    """What a rollout is worth.

    Attributes:
        advantages: `(B, T)`, mixed and scaled.
        returns: `(B, T, N)`, targets of the values.
        known: `(B, N)`, False where a sample has no reward for an objective.
    """

    advantages: torch.Tensor
    returns: torch.Tensor
    known: torch.Tensor


@dataclass(frozen=True)
class LossSettings:
    """Coefficients, named as in PPOConfig."""

    temperature: float
    cliprange: float
    cliprange_value: float
    vf_coef: float
    kl_coef: float


def policy_loss(
    logprobs: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, cliprange: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The clipped surrogate `(B, T)`, where clipping was active `(B, T)`, and the ratio `(B, T)`."""
    ratio = (logprobs - old).exp()
    free = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return torch.maximum(free, clipped), clipped > free, ratio


def value_loss(
    values: torch.Tensor, old: torch.Tensor, returns: torch.Tensor, cliprange: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The clipped squared error `(B, T, N)`, and where clipping was active `(B, T, N)`."""
    clipped = old + (values - old).clamp(-cliprange, cliprange)
    free, bound = (values - returns).square(), (clipped - returns).square()
    return 0.5 * torch.maximum(free, bound), bound > free


def rollout_loss(
    model: Any, rollout: Rollout, targets: Targets, rows: torch.Tensor, total: torch.Tensor, settings: LossSettings
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of some rows of a rollout, and what to log about it, both already divided by `total`.

    What the rollout has kept of them, in their order, is used once.
    """
    responses = rollout.responses
    valid, old = responses.mask[rows], rollout.logprobs[rows]
    if rollout.kept is not None:
        (logprobs, values), rollout.kept = rollout.kept, None
    else:
        logits, values = model(*rollout.sequences(rows), responses.ids.shape[1])
        logprobs = token_logprobs(logits, responses.ids[rows], settings.temperature)
    logprobs = torch.where(valid, logprobs, old)  # an overflow in padding would turn gradients into NaN

    surrogate, clipped, ratio = policy_loss(logprobs, old, targets.advantages[rows], settings.cliprange)
    errors, value_clipped = value_loss(
        values.float(), rollout.values[rows], targets.returns[rows], settings.cliprange_value
    )
    rewarded = valid.unsqueeze(-1) & targets.known[rows].unsqueeze(1)  # (B, T, N)
    objectives = errors.shape[-1]

    def mean(item: torch.Tensor) -> torch.Tensor:
        return (item * valid).sum() / total

    def mean_over_objectives(item: torch.Tensor) -> torch.Tensor:
        return (item * rewarded).sum() / (total * objectives)

    policy, value = mean(surrogate), mean_over_objectives(errors)
    loss = policy + settings.vf_coef * objectives * value
    logged = {
        "loss/policy_avg": policy,
        "loss/value_avg": value,
        "policy/clipfrac_avg": mean(clipped),
        "policy/approxkl_avg": mean(0.5 * (logprobs - old).square()),
        "val/clipfrac_avg": mean_over_objectives(value_clipped),
        "val/ratio": mean(ratio),
    }
    if rollout.reference is not None:
        divergence = kl_loss(logprobs, rollout.reference[rows], valid) * valid.sum() / total
        loss = loss + settings.kl_coef * divergence
        logged["loss/kl_avg"] = divergence
    return loss, {name: item.detach() for name, item in logged.items()}


def update_minibatch(
    model: Any,
    accelerator: Any,
    rollout: Rollout,
    targets: Targets,
    micro_batches: Iterable[torch.Tensor],
    settings: LossSettings,
) -> dict[str, torch.Tensor]:
    """Accumulate the gradient of one mini-batch; what is returned is this process's share of the logged means."""
    micro_batches = list(micro_batches)
    valid = rollout.responses.mask[torch.cat(micro_batches)].sum()
    total = accelerator.reduce(valid.float(), reduction="sum").clamp(min=1)
    # accelerate divides by the first, DistributedDataParallel by the second; `total` has done both.
    factor = accelerator.gradient_accumulation_steps * accelerator.num_processes
    logged: dict[str, torch.Tensor] = {}
    for i, rows in enumerate(micro_batches):
        last = i == len(micro_batches) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            loss, parts = rollout_loss(model, rollout, targets, rows, total, settings)
            accelerator.backward(loss * factor)
        for name, part in parts.items():
            logged[name] = logged.get(name, torch.zeros_like(part)) + part
    return logged


def update(
    model: Any,
    accelerator: Any,
    optimizer: Any,
    rollout: Rollout,
    targets: Targets,
    settings: LossSettings,
    *,
    epochs: int,
    mini_batch: int,
    micro_batch: int,
    clip: Iterable[Any] = (),
    max_grad_norm: float = 0.0,
) -> dict[str, float]:
    """PPO epochs over a rollout: one optimizer step for each mini-batch.

    Args:
        model: the actor and critic, as accelerate prepared it.
        accelerator: accelerate's.
        optimizer: holds the router's and the critic's Parameters.
        rollout: the samples.
        targets: their advantages and returns.
        settings: the loss.
        epochs: passes over the rollout.
        mini_batch: rows of a step, on this process.
        micro_batch: rows of a forward.
        clip: modules whose gradients are clipped, each by itself.
        max_grad_norm: their bound; 0 for none.

    Returns:
        Means over all steps and processes, and the variance of the ratio over steps.
    """
    rows = len(rollout.logprobs)
    steps: list[dict[str, torch.Tensor]] = []
    for _ in range(epochs):
        order = torch.randperm(rows)
        if rollout.kept is not None:  # all rows in one step, whose gradient does not depend on their order
            order = torch.arange(rows)
        order = order.to(rollout.logprobs.device)
        for chosen in order.split(mini_batch):
            logged = update_minibatch(model, accelerator, rollout, targets, chosen.split(micro_batch), settings)
            if max_grad_norm > 0:
                for module in clip:
                    accelerator.clip_grad_norm_(module.parameters(), max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            steps.append(logged)
    return _statistics(steps, accelerator)


def _statistics(steps: Sequence[Mapping[str, torch.Tensor]], accelerator: Any) -> dict[str, float]:
    """The mean of each item over steps and, of the ratio, the variance: 0 where there is one step only."""
    stacked = torch.stack([torch.stack(list(logged.values())) for logged in steps])  # (steps, items)
    whole = accelerator.reduce(stacked, reduction="sum")
    means = dict(zip(steps[0], whole.mean(0).tolist(), strict=True))
    ratios = whole[:, list(steps[0]).index("val/ratio")]
    return means | {"val/ratio_var": float(ratios.var()) if len(ratios) > 1 else 0.0}
