"""An adapter as it is now, to be put back after experts and routers were added and found to be of no use.

Adding something makes new modules and leaves the old ones alone, so that holding on to these is enough: what is put back is
the same to the bit. Removing what was added would not be: products of experts may have been scaled meanwhile, and a calibration
dropped.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from torch import nn

from .functional import adapter_of
from .growing import layers_of
from .layer import HoELayer


class AdapterSnapshot:
    """What an adapter holds, without a copy of its tensors.

    It is for changes by `add_expert` and `add_router`, and for the training of routers that were added since. Who writes into
    the tensors that were there before, changes them here, too.

    Args:
        model: carries HoE layers.
        adapter_name: of the adapter; None for the first active one.
    """

    def __init__(self, model: nn.Module, adapter_name: str | None = None) -> None:
        self._adapter = adapter_of(model, adapter_name)
        name = self._adapter.name
        self._config = deepcopy(self._adapter.config)
        self._layers: list[tuple[HoELayer, dict[str, nn.Module], Any]] = [
            (layer, _parts(layer, name), layer.hoe_layouts[name]) for layer in layers_of(model, name)
        ]

    def restore(self) -> None:
        """Put it back."""
        name = self._adapter.name
        for layer, parts, layout in self._layers:
            for part in layer.adapter_layer_names:
                group: Any = getattr(layer, part)
                if part in parts:
                    group[name] = parts[part]
                elif name in group:
                    del group[name]
            layer.hoe_layouts[name] = layout
            layer.forget_steps()
        self._adapter.config.become(deepcopy(self._config))
        self._adapter.renew()


def _parts(layer: HoELayer, adapter: str) -> dict[str, nn.Module]:
    groups = {part: getattr(layer, part) for part in layer.adapter_layer_names}
    return {part: group[adapter] for part, group in groups.items() if adapter in group}
