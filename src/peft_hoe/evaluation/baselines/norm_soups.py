"""Rewarded soups with their length restored: the strongest comparison that needs nothing but the same experts.

Averaging nearly orthogonal task vectors loses their length, about 30 % for two. Module by module,

    delta(λ) = c(λ) Σ_i λ_i τ_i ,   c(λ) = Σ_i λ_i ‖τ_i‖ / ‖Σ_i λ_i τ_i‖ ,   at most 3

the rule that `build_adapter` calls "policy_norm". τ_i = B_i A_i is the expert of policy i, as it was built. All inner products
follow from the factors: <τ_i, τ_j> = sum of (B_iᵀ B_j) * (A_i A_jᵀ).

Shapes: N objectives, M modules.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from ...experts.rescale import rescale_factor
from ...preference import FloatArray
from ...tuner.functional import use_preference
from ...tuner.layer import HoELayer
from ..decoding import Decoder
from .adapters import Source, load_adapted, one_hot_adapter
from .per_preference import PerPreference, sources_identity, weights_scaled


def rs_norm(
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
) -> NormSoup:
    """Rewarded soups of LoRA experts with their length restored; `build` are options of `build_adapter`."""
    model = load_adapted(base, one_hot_adapter(folder, base, policies, **build), model_options)
    decoder = Decoder(model, tokenizer, max_new_tokens=max_new_tokens, do_sample=do_sample, temperature=temperature)
    return NormSoup(model, list(policies), decoder, sources_identity(base, policies, **build))


class NormSoup(PerPreference):
    """One model of one-hot experts, whose B is scaled by c(λ)."""

    def __init__(self, model: Any, objectives: list[str], decoder: Decoder, identity: Any) -> None:
        super().__init__("RS, norm restored", objectives, decoder, identity)
        self.model, self.adapter = model, model.active_adapter
        layers = [module for module in model.modules() if isinstance(module, HoELayer)]
        self.weights = [layer.factors(self.adapter)[1] for layer in layers]
        self.grams = [_gram(layer, self.adapter) for layer in layers]

    def factors(self, preference: FloatArray) -> list[float]:
        """The c(λ) of the M modules."""
        found = []
        for gram in self.grams:
            kept = math.sqrt(max(float(preference @ gram @ preference), 0.0))
            lengths = float(preference @ np.sqrt(gram.diagonal()))
            found.append(rescale_factor("policy_norm", kept, kept, lengths))
        return found

    @contextlib.contextmanager
    def at(self, preference: FloatArray) -> Iterator[Any]:
        """The model at a preference `(N,)`."""
        with (
            weights_scaled(self.weights, self.factors(preference)),
            use_preference(self.model, {self.adapter: preference.tolist()}),
        ):
            yield self.model


def _gram(layer: HoELayer, adapter: str) -> FloatArray:
    """Inner products `(N, N)` of a module's experts."""
    weight_a, weight_b = (weight.detach().double() for weight in layer.factors(adapter))
    ranks = list(layer.hoe_layouts[adapter].ranks)
    products = (weight_b.T @ weight_b) * (weight_a @ weight_a.T)  # (sum r, sum r)
    blocks = [[cell.sum() for cell in row.split(ranks, dim=1)] for row in products.split(ranks, dim=0)]
    return np.asarray(torch.tensor(blocks, dtype=torch.float64).numpy())
