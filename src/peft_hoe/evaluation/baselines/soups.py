"""Rewarded soups (Ramé et al. 2023): the weights of the policies are interpolated, θ(λ) = Σ_i λ_i θ_i.

In LoRA form one adapter of the policies' experts is enough: B = [B_1 ... B_N] scaled by λ over the ranks makes Σ_i λ_i B_i A_i
exactly, for every row of a batch. Averaging nearly orthogonal task vectors loses length, about 30 % for two; `rs_norm` gives
it back in every module (`interpolation="norm"`), which makes the strongest comparison that needs the same experts only.
`rs_dense` interpolates all weights of the full policies, embeddings and norms too, and holds all policies in memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch

from ...generation.completer import Completer
from ...preference import FloatArray
from ..methods.fingerprints import Source
from ..methods.hoe import HoEMethod
from .adapters import load_adapted, load_base, load_policy, one_hot_adapter
from .per_preference import PerPreference, sources_identity


def rs(
    base: Source,
    policies: Mapping[str, Source],
    *,
    tokenizer: Any,
    folder: Source,
    interpolation: str = "linear",
    decoding: Any = None,
    model_options: Mapping[str, Any] | None = None,
    **build: Any,
) -> HoEMethod:
    """Rewarded soups of LoRA experts.

    With `interpolation="norm"` the experts have their length restored at every preference. `build` are options of
    `build_adapter`, such as `r`.
    """
    path = one_hot_adapter(folder, base, policies, interpolation=interpolation, **build)
    method = HoEMethod(load_adapted(base, path, model_options), tokenizer, decoding=decoding)
    method.name = "RS" if interpolation == "linear" else "RS, norm restored"
    return method


rs_norm = partial(rs, interpolation="norm")


def rs_dense(
    base: Source,
    policies: Mapping[str, Source],
    *,
    tokenizer: Any,
    folder: Source | None = None,
    decoding: Any = None,
    model_options: Mapping[str, Any] | None = None,
) -> DenseSoup:
    """Rewarded soups as published: all weights of the policies are interpolated. `folder` is not used."""
    model = load_base(base, model_options)
    return DenseSoup(base, policies, model, Completer(model, tokenizer, decoding), model_options)


class DenseSoup(PerPreference):
    """All weights of the policies, interpolated in float32."""

    def __init__(
        self,
        base: Source,
        policies: Mapping[str, Source],
        model: Any,
        completer: Completer,
        model_options: Mapping[str, Any] | None,
    ) -> None:
        super().__init__("RS, dense", list(policies), completer, sources_identity(base, policies))
        self.model = model
        self.states = [load_policy(base, source, model_options).state_dict() for source in policies.values()]

    @contextlib.contextmanager
    def at(self, preference: FloatArray) -> Iterator[Any]:
        """The model at a preference `(N,)`."""
        mixed = {
            name: torch.stack([weight * state[name].float() for weight, state in zip(preference, self.states, strict=True)])
            .sum(0)
            .to(tensor.dtype)
            for name, tensor in self.states[0].items()
        }  # fmt: skip
        self.model.load_state_dict(mixed)
        yield self.model
