"""MOD (Shi et al. 2024): log π(λ) ∝ Σ_i λ_i log π_i, token by token.

The policies are their experts in one model, N rows for each prompt; MOD as published runs N models. See
`evaluation.fused_generation`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ...generation.fused_generation import check_fusible, generate_fused
from ...generation.settings import evaluating
from ...preference import FloatArray
from ..methods.fingerprints import Source
from ..methods.hoe import HoEMethod
from .adapters import load_adapted, one_hot_adapter


def mod(
    base: Source,
    policies: Mapping[str, Source],
    *,
    tokenizer: Any,
    folder: Source,
    decoding: Any = None,
    model_options: Mapping[str, Any] | None = None,
    **build: Any,
) -> FusedExperts:
    """Logit fusion of the policies' LoRA experts; `build` are options of `build_adapter`."""
    model = load_adapted(base, one_hot_adapter(folder, base, policies, **build), model_options)
    return FusedExperts(model, tokenizer, decoding=decoding)


class FusedExperts(HoEMethod):
    """A model with HoE layers, whose one-hot preferences are fused."""

    name = "MOD"

    def __init__(self, model: Any, tokenizer: Any, *, decoding: Any = None) -> None:
        super().__init__(model, tokenizer, decoding=decoding)
        check_fusible(self.completer.decoding)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Any], preferences: FloatArray) -> list[str]:
        """Complete K prompts, row k at `preferences[k]` of `(K, N)`; K · N rows run at once."""
        wanted = np.asarray(preferences, dtype=np.float64)
        batch = self.completer.batch(self.model, prompts)
        with evaluating(self.model):
            return generate_fused(
                self.model, self.adapter, wanted, batch, self.completer.tokenizer, self.completer.decoding
            ).texts
