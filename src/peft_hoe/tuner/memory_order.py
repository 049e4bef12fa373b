"""How a frozen B `(d_out, r)` lies in memory: column by column for decoding, row by row where it is saved."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .parameter_sources import is_plain


def columns_together(part: Any) -> None:
    """Lay the columns of a frozen B one behind the other in memory, as A's rows are.

    A stretch of experts is then a block of memory, and a step of decoding reads it as fast as a whole matrix. Shapes,
    and what is saved, stay as they are. What trains, is on the meta device or is fetched by a hook is left alone.

    Args:
        part: the module that holds B.
    """
    weight = part.weight if is_plain(part) else None
    if type(weight) is not nn.Parameter or weight.requires_grad or weight.is_meta or weight.is_inference():
        return
    if weight.is_contiguous():
        with torch.inference_mode(False):  # a later training step may use it
            weight.data = weight.data.t().contiguous().t()


def rows_together(layer: Any, state: dict[str, Any], prefix: str, *unused: Any) -> None:
    """A hook of `state_dict`: safetensors refuses that order, and older PEFTs hand on what there is."""
    for adapter in layer.hoe_B:
        key = f"{prefix}hoe_B.{adapter}.weight"
        if type(state.get(key)) is torch.Tensor:  # a Parameter is asked for itself (keep_vars)
            state[key] = state[key].contiguous()
