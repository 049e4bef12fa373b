"""MOD (Shi et al. 2024): log π(λ) ∝ Σ_i λ_i log π_i, token by token.

The policies are their experts in one model, N rows for each prompt; MOD as published runs N models. See
`evaluation.fused_generation`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ...generation.fused_generation import generate_fused
from ...generation.settings import evaluating
from ...preference import FloatArray
from ..methods.hoe import HoEMethod
from .adapters import Source, load_adapted, one_hot_adapter


def mod(
    base: Source,
    policies: Mapping[str, Source],
    *,
    tokenizer: Any,
    folder: Source,
    max_new_tokens: int = 64,
    do_sample: bool = False,
    temperature: float = 1.0,
    model_options: Mapping[str, Any] | None = None,
    **build: Any,
) -> FusedExperts:
    """Logit fusion of the policies' LoRA experts; `build` are options of `build_adapter`."""
    model = load_adapted(base, one_hot_adapter(folder, base, policies, **build), model_options)
    return FusedExperts(model, tokenizer, max_new_tokens=max_new_tokens, do_sample=do_sample, temperature=temperature)


class FusedExperts(HoEMethod):
    """A model with HoE layers, whose one-hot preferences are fused."""

    name = "MOD"

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Any], preferences: FloatArray) -> list[str]:
        """Complete K prompts, row k at `preferences[k]` of `(K, N)`; K · N rows run at once."""
        ids, mask = self.decoder.tokens(self.model, prompts)
        wanted = np.asarray(preferences, dtype=np.float64)
        with evaluating(self.model):
            output = generate_fused(self.model, self.adapter, wanted, ids, mask, self.decoder.settings)
        return self.decoder.texts(output[:, ids.shape[1] :])
