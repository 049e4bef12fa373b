"""MOD decoding (multi-objective decoding, arXiv 2406.18853): sample from log π ∝ Σ_i λ_i log π_i, token by token.

All single-objective experts run in one model, as rows of one batch: row (i, b) is prompt b steered to objective i. A logits
processor gives all rows of a prompt the same fused scores, so that they choose the same token and keep the cache of one text.
Sampling adds one draw of Gumbel noise per prompt and token: its argmax is a sample of the softmax.

Shapes: B prompts, P prompt positions, T new tokens, V vocabulary, N objectives.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from ..errors import HoEError
from ..preference import FloatArray
from ..tuner.functional import check_in_effect, use_preference
from .checks import SAMPLING_OPTIONS
from .decoding import Decoding
from .prompts import PromptBatch
from .responses import Responses, generate_responses

_ONE_ROW_A_TEXT = ("num_beams", "num_beam_groups", "penalty_alpha", "prompt_lookup_num_tokens", "assistant_early_exit")


def check_fusible(decoding: Decoding) -> None:
    """See that a decoding chooses one token after the other from the fusion's probabilities.

    Raises:
        HoEError: it has beams, or another way to choose.
    """
    others = [name for name in (*_ONE_ROW_A_TEXT, *SAMPLING_OPTIONS) if decoding.options.get(name) not in (None, 1)]
    if others:
        raise HoEError(
            f"the decoding has {', '.join(f'{name} {decoding.options[name]!r}' for name in others)}, but logit fusion chooses "
            "tokens greedily or draws them, with temperature, top_k and top_p; leave the others out",
            argument=others[0],
            value=decoding.options[others[0]],
        )


@torch.no_grad()
def generate_fused(
    model: Any, adapter: str, preferences: FloatArray, prompts: PromptBatch, processing_class: Any, decoding: Decoding
) -> Responses:
    """Responses to B prompts; B·N rows run at once.

    Args:
        model: carries HoE layers.
        adapter: its HoE adapter.
        preferences: `(B, N)`, a λ for each prompt.
        prompts: B of them.
        processing_class: the policy's tokenizer.
        decoding: of the fusion; sampling uses torch's global random numbers. Penalties and the like apply to each expert's
            logits.

    Raises:
        HoEError: the decoding is none that `check_fusible` lets pass.
        PreferenceError: the adapter is disabled.
    """
    check_fusible(decoding)
    check_in_effect(model, adapter)
    rows, objectives = preferences.shape
    fusion = _Fusion(torch.as_tensor(preferences.T, dtype=torch.float32, device=prompts.ids.device), decoding)
    plain = replace(decoding, do_sample=False, temperature=1.0, top_k=0, top_p=1.0)
    with use_preference(model, {adapter: np.eye(objectives).repeat(rows, axis=0).tolist()}):
        found = generate_responses(
            model,
            prompts.select([*range(rows)] * objectives),
            processing_class,
            plain,
            rows * objectives,
            logits_processor=LogitsProcessorList([fusion]),
        )
    return found.select(range(rows))


class _Fusion(LogitsProcessor):
    """Replaces the scores of all rows of a prompt by their fusion.

    Args:
        weights: `(N, B)`.
        decoding: how a token is chosen from the fusion.
    """

    def __init__(self, weights: Tensor, decoding: Decoding) -> None:
        self.weights = weights.unsqueeze(-1)
        self.temperature = decoding.temperature if decoding.do_sample else None
        self.warpers = LogitsProcessorList()
        if decoding.top_k:
            self.warpers.append(TopKLogitsWarper(decoding.top_k))
        if decoding.top_p < 1:
            self.warpers.append(TopPLogitsWarper(decoding.top_p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        objectives, rows = self.weights.shape[:2]
        logs = scores.float().log_softmax(-1).view(objectives, rows, -1)
        fused = torch.where(self.weights > 0, self.weights * logs, 0.0).sum(0)  # 0 · log 0 = 0
        if self.temperature is not None:
            fused = self.warpers(input_ids[:rows], fused / self.temperature)  # type: ignore[arg-type]
            uniform = torch.rand_like(fused).clamp_min(torch.finfo(torch.float32).tiny)
            fused = fused - (-uniform.log()).log()
        return fused.repeat(objectives, 1)
