"""What one process computes for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate.utils import broadcast_object_list

from ..errors import HoEError

T = TypeVar("T")


def on_first_process(accelerator: Any, compute: Callable[[], T]) -> T:
    """What `compute` returns on the first process, on all of them.

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
    broadcast_object_list(found)
    if raised is not None:
        raise raised
    if found[1] is not None:
        raise HoEError(f"the first process failed: {found[1]}")
    result: T = found[0]
    return result
