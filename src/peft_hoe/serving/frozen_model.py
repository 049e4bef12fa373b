"""A model as an exported LoRA makes it: its own base, without a router, with fixed factors and norms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..tuner.embedding import HoEEmbedding
from ..tuner.layer import HoELayer
from ..tuner.norm import HoENorm


@contextmanager
def frozen(
    layers: Sequence[HoELayer], factors: Mapping[str, tuple[Tensor, Tensor]], norms: Mapping[str, Tensor]
) -> Iterator[None]:
    """The base plus B A in every module, and with these norms, as PEFT computes it, while the block lasts.

    Args:
        layers: all HoE layers of the model.
        factors: A `(r, d_in)` and B `(d_out, r)` by module.
        norms: weights and biases `(d,)` that are saved whole, by parameter.
    """
    hooks: list[Any] = []
    try:
        for each in layers:
            layer: Any = each
            layer.enable_adapters(False)
            if isinstance(layer, HoENorm):
                hooks.append(layer.register_forward_hook(_replacing(layer, norms), with_kwargs=True))
            else:
                add = _looking_up if isinstance(layer, HoEEmbedding) else _adding
                hooks.append(layer.register_forward_hook(add(*factors[layer.module_name])))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer in layers:
            layer.enable_adapters(True)


def _adding(a: Tensor, b: Tensor) -> Any:
    """A hook of a linear module that adds B A x; A `(r, d_in)`, B `(d_out, r)`."""

    def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        inner = F.linear(args[0].to(a.dtype), a.to(output.device))
        return output + F.linear(inner, b.to(output.device)).to(output.dtype)

    return add


def _looking_up(a: Tensor, b: Tensor) -> Any:
    """A hook of an embedding that adds B A of each token, by its scale; A `(r, vocabulary)`, B `(d, r)`."""

    def add(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        delta = F.linear(F.embedding(args[0], a.T.to(output.device)), b.to(output.device))
        return output + (delta * getattr(module.get_base_layer(), "embed_scale", 1.0)).to(output.dtype)

    return add


def _replacing(layer: HoENorm, norms: Mapping[str, Tensor]) -> Any:
    """A hook of a norm that computes it again with the weights and biases `(d,)` that were saved whole."""
    own = layer.parameters_before_merging()
    whole = {name: norms[f"{layer.module_name}.{name}"].to(tensor.device, tensor.dtype) for name, tensor in own.items()}

    def replace(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Tensor) -> Any:
        return torch.func.functional_call(layer.get_base_layer(), whole, args, kwargs)

    return replace
