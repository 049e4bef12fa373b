"""What one process computes for all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate.utils import broadcast_object_list

from ...errors import HoEError
from ...preference import FloatArray

T = TypeVar("T")


def on_first_process(accelerator: Any, compute: Callable[[], T], *, together: bool = False) -> T:
    """What `compute` returns on the first process, on all of them.

    Args:
        accelerator: of this process.
        compute: what there is to do.
        together: the others do it too, and only what the first has counts: it calls a model whose shards all processes gather.

    Raises:
        HoEError: it raised there, so that the others do not wait for ever; the first process raises what it was.
    """
    if accelerator.num_processes == 1:
        return compute()
    found: list[Any] = [None, None]
    raised: Exception | None = None
    if accelerator.is_main_process:
        try:
            found[0] = compute()
        except Exception as error:
            raised, found[1] = error, f"{type(error).__name__}: {error}"
    elif together:
        with contextlib.suppress(Exception):
            compute()
    broadcast_object_list(found)
    if raised is not None:
        raise raised
    if found[1] is not None:
        raise HoEError(f"the first process failed: {found[1]}")
    result: T = found[0]
    return result


def over_processes(accelerator: Any, values: Any) -> FloatArray:
    """Sum of numbers over all processes, same shape; float64 where the device has it."""
    dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
    tensor = torch.as_tensor(np.asarray(values), dtype=dtype, device=accelerator.device)
    return np.asarray(accelerator.reduce(tensor, reduction="sum").cpu(), dtype=np.float64)


def mean_rewards(accelerator: Any, rewards: FloatArray) -> FloatArray:
    """Mean over the samples `(B, N)` of all processes, `(N,)`; NaN samples are left out, an objective without any is NaN."""
    known = ~np.isnan(rewards)
    total, count = over_processes(accelerator, np.stack([np.where(known, rewards, 0.0).sum(0), known.sum(0)]))
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
