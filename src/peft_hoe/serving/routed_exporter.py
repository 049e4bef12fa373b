"""Writes preferences of one adapter as LoRAs that carry its routers, for vLLM with the gate (`vllm_punica.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from ..config import HoEConfig
from ..errors import HoEError
from ..files import ADAPTER_WEIGHTS
from ..preference import FloatArray, parse_preference
from .frozen_votes import freeze
from .lora_config import lora_config
from .lora_exporter import LoraExporter
from .lora_factors import LoraFactors, lora_factors
from .routed_lora import RoutedFormat, RoutedVotes, routed_factors, routed_votes
from .source import AdapterSource

_NO_LINEAR = ("lm_head", "embed_out", "embed_tokens", "score")  # vLLM adds their LoRAs on ways of their own


class RoutedExporter(LoraExporter):
    """Writes preferences of one adapter; where no trained router votes, as the ordinary LoRA that they are.

    Args:
        source: the adapter.
        layout: the room for routers, the same for all adapters of a server.

    Raises:
        HoEError: vLLM adapts a module of it on a way that the gate does not see.
    """

    def __init__(self, source: AdapterSource, layout: RoutedFormat) -> None:
        super().__init__(source)
        self.layout = layout
        self._voting = [module for module in source.modules if not source.config.votes_statically(module)]
        if beside := [name for name in self._voting if name.rpartition(".")[2] in _NO_LINEAR]:
            raise HoEError(
                f"{source.label} adapts {beside}, where trained routers cannot vote inside vLLM; leave them out of "
                "target_modules (target_embeddings takes them), serve it with peft-hoe serve, or without routers (peft-hoe "
                "vllm --routers drop)",
                argument="target_modules",
                value=beside,
            )

    @property
    def how(self) -> list[Any]:
        """All besides the adapter's files that the LoRAs depend on."""
        return [*super().how, self.layout.experts, self.layout.slots]

    def routed(self, preference: Any) -> RoutedVotes:
        """The votes of a preference.

        Raises:
            PreferenceError: not a point of the simplex.
        """
        return routed_votes(self.source.config, parse_preference(preference, self.source.objectives))

    @cached_property
    def _outputs(self) -> dict[str, int]:
        return {module: self.source.factors(module)[1].shape[0] for module in self._voting}

    def _ranks(self, preference: Any) -> dict[str, int]:
        votes = self.routed(preference)
        if not votes.by_input:
            return super()._ranks(preference)
        every = {module: self.source.ranks(module) for module in self._voting}
        routed = {
            module: self.layout.rank(self._outputs[module], sum(every[module][expert] for expert in votes.experts))
            for module in self._voting
        }
        return super()._ranks(preference) | routed

    def write(self, preference: Any, directory: Path, shown_as: Path | None = None) -> Any:
        """Write a LoRA into an existing directory."""
        votes = self.routed(preference)
        if not votes.by_input:
            return super().write(preference, directory, shown_as)
        # Embeddings and heads go by fixed votes: theirs are ordinary factors.
        shared = freeze(self.source.config, preference).shared
        factors: dict[str, LoraFactors] = {
            module: routed_factors(self.source, module, votes, self.layout)
            if module in self._outputs
            else lora_factors(self.source, module, shared)
            for module in self.source.modules
        }
        self.add_tied_heads(factors)
        metadata = {"format": "pt", "peft_hoe": "carries routers"}
        save_file(self.tensors(factors, {}), directory / ADAPTER_WEIGHTS, metadata=metadata)
        lora_config(self.source, {module: each.rank for module, each in factors.items()}).save_pretrained(
            str(directory)
        )
        return None


def room(configs: Sequence[tuple[HoEConfig, FloatArray]]) -> RoutedFormat | None:
    """The room that adapters need at preferences `(K, N)` each; None where no trained router votes at any."""
    votes = [routed_votes(config, point) for config, points in configs for point in points]
    voting = [each for each in votes if each.by_input]
    if not voting:
        return None
    return RoutedFormat(max(len(each.experts) for each in voting), max(each.slots for each in voting))
