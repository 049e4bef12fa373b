"""Logit fusion of the single-objective experts (MOD, arXiv 2406.18853): log π ∝ Σ_i λ_i log π_i.

It is the policy that maximises Σ_i λ_i r_i under a reverse KL penalty, where each π_i maximises its r_i under the same one. It
costs a forward per objective and token; a router that imitates it costs one.

Shapes: B rows, T positions, V vocabulary, N objectives, K of them with a weight above 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..preference import FloatArray
from ..tuner.functional import use_preference
from .by_preference import by_preference
from .logits import response_logits, sequence_inputs


@torch.no_grad()
def fusion_logprobs(
    policy: Any, adapter: str, preference: FloatArray, input_ids: Tensor, attention_mask: Tensor, length: int
) -> Tensor:
    """The fusion's log-probabilities `(B, T, V)` before each of the last T = `length` tokens, float32.

    All experts answer in one forward of K·B rows, each row steered to its objective.

    Args:
        policy: a model with HoE layers.
        adapter: its HoE adapter.
        preference: λ `(N,)`.
        input_ids: `(B, S)`.
        attention_mask: `(B, S)`.
        length: T < S.
    """
    wanted = np.flatnonzero(preference)
    corners, inputs = np.eye(len(preference))[wanted], sequence_inputs(input_ids, attention_mask)
    many = {name: value.repeat(len(wanted), 1) for name, value in inputs.items()}
    logits = steered_logits(policy, adapter, corners.repeat(len(input_ids), axis=0), many, length)
    parts = logits.chunk(len(wanted))
    fused = torch.stack([w * part.float().log_softmax(-1) for w, part in zip(preference[wanted], parts, strict=True)])
    return fused.sum(0).log_softmax(-1)


@torch.no_grad()
def steered_logits(
    policy: Any, adapter: str, preferences: FloatArray, inputs: dict[str, Tensor], length: int
) -> Tensor:
    """Logits `(B, T, V)` before each of the last T = `length` tokens, every row steered to a preference of its own.

    Args:
        policy: a model with HoE layers.
        adapter: its HoE adapter.
        preferences: `(B, N)`.
        inputs: what the model is called with, `(B, S)` each.
        length: T < S.
    """

    def call(rows: Any, wanted: FloatArray) -> Tensor:
        place = torch.as_tensor(rows)
        mine = inputs if wanted.ndim > 1 else {name: value[place.to(value.device)] for name, value in inputs.items()}
        with use_preference(policy, {adapter: wanted.tolist()}):
            return response_logits(policy, mine, length)[0]

    def join(parts: list[Tensor], places: Any) -> Tensor:
        return torch.cat(parts)[torch.as_tensor(places, device=parts[0].device)]

    return by_preference(call, preferences, join)[0]


def divergence(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Generalised Jensen-Shannon divergence (GKD, arXiv 2306.13649, eq. 1) of log-probabilities `(..., V)`, `(...)` in nats.

    `beta` 0 is KL(teacher ‖ student), 1 is KL(student ‖ teacher), and between them β KL(teacher ‖ M) + (1 − β) KL(student ‖ M)
    with M = β teacher + (1 − β) student.
    """
    if beta == 0:
        return _kl(teacher, student)
    if beta == 1:
        return _kl(student, teacher)
    shares = torch.tensor([beta, 1 - beta], dtype=student.dtype, device=student.device).log()
    mixture = torch.logsumexp(torch.stack([teacher + shares[0], student + shares[1]]), dim=0)
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def _kl(first: Tensor, second: Tensor) -> Tensor:
    return F.kl_div(second, first, reduction="none", log_target=True).sum(-1)
