"""Rollouts: what the steered policy wrote, and how likely it and the reference found it.

Shapes: B prompts, P prompt positions, T response positions, N objectives, L experts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...generation.logits import response_logits, sequence_inputs
from ...generation.prompts import PromptBatch
from ...generation.responses import Responses
from ...generation.vocabulary import check_tokens
from ...tuner.functional import record_votes, use_preference
from ..run.votes import vote_statistics
from .actor_critic import ActorCritic


@dataclass
class Rollout:
    """A batch of responses with everything that an update needs.

    Attributes:
        prompts: the batch of prompts.
        responses: what was generated.
        logprobs: `(B, T)` of the policy that generated.
        reference: `(B, T)` log-probabilities of the KL reference.
        entropy: `(B, T)`.
        values: `(B, T, N)`.
        votes: `(L,)`, the mean votes of the experts over modules and response tokens, and their entropy in nats, averaged
            likewise; None where there are none.
        kept: log-probabilities and values with their graph, for the first step of an update; None where it computes them again.
    """

    prompts: PromptBatch
    responses: Responses
    logprobs: torch.Tensor
    reference: torch.Tensor
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


def log_softmax(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probabilities `(B, T, V)` at a temperature, in float32 or wider."""
    return (logits.float() / temperature).log_softmax(-1)


def token_logprobs(logits: torch.Tensor, ids: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probabilities of `ids` `(B, T)` at a temperature, from logits `(B, T, V)`."""
    return _of_tokens(log_softmax(logits, temperature), ids)


def _of_tokens(logs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return logs.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def entropy(logs: torch.Tensor) -> torch.Tensor:
    """Entropy `(B, T)` of log-probabilities `(B, T, V)`."""
    return -(logs.exp() * logs).sum(-1)


@torch.no_grad()
def evaluate_rollout(
    actor_critic: Any,
    prompts: PromptBatch,
    responses: Responses,
    temperature: float,
    chunk: int,
    reference: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor],
    *,
    keep: bool = False,
) -> Rollout:
    """One forward of policy and critic, and one of the reference, over generated responses.

    Args:
        actor_critic: an `ActorCritic`.
        prompts: the prompts.
        responses: the responses to them.
        temperature: at which they were sampled.
        chunk: rows per forward.
        reference: logits `(B, T, V)` of the KL reference, from ids, mask and T.
        keep: keep the graph of policy and critic, `Rollout.kept`, if all rows fit one forward.
    """
    keep = keep and len(prompts.ids) <= chunk
    length, adapter = responses.ids.shape[1], actor_critic.router.adapter
    empty = torch.empty(0)
    rollout = Rollout(prompts, responses, empty, empty, empty, empty, None)
    columns: list[list[torch.Tensor]] = [[], [], [], []]
    for start in range(0, len(prompts.ids), chunk):
        rows = slice(start, start + chunk)
        ids, mask = rollout.sequences(rows)
        recorded = record_votes(actor_critic.policy, adapter) if start == 0 else contextlib.nullcontext()
        with recorded as votes, torch.set_grad_enabled(keep):
            logits, values = actor_critic(ids, mask, length)
            logs = log_softmax(logits, temperature)
            logprobs = _of_tokens(logs, responses.ids[rows])
        if votes is not None:  # one chunk tells enough about the experts' use
            rollout.votes = vote_statistics(votes, responses.mask[rows], ids.shape[1])
        rollout.kept = (logprobs, values) if keep else None
        likely = token_logprobs(reference(ids, mask, length), responses.ids[rows], temperature)
        parts = (logprobs.detach(), likely, entropy(logs.detach()), values.detach().float())
        for column, part in zip(columns, parts, strict=True):
            column.append(part)
    rollout.logprobs, rollout.reference, rollout.entropy, rollout.values = map(torch.cat, columns)
    return rollout


# -- references ---


def make_reference(
    actor_critic: ActorCritic, ref_model: Any, kind: str
) -> Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]:
    """The KL reference: a model, or what of the policy `HoERouterConfig.kl_reference` names.

    Returns:
        `reference(ids, mask, length)`: of texts `(B, P + T)` and their mask, the logits `(B, T, V)` of the positions that
        predict the last T = `length` tokens.
    """
    if ref_model is not None:
        return model_reference(ref_model)
    return {"base": base_reference, "static": static_reference}[kind](actor_critic)


def base_reference(actor_critic: ActorCritic) -> Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]:
    """Logits of the base model, the adapter switched off."""

    def logits(ids: torch.Tensor, mask: torch.Tensor, length: int) -> torch.Tensor:
        policy: Any = actor_critic.policy
        with policy.disable_adapter():
            return response_logits(policy, sequence_inputs(ids, mask), length)[0]

    return logits


def static_reference(actor_critic: ActorCritic) -> Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]:
    """Logits of the coarse interpolation: the router votes as if it were untrained."""

    def logits(ids: torch.Tensor, mask: torch.Tensor, length: int) -> torch.Tensor:
        with use_preference(actor_critic.policy, routers="static"):
            return response_logits(actor_critic.policy, sequence_inputs(ids, mask), length)[0]

    return logits


def model_reference(model: Any) -> Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]:
    """Logits of another model."""

    def logits(ids: torch.Tensor, mask: torch.Tensor, length: int) -> torch.Tensor:
        inputs = sequence_inputs(ids, mask)
        check_tokens(inputs["input_ids"], model, what="ref_model")
        return response_logits(model, inputs, length)[0]

    return logits
