"""From the rows of a plan to the rows of a layer's input."""

from __future__ import annotations

import re

import torch

from ..errors import RowsError
from .calls import Call
from .plan import Plan

# Where the tokens of a batch arrive in an order of their own, perhaps as many as there are rows.
_DISPATCHED = re.compile(r"(^|\.)experts?(\.|$)")


def repeats(x: torch.Tensor, plan: Plan, call: Call | None, module: str) -> int:
    """How often each row of the plan stands in x: 1, what generate expands by, or also the length for flat inputs.

    Raises:
        RowsError: the rows of x are no such multiple, so they are not samples in order; names the module.
    """
    if plan.rows is None:
        return 1
    expansions = call.expansions if call is not None else frozenset({1})
    lengths = call.lengths if call is not None and x.ndim == 2 else frozenset()
    allowed = expansions | {length * expansion for length in lengths for expansion in expansions}
    rows, rest = divmod(x.shape[0], plan.rows)
    dispatched = x.ndim == 2 and plan.rows > 1 and _DISPATCHED.search(module) is not None
    if rest or rows not in allowed or dispatched:
        raise RowsError(
            f"{module} was given an input of shape {tuple(x.shape)}, whose rows are not the {plan.rows} rows "
            "that preferences were given for (dispatched experts, packed batches and patches are not); use one "
            "preference for the whole batch, or exclude this module",
            module=module,
            shape=x.shape,
        )
    return rows


def per_row(weights: torch.Tensor, repeat: int, ndim: int) -> torch.Tensor:
    """`(rows, K)` as `(K,)` where all rows share it, else `(rows * repeat, 1, ..., K)` to go with an input of `ndim`."""
    if weights.shape[0] == 1:
        return weights[0]
    weights = weights.repeat_interleave(repeat, dim=0)
    return weights.reshape(weights.shape[0], *([1] * (ndim - 2)), weights.shape[1])
