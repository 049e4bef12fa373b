"""Which base an adapter belongs to, told from a few of its weights: recorded in a build, compared in loading.

A name says little: a folder is moved, a repository gets new weights. The record holds the shapes of the adapted weights, as a
hash, and some of their numbers. Numbers are compared in the dtype of the model that is loaded, rounded to it, so that a base in
another precision is recognised exactly. Of a quantised one nothing is compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError

_MODULES, _ENTRIES = 16, 4  # that are sampled: modules, spread over all; entries of each

Rows = Callable[[str, int], Tensor]  # one row of a module's weight, as it is stored


def positions(shape: Sequence[int]) -> list[tuple[int, int]]:
    """The entries of a weight `(rows, columns)` that are looked at: on its diagonal, spread out."""
    return [
        ((2 * i + 1) * shape[0] // (2 * _ENTRIES), (2 * i + 1) * shape[1] // (2 * _ENTRIES)) for i in range(_ENTRIES)
    ]


def make_sample(shapes: Mapping[str, Sequence[int]], row: Rows) -> dict[str, Any]:
    """The record of a base.

    Args:
        shapes: `{module: stored shape of its weight}` of all adapted modules.
        row: reads one row of a module's weight.

    Returns:
        `shapes`: a hash; `values`: `{module: entries in float32}` of some modules.
    """
    names = sorted(shapes)
    chosen = names[:: -(-len(names) // _MODULES)]
    values = {
        name: [float(row(name, i)[j].to(torch.float32)) for i, j in positions(shapes[name])] for name in chosen
    }  # fmt: skip
    return {"shapes": hash_shapes(shapes), "values": values}


def checked_sample(value: Any) -> dict[str, Any] | None:
    """A record as a configuration file has it, which may be a stranger's.

    Raises:
        CheckpointError: it is no record.
    """
    if value is None:
        return None
    values = value.get("values") if isinstance(value, dict) else None
    if (
        not isinstance(values, dict)
        or not isinstance(value.get("shapes"), str)
        or not all(map(_is_row, values.values()))
    ):
        raise CheckpointError(
            f"base_sample is {str(value)[:80]}; it must be what build_adapter wrote, or be left out",
            argument="base_sample",
            value=value,
        )
    return value


def _is_row(row: Any) -> bool:
    return isinstance(row, list) and len(row) == _ENTRIES and all(isinstance(number, (int, float)) for number in row)


def hash_shapes(shapes: Mapping[str, Sequence[int]]) -> str:
    """A hash of names and shapes."""
    text = "\n".join(f"{name} {tuple(shape)}" for name, shape in sorted(shapes.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differing(sample: Mapping[str, Any], weights: Mapping[str, Tensor]) -> list[str]:
    """The modules of a model whose weights are not those of a record; all that were sampled where shapes differ.

    Args:
        sample: what `make_sample` gave.
        weights: `{module: weight}` of all adapted modules; those that cannot be looked at are passed over.
    """
    seen = {name: weight for name, weight in weights.items() if _visible(weight)}
    shapes = {name: tuple(weight.shape) for name, weight in seen.items()}
    if len(seen) == len(weights) and hash_shapes(shapes) != sample["shapes"]:
        return sorted(sample["values"])
    return [name for name in sample["values"] if name in seen and not _same(seen[name], sample["values"][name])]


def _visible(weight: Tensor) -> bool:
    """Whether a weight is a plain matrix with its numbers at hand: not quantised, sharded, offloaded or empty."""
    return (
        type(weight) in (Tensor, torch.nn.Parameter)
        and weight.is_floating_point()
        and weight.ndim == 2
        and not weight.is_meta
    )


def _same(weight: Tensor, expected: list[float]) -> bool:
    values = torch.stack([weight[i, j] for i, j in positions(weight.shape)]).detach().cpu()
    return torch.equal(values, torch.tensor(expected).to(values.dtype))
