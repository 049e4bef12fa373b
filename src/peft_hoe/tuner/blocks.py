"""`use_preference` blocks: what is in effect in this thread or task until a block ends."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from dataclasses import dataclass

from ..preference import FloatArray


@dataclass(frozen=True, eq=False)
class Block:
    """What a block says, those around it included.

    Attributes:
        steering: whose it is; others do not see it.
        preferences: by adapter, `(N,)` or one per row.
        routers: what routers do.
    """

    steering: object
    preferences: dict[str, FloatArray]
    routers: str


# Other threads and tasks do not see it.
_BLOCKS: contextvars.ContextVar[tuple[Block, ...]] = contextvars.ContextVar("peft_hoe_blocks", default=())


def innermost(steering: object) -> Block:
    """What the open blocks of a steering say together."""
    return next((block for block in reversed(_BLOCKS.get()) if block.steering is steering), Block(steering, {}, "keep"))


@contextlib.contextmanager
def opened(block: Block) -> Iterator[None]:
    """Inside, the block is the innermost one.

    Raises:
        RuntimeError: it is not the one that is left.
    """
    _BLOCKS.set((*_BLOCKS.get(), block))
    try:
        yield
    finally:
        blocks = _BLOCKS.get()
        _BLOCKS.set(tuple(other for other in blocks if other is not block))
        if not blocks or blocks[-1] is not block:
            raise RuntimeError(
                "use_preference blocks were left out of order, or in another thread or task than they were entered "
                "in; leave the inner block first"
            )
