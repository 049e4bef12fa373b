"""The gradient of the gate, written out: for a kernel that autograd cannot look into.

With u = c(w) w, w = p mix and p the softmax of each router's logits z / T, a gradient g for the result u over the ranks * A x
gives

    for A x: u over the ranks * g               d = sum of g * A x over each expert's ranks, the gradient for u
    for w:   c d + (d . w) dc/dw                dc/dw = |e_j| / |sum| - (sum_i w_i |e_i|) (G w)_j / |sum|^3, 0 at c's limits
    for z:   p (q - p . q) / T                  q = the gradient for w, seen from the slots through mix

Shapes as in `gate.py`.
"""

from __future__ import annotations

import torch

from .gate import MAX_FACTOR, TINY, Votes, length_factor, over_ranks, scaled, shares, token_votes


def gate_gradient(
    gradient: torch.Tensor,
    inner: torch.Tensor,
    logits: torch.Tensor,
    votes: Votes,
    gram: torch.Tensor | None,
    ranks: tuple[int, ...],
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of `gate` for `inner` `(T, r)` and `logits` `(T, slots)`, from that for its result `(T, r)`."""
    dtype = votes.mix.dtype
    logits_over_t = logits.to(dtype) / temperature
    parts, weights = shares(votes, logits_over_t), token_votes(votes, logits_over_t)
    wanted = _over_experts(gradient.to(dtype) * inner.to(dtype), ranks)
    scale = weights
    if gram is not None:
        factor, slope = _factor_and_slope(weights, gram)
        scale = factor * weights
        wanted = factor * wanted + (wanted * weights).sum(-1, keepdim=True) * slope
    towards = _times_mix(wanted, votes.mix).unflatten(1, (votes.routers, -1))
    grouped = parts.unflatten(1, (votes.routers, -1))
    for_logits = (grouped * (towards - (grouped * towards).sum(-1, keepdim=True))).flatten(1) / temperature
    if votes.places is not None:
        slots = logits.shape[1]
        padded = for_logits.new_zeros(len(logits), slots + 1)
        for_logits = padded.index_add(1, votes.places, for_logits)[:, :slots].contiguous()
    return scaled(gradient, over_ranks(scale, ranks)), for_logits.to(logits.dtype)


def _over_experts(numbers: torch.Tensor, ranks: tuple[int, ...]) -> torch.Tensor:
    """Sums `(T, S)` of numbers `(T, r)` over each expert's ranks."""
    if len(set(ranks)) == 1:
        return numbers.unflatten(1, (len(ranks), ranks[0])).sum(-1)
    return torch.stack([part.sum(-1) for part in numbers.split(list(ranks), dim=1)], dim=1)


def _factor_and_slope(votes: torch.Tensor, gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`length_factor` `(T, 1)` and its derivative for the votes, `(T, S)`."""
    products = gram.to(votes.dtype)
    lengths = products.diagonal().clamp_min(0).sqrt()
    mixed = (votes.unsqueeze(-2) * products).sum(-1)
    mean, squared = (votes * lengths).sum(-1, keepdim=True), (mixed * votes).sum(-1, keepdim=True)
    length = squared.clamp_min(TINY).sqrt()
    slope = lengths / length - mean / length * (mixed / length) / length
    moves = (squared > TINY) & (mean < MAX_FACTOR * length)
    return length_factor(votes, gram), torch.where(moves, slope, torch.zeros_like(slope))


def _times_mix(wanted: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
    """From experts `(T, S)` back to slots `(T, V)`."""
    if mix.ndim == 2:
        return wanted @ mix
    return torch.bmm(wanted.unflatten(0, (mix.shape[0], -1)), mix.mT).flatten(0, 1)
