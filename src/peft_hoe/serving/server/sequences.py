"""One text under way: what was asked, what has been written, and who hears of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ...preference import FloatArray
from .sampling import Sampling
from .text_stream import TextStream


@dataclass(frozen=True)
class Progress:
    """What a listener hears.

    Attributes:
        text: new text.
        reason: why the text is over: "stop" or "length"; None while it goes on.
        error: what failed; the text is then over as well.
    """

    text: str = ""
    reason: str | None = None
    error: Exception | None = None

    @property
    def is_last(self) -> bool:
        """Whether nothing follows."""
        return self.reason is not None or self.error is not None


@dataclass(eq=False)
class TextRequest:
    """One text under way.

    Args:
        prompt: token ids.
        preference: `(N,)`.
        max_new_tokens: where the text ends at the latest.
        sampling: how tokens are chosen.
        stop_tokens: the text ends at any of them.
        stream: collects its tokens.
        listener: is called with every `Progress`, from the engine's thread.

    Attributes:
        cancelled: set by whoever no longer wants it, from any thread.
    """

    prompt: Sequence[int]
    preference: FloatArray
    max_new_tokens: int
    sampling: Sampling
    stop_tokens: Sequence[int]
    stream: TextStream
    listener: Callable[[Progress], Any]
    cancelled: bool = False
    over: bool = False
    _generator: Any = field(default=None, repr=False)

    def choose(self, logits: Tensor) -> int:
        """The next token for logits `(V,)`."""
        if self._generator is None:
            self._generator = self.sampling.generator()
        return self.sampling.draw(logits, self._generator)

    def accept(self, token: int) -> None:
        """Take the next token, and tell the listener what it means."""
        if token in self.stop_tokens:
            self.end("stop")
            return
        text = self.stream.push(token)
        if self.stream.stopped:
            self.end("stop", text)
        elif len(self.stream.ids) >= self.max_new_tokens:
            self.end("length", text)
        elif text:
            self.listener(Progress(text))

    def end(self, reason: str, text: str = "") -> None:
        """The text is over."""
        self.over = True
        self.listener(Progress(text + self.stream.finish(), reason))

    def fail(self, error: Exception) -> None:
        """The text will not be written."""
        self.over = True
        self.listener(Progress(error=error))
