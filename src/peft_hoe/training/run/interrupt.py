"""Ctrl-C during training: the update under way is finished first."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Interrupt:
    """While the block lasts, the first SIGINT only sets `requested`; the second one acts as before the block.

    Does nothing outside the main thread, where Python does not let handlers be set.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        self.requested = False
        self._enabled = enabled and threading.current_thread() is threading.main_thread()
        self._previous: Any = None

    def __enter__(self) -> Interrupt:
        if self._enabled:
            self._previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *unused: Any) -> None:
        if self._enabled:
            signal.signal(signal.SIGINT, self._previous)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, self._previous)
