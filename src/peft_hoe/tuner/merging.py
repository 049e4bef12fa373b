"""Merging: the current preference baked into the base's weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from .linear import HoELinear
from .steering import Steering


class Merging:
    """What a HoEModel offers to merge its adapters, or to take them out."""

    model: Any
    steering: Steering
    active_adapters: Any
    use_preference: Any

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False, routers: str | None = None
    ) -> None:
        """Bake the current preference into the base weights; see PEFT.

        Args:
            adapter_names: default the active ones.
            safe_merge: check for NaN before replacing weights.
            routers: as in `use_preference`, and default what the block around the call says: "keep" refuses trained routers,
                "static" and "drop" bake what they leave.

        Raises:
            StaticMergeError: before anything is changed.
        """
        with self._merging(adapter_names, routers):
            super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)  # type: ignore[misc]

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        routers: str | None = None,
    ) -> nn.Module:
        """The base model with the current preference baked in; see PEFT, and `merge_adapter` for `routers`."""
        tied = self._has_tied_head()
        with self._merging(adapter_names, routers):
            model: Any = super().merge_and_unload(  # type: ignore[misc]
                progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
            )
        self._leave_no_trace()
        if tied:  # the merged head is another than the embeddings, also when it is saved and loaded; older PEFT does not say so
            for config in {id(config): config for config in (model.config, model.config.get_text_config())}.values():
                config.tie_word_embeddings = False
        result: nn.Module = model
        return result

    def _check_merge_allowed(self) -> None:
        """PEFT warns here of heads that are tied to embeddings; a merged HoE head gets a weight of its own."""

    def _has_tied_head(self) -> bool:
        """Whether the output embeddings are adapted, and their weight is the input embeddings'."""
        try:
            inputs, outputs = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        except (AttributeError, NotImplementedError):
            return False
        return isinstance(outputs, HoELinear) and outputs.get_base_layer().weight is getattr(inputs, "weight", None)

    def unload(self) -> nn.Module:
        """The base model without the adapters."""
        model: nn.Module = super().unload()  # type: ignore[misc]
        self._leave_no_trace()
        return model

    def _leave_no_trace(self) -> None:
        self.steering.hooks.detach(self.model)
        for name in list(self.steering.adapters):
            self.steering.remove(name)

    @contextlib.contextmanager
    def _merging(self, adapter_names: list[str] | None, routers: str | None) -> Iterator[None]:
        block = contextlib.nullcontext() if routers is None else self.use_preference(routers=routers)
        with block:
            for layer in _layers(self.model):
                for adapter in self.active_adapters if adapter_names is None else adapter_names:
                    if adapter in layer.hoe_A and adapter not in layer.merged_adapters:
                        layer.check_mergeable(adapter)
            yield


def _layers(model: nn.Module) -> Iterator[HoELinear]:
    return (module for module in model.modules() if isinstance(module, HoELinear))
