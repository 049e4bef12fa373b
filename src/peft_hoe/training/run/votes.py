"""How a trained router votes, for the log.

Shapes: B samples, T response positions, L experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .processes import over_processes


def vote_statistics(
    votes: dict[str, torch.Tensor], mask: torch.Tensor, positions: int
) -> tuple[torch.Tensor, float] | None:
    """How the experts were used, averaged over modules and response tokens.

    Args:
        votes: of each module, `(..., L)`. A module that sees other tokens than the batch's, as one expert of a mixture does,
            counts with all that it saw, prompts included; one that saw none does not count.
        mask: valid response tokens `(B, T)`.
        positions: S, of prompt and response.

    Returns:
        mean votes `(L,)`, and the mean of the votes' entropy; None where no module saw a token.
    """
    usage, entropy = [], []
    for vote in votes.values():
        vote = vote.reshape(-1, vote.shape[-1])
        if len(vote) == len(mask) * positions:  # some modules, such as OPT's feed-forward, see one dimension of tokens
            vote = vote.unflatten(0, (len(mask), positions))[:, -mask.shape[1] - 1 : -1][mask]
        if not len(vote):
            continue
        usage.append(vote.mean(0))
        entropy.append(-torch.xlogy(vote, vote).sum(-1).mean())
    return (torch.stack(usage).mean(0), float(torch.stack(entropy).mean())) if usage else None


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
