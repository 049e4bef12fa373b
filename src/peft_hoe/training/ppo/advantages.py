"""Advantages of several objectives, and their mixture (paper eq. 8 and 19).

Generalised advantage estimation (GAE, arXiv 1506.02438) is linear in rewards and values, so Σ u_i GAE(r_i, V_i) =
GAE(Σ u_i r_i, Σ u_i V_i): one value head per objective stays valid while the weights u move.

Shapes: B samples, T tokens of the completion, N objectives. Masks `(B, T)` are True on the tokens that the policy generated,
the one that ended the text included, and False on padding behind it. Pure functions; all statistics are float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...errors import HoEError, check_choice

SCALINGS = ("joint", "objective", "none")
BASELINES = ("critic", "group")
Reduce = Callable[[Tensor], Tensor]


def place_rewards(scores: Tensor, mask: Tensor) -> Tensor:
    """Rewards per token: a sample's score stands on its last generated token, 0 elsewhere.

    Args:
        scores: `(B, N)`. NaN (no reward) becomes 0; leave those samples out with `scored` of `mix_advantages`.
        mask: `(B, T)`.

    Returns:
        `(B, T, N)` float32. A sample without any generated token gets 0 everywhere.
    """
    remaining = mask.long().flip(1).cumsum(1).flip(1)
    last = mask.bool() & (remaining == 1)  # (B, T)
    return last.unsqueeze(-1) * torch.nan_to_num(scores.float()).unsqueeze(1)


def estimate_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """GAE, for each objective on its own: Â_t = δ_t + γλ Â_{t+1} with δ_t = r_t + γ V_{t+1} − V_t.

    The value behind the last generated token is 0, also where the text was cut off at its longest.

    Args:
        rewards: `(B, T, N)`.
        values: V before each token, `(B, T, N)`.
        mask: `(B, T)`.
        gamma: discount γ.
        lam: trace decay λ of GAE (not a preference).

    Returns:
        advantages and returns Â + V, both `(B, T, N)` float32 and 0 outside the mask.
    """
    if rewards.shape != values.shape or rewards.shape[:2] != mask.shape:
        raise HoEError(
            f"rewards {tuple(rewards.shape)} and values {tuple(values.shape)} must both be (B, T, N) with "
            f"(B, T) the mask's shape {tuple(mask.shape)}",
            argument="rewards",
            value=tuple(rewards.shape),
        )
    valid = mask.unsqueeze(-1)
    rewards = rewards.float().masked_fill(~valid.bool(), 0.0)
    values = values.float().masked_fill(~valid.bool(), 0.0)
    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])  # Â_{t+1}
    next_value = torch.zeros_like(following)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = (delta + gamma * lam * following) * valid[:, t]
        next_value = values[:, t]
        advantages[:, t] = following
    return advantages, advantages + values


def mix_advantages(
    advantages: Tensor,
    weights: Tensor,
    mask: Tensor,
    *,
    scaling: str = "joint",
    scored: Tensor | None = None,
    reduce: Reduce | None = None,
) -> Tensor:
    """Σ u_i Â_i, scaled for the policy loss.

    - "joint" centres each Â_i over its valid tokens and divides the sum by one σ, its own. The direction is the saddle point's.
    - "objective" centres each Â_i and divides it by its own σ_i before the sum, then does as "joint" (TRL's
      `normalize_then_sum`). This multiplies u_i by 1/σ_i: where the σ_i differ, the fixed point is another than STCH's.
    - "none" sums, and nothing else.

    Args:
        advantages: `(B, T, N)`.
        weights: u `(N,)`.
        mask: `(B, T)`.
        scaling: one of the above.
        scored: `(B, N)` bool, False where a sample has no reward for an objective: it then adds nothing to the sum, and is left
            out of that objective's mean and σ.
        reduce: sums a tensor over processes, so that means and σ are those of the whole batch; default one process.

    Returns:
        `(B, T)` float32, 0 outside the mask. A constant Â_i becomes 0 ("none" apart).
    """
    check_choice("advantage_scaling", scaling, SCALINGS)
    if advantages.shape[-1:] != weights.shape:
        raise HoEError(
            f"advantages {tuple(advantages.shape)} and weights {tuple(weights.shape)} differ in objectives",
            argument="weights",
            value=tuple(weights.shape),
        )
    valid = mask.bool().unsqueeze(-1).expand_as(advantages)
    if scored is not None:
        valid = valid & scored.bool().unsqueeze(1)
    advantages = advantages.float().masked_fill(~valid, 0.0)
    if scaling != "none":
        advantages = _centre(advantages, valid, reduce)
    if scaling == "objective":
        advantages = _divide(advantages, _deviation(advantages, valid, reduce))
    mixed = advantages @ weights.to(advantages)
    if scaling == "none":
        return mixed
    tokens = mask.bool().unsqueeze(-1)
    return _divide(mixed.unsqueeze(-1), _deviation(mixed.unsqueeze(-1), tokens, reduce)).squeeze(-1)


def _centre(values: Tensor, valid: Tensor, reduce: Reduce | None) -> Tensor:
    """Values `(B, T, K)` minus the mean of each column over its valid tokens."""
    return (values - _mean(values, valid, reduce)).masked_fill(~valid, 0.0)


def _deviation(values: Tensor, valid: Tensor, reduce: Reduce | None) -> Tensor:
    """Standard deviation `(K,)` of each column of `(B, T, K)` over its valid tokens."""
    centred = _centre(values, valid, reduce)
    return _mean(centred**2, valid, reduce).sqrt()


def _mean(values: Tensor, valid: Tensor, reduce: Reduce | None) -> Tensor:
    totals = torch.stack([(values * valid).sum((0, 1)), valid.float().sum((0, 1))])
    total, count = totals if reduce is None else reduce(totals)
    return total / count.clamp(min=1.0)


def _divide(values: Tensor, deviation: Tensor) -> Tensor:
    """0/0 = 0; a spread that is only rounding counts as none."""
    flat = deviation <= 1e-6
    return torch.where(flat, 0.0, values / deviation.masked_fill(flat, 1.0))


def leave_one_out(rewards: Tensor, group: int) -> Tensor:
    """Rewards `(B, N)` less the mean of the others of their group; B is a multiple of `group`, groups are neighbours.

    The baseline holds nothing of the response itself, so that the gradient is unbiased. NaN is no reward: it counts in no mean,
    and its advantage is 0, as is that of a response whose group has no other reward.
    """
    grouped = rewards.unflatten(0, (-1, group))
    known = ~grouped.isnan()
    filled = grouped.masked_fill(~known, 0.0)
    others = known.sum(1, keepdim=True) - known.long()
    mean = (filled.sum(1, keepdim=True) - filled) / others.clamp(min=1)
    return torch.where(known & (others > 0), filled - mean, 0.0).flatten(0, 1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` `(B, T)` over the mask `(B, T)`; 0 where it is empty."""
    valid = mask.bool()
    return values.masked_fill(~valid, 0.0).sum() / valid.sum().clamp(min=1)


def kl_loss(log_probabilities: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """The KL term of the loss: Schulman's k3 estimator of KL(π ‖ π_ref), exp(d) − 1 − d with d = log π_ref − log π, ≥ 0.

    It belongs in the loss, times its coefficient, and in no reward, value target or scaling.

    Args:
        log_probabilities: log π of the generated tokens `(B, T)`; gradients flow through it.
        reference: log π_ref of the same tokens `(B, T)`.
        mask: `(B, T)`; what stands outside it may be anything.

    Returns:
        a scalar, the mean over valid tokens.
    """
    # Masked before exp: an overflow in padding would turn the gradients of valid tokens into NaN.
    difference = (reference.detach() - log_probabilities).float().masked_fill(~mask.bool(), 0.0)
    return masked_mean(torch.expm1(difference) - difference, mask)
