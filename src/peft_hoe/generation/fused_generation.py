"""MOD decoding (multi-objective decoding, arXiv 2406.18853): sample from log π ∝ Σ_i λ_i log π_i, token by token.

All single-objective experts run in one model, as rows of one batch: row (i, b) is prompt b steered to objective i. A logits
processor gives all rows of a prompt the same fused scores, so that they choose the same token and keep the cache of one text.
Sampling adds one draw of Gumbel noise per prompt and token: its argmax is a sample of the softmax.

Shapes: B prompts, P prompt positions, T new tokens, V vocabulary, N objectives.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from ..preference import FloatArray
from ..tuner.functional import use_preference
from .settings import generating


@torch.no_grad()
def generate_fused(
    model: Any,
    adapter: str,
    preferences: FloatArray,
    input_ids: Tensor,
    attention_mask: Tensor,
    settings: GenerationConfig,
) -> Tensor:
    """Prompts and their completions `(B, P + T)`; B·N rows run at once.

    Args:
        model: carries HoE layers.
        adapter: its HoE adapter.
        preferences: `(B, N)`, a λ for each prompt.
        input_ids: `(B, P)`, padded on the left.
        attention_mask: `(B, P)`.
        settings: of the generation. With `do_sample` the fusion is sampled at `temperature`, from the whole vocabulary, with
            torch's global random numbers.
    """
    objectives, rows = preferences.shape[1], len(input_ids)
    plain = copy.deepcopy(settings)
    plain.do_sample, plain.temperature, plain.top_k, plain.top_p = False, None, None, None
    temperature = settings.temperature if settings.do_sample else None
    fusion = _Fusion(torch.as_tensor(preferences.T, dtype=torch.float32, device=input_ids.device), temperature)
    corners = {adapter: np.eye(objectives).repeat(rows, axis=0).tolist()}
    with generating(model, plain), use_preference(model, corners):
        output = model.generate(
            input_ids=input_ids.repeat(objectives, 1),
            attention_mask=attention_mask.repeat(objectives, 1),
            generation_config=plain,
            logits_processor=LogitsProcessorList([fusion]),
        )
    chosen: Tensor = output[:rows]
    return chosen


class _Fusion(LogitsProcessor):
    """Replaces the scores of all rows of a prompt by their fusion.

    Args:
        weights: `(N, B)`.
        temperature: of sampling; None for greedy.
    """

    def __init__(self, weights: Tensor, temperature: float | None) -> None:
        self.weights = weights.unsqueeze(-1)
        self.temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        objectives, rows = self.weights.shape[:2]
        logs = scores.float().log_softmax(-1).view(objectives, rows, -1)
        fused = torch.where(self.weights > 0, self.weights * logs, 0.0).sum(0)  # 0 · log 0 = 0
        if self.temperature is not None:
            uniform = torch.rand_like(fused).clamp_min(torch.finfo(torch.float32).tiny)
            fused = fused / self.temperature - (-uniform.log()).log()
        return fused.repeat(objectives, 1)
