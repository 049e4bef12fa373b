"""Rollouts: what the steered policy wrote, and how likely it and the reference found it.

Shapes: B prompts, P prompt positions, T response positions, N objectives, L experts.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch

from ...generation.prompts import PromptBatch
from ...generation.responses import Responses
from ...tuner.functional import record_votes
from ..run.votes import vote_statistics
from .likelihoods import logprobs_and_entropy, token_logprobs
from .references import Reference


@dataclass
class Rollout:
    """A batch of responses with everything that an update needs.

    Attributes:
        prompts: the batch of prompts.
        responses: what was generated.
        logprobs: `(B, T)` of the policy that generated.
        reference: `(B, T)` log-probabilities of the KL reference; None where there is none.
        entropy: `(B, T)`.
        values: `(B, T, N)`.
        votes: `(L,)`, the mean votes of the experts over modules and response tokens, and their entropy in nats, averaged
            likewise; None where there are none.
        kept: log-probabilities and values with their graph, for the first step of an update; None where it computes them again.
    """

    prompts: PromptBatch
    responses: Responses
    logprobs: torch.Tensor
    reference: torch.Tensor | None
    entropy: torch.Tensor
    values: torch.Tensor
    votes: tuple[torch.Tensor, float] | None
    kept: tuple[torch.Tensor, torch.Tensor] | None = None

    def sequences(self, rows: torch.Tensor | slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask `(rows, P + T)` of prompts and responses."""
        ids = torch.cat([self.prompts.ids[rows], self.responses.ids[rows]], dim=1)
        mask = torch.cat([self.prompts.mask[rows], self.responses.mask[rows]], dim=1)
        return ids, mask


def have_end(responses: Responses, eos: int | None) -> torch.Tensor:
    """Which responses `(B,)` ended where the decoding ends one, or hold the tokenizer's end of text.

    Without a stop token responses run on, and the second is how PPOTrainer tells those that have an end.
    """
    if eos is None:
        return responses.ended
    return responses.ended | ((responses.ids == eos) & responses.mask).any(1)


@torch.no_grad()
def evaluate_rollout(
    actor_critic: Any,
    prompts: PromptBatch,
    responses: Responses,
    temperature: float,
    chunk: int,
    reference: Reference | None = None,
    *,
    keep: bool = False,
) -> Rollout:
    """One forward of policy and critic, and one of the reference where there is one, over generated responses.

    Args:
        actor_critic: an `ActorCritic`.
        prompts: the prompts.
        responses: the responses to them.
        temperature: at which they were sampled.
        chunk: rows per forward.
        reference: the KL reference; None for none.
        keep: keep the graph of policy and critic, `Rollout.kept`, if all rows fit one forward.
    """
    keep = keep and len(prompts.ids) <= chunk
    length, adapter = responses.ids.shape[1], actor_critic.router.adapter
    empty = torch.empty(0)
    rollout = Rollout(prompts, responses, empty, None, empty, empty, None)
    columns: list[list[torch.Tensor]] = [[], [], []]
    likely: list[torch.Tensor] = []
    for start in range(0, len(prompts.ids), chunk):
        rows = slice(start, start + chunk)
        ids, mask = rollout.sequences(rows)
        recorded = record_votes(actor_critic.policy, adapter) if start == 0 else contextlib.nullcontext()
        with recorded as votes, torch.set_grad_enabled(keep):
            logits, values = actor_critic(ids, mask, length)
            logprobs, entropies = logprobs_and_entropy(logits, responses.ids[rows], temperature)
        if votes is not None:  # one chunk tells enough about the experts' use
            rollout.votes = vote_statistics(votes, responses.mask[rows], ids.shape[1])
        rollout.kept = (logprobs, values) if keep else None
        if reference is not None:
            likely.append(token_logprobs(reference(ids, mask, length), responses.ids[rows], temperature))
        parts = (logprobs.detach(), entropies, values.detach().float())
        for column, part in zip(columns, parts, strict=True):
            column.append(part)
    rollout.logprobs, rollout.entropy, rollout.values = map(torch.cat, columns)
    rollout.reference = torch.cat(likely) if likely else None
    return rollout
