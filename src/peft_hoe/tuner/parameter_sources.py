"""Parameters that something was made from: whether they can be read as they lie, and whether they are as they were then."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import nn


class Source(NamedTuple):
    """A Parameter that something was made from, and its state then.

    Attributes:
        parts: the adapters' modules of one kind, such as all B of a layer, by adapter.
        adapter: the key of `part` there.
        part: that holds the Parameter.
        name: of the Parameter in it.
        parameter: itself.
        pointer: where its values lay. No other tensor gets the place while `alias` is there.
        version: how often it had been written to; None where that does not matter, because views are all that was made.
        alias: of the same memory.
    """

    parts: Mapping[str, nn.Module | None]
    adapter: str
    part: nn.Module
    name: str
    parameter: torch.Tensor
    pointer: int
    version: int | None
    alias: torch.Tensor

    @staticmethod
    def of(parts: nn.ModuleDict, adapter: str, name: str, *, viewed: bool) -> Source:
        """The state of a Parameter now."""
        part = parts[adapter]
        parameter: torch.Tensor = getattr(part, name)
        tells = type(parameter) is nn.Parameter and not parameter.is_inference()
        version = None if viewed else parameter._version if tells else -1
        return Source(parts._modules, adapter, part, name, parameter, parameter.data_ptr(), version, parameter.detach())


def are_unchanged(sources: Iterable[Source]) -> bool:
    """Whether all are read as they were, without reading their values (a write through `.data` is not seen)."""
    for parts, adapter, part, name, parameter, pointer, version, _ in sources:  # for each token: no calls but C's
        if (
            parts.get(adapter) is not part
            or part._parameters.get(name) is not parameter
            or part._forward_pre_hooks
            or part._forward_hooks
            or "_hf_hook" in part.__dict__
            or parameter.data_ptr() != pointer
            or (version is not None and (version < 0 or parameter._version != version))
        ):
            return False
    return True


def is_there(part: nn.Module) -> bool:
    """Whether a module's Parameters may be read without calling it: no hook fetches them."""
    return not part._forward_hooks and not part._forward_pre_hooks and not hasattr(part, "_hf_hook")


def is_plain(part: nn.Module) -> bool:
    """Whether a linear's weight may be read without calling it: no hook and no wrapper fetches it."""
    return (
        type(part) is nn.Linear
        and is_there(part)
        and type(part.weight) in (nn.Parameter, torch.Tensor)
        and not hasattr(part.weight, "ds_id")
    )
