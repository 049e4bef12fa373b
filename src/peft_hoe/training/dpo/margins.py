"""Log-probabilities of answers, and the margin that the experts of the other objectives give to a pair.

Shapes: B pairs as 2B rows, the chosen answers first; S positions, T of them from the first answer's start; N objectives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from trl.trainer.utils import selective_log_softmax

from ...errors import ExpertError
from ...generation.fusion import steered_logits
from ...generation.logits import response_logits, sequence_inputs
from ...preference import FloatArray
from ...tuner.functional import adapter_of
from ..run.trained_router import TrainedRouter, holds_weights
from .pairs import OBJECTIVE


def answer_logprobs(tokens: Tensor, mask: Tensor, ld_alpha: float | None = None) -> Tensor:
    """Log-probabilities `(2B,)` of answers from those of their tokens `(2B, T)`.

    Args:
        tokens: B chosen, then B rejected.
        mask: 1 on answers.
        ld_alpha: weight of the tokens by which an answer is longer than the other of its pair (LD-DPO); None for 1.
    """
    weights = mask.to(tokens)
    if ld_alpha is not None:
        shorter = mask.sum(1).view(2, -1).amin(0).repeat(2)
        weights = weights * torch.where(mask.cumsum(1) <= shorter.unsqueeze(1), 1.0, ld_alpha)
    return (tokens.masked_fill(mask == 0, 0.0) * weights).sum(1)


def check_experts(router: TrainedRouter, objectives: Sequence[str]) -> None:
    """See that each objective with a weight has an expert that differs from the base, and so an implicit reward.

    Raises:
        ExpertError: one has none.
    """
    layer: Any = router.layers[0]
    adapter = adapter_of(layer, router.adapter)
    for k in np.flatnonzero(router.preference).tolist():
        plan = adapter.plan(np.eye(len(objectives))[k])
        members = torch.nonzero(plan.static[0]).flatten().tolist()
        if not plan.is_live and not any(holds_weights(x, router.adapter, i) for x in router.layers for i in members):
            raise ExpertError(
                f'the expert of {objectives[k]!r} holds no weights, so it has no implicit reward; use margin="column" or '
                'margin="none"',
                argument="margin",
                value="experts",
                allowed=("column", "none"),
            )


@torch.no_grad()
def other_experts(
    policy: Any,
    adapter: str,
    preference: FloatArray,
    inputs: Mapping[str, Any],
    base: Tensor | None = None,
    ld_alpha: float | None = None,
) -> Tensor:
    """Σ_{j≠k} λ_j log π_j/π_base `(2B,)` of the answers to pairs of objective k, π_j the policy steered to j alone.

    One forward with a preference per row for each objective but one that has a weight.

    Args:
        policy: a model with HoE layers.
        adapter: its HoE adapter.
        preference: λ `(N,)`.
        inputs: the batch: `input_ids`, `attention_mask` and `completion_mask` `(2B, S)`, `objective` `(B,)`.
        base: log π_base `(2B,)` where it is known.
        ld_alpha: see `answer_logprobs`.
    """
    ids, mask = inputs["input_ids"], inputs["completion_mask"]
    length = ids.shape[1] - max(1, int(mask.any(0).long().argmax()))
    called = sequence_inputs(ids, inputs["attention_mask"])

    def answers(logits: Tensor) -> Tensor:
        return answer_logprobs(selective_log_softmax(logits.float(), ids[:, -length:]), mask[:, -length:], ld_alpha)

    if base is None:
        with policy.disable_adapter():
            base = answers(response_logits(policy, called, length)[0])
    wanted = np.flatnonzero(preference)
    others = np.stack([wanted[wanted != k] for k in inputs[OBJECTIVE].tolist()])  # (B, K - 1)
    total = torch.zeros_like(base)
    for one in others.T:
        both = np.concatenate([one, one])
        logits = steered_logits(policy, adapter, np.eye(len(preference))[both], called, length)
        total += torch.as_tensor(preference[both]).to(base) * (answers(logits) - base)
    return total
