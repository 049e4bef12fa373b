"""Text that grows token by token, handed on as soon as it is certain, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\ufffd"  # what a tokenizer decodes half a character to


class TextStream:
    """The text of one completion.

    Args:
        tokenizer: decodes; special tokens are left out.
        stop_strings: the text ends before the first of them.

    Attributes:
        ids: tokens so far.
        text: handed on so far.
        stopped: whether a stop string has been found.
    """

    def __init__(self, tokenizer: Any, stop_strings: Sequence[str] = ()) -> None:
        self.ids: list[int] = []
        self.text = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop_strings = tuple(stop_strings)
        self._held = ""  # decoded, but perhaps the beginning of a stop string
        # Tokens are decoded from `_start`, since the first of a text loses its space; up to `_read` they have been.
        self._start = self._read = 0

    def push(self, token: int) -> str:
        """Add a token.

        Returns:
            the text that has become certain, often empty.
        """
        self.ids.append(token)
        before = self._decode(self._start, self._read)
        now = self._decode(self._start, len(self.ids))
        if len(now) > len(before) and not now.endswith(_INCOMPLETE):
            self._held += now[len(before) :]
            self._start, self._read = self._read, len(self.ids)
        return self._hand_on(self._certain())

    def finish(self) -> str:
        """The rest, when no token follows."""
        if not self.stopped:
            before = self._decode(self._start, self._read)
            self._held += self._decode(self._start, len(self.ids))[len(before) :]
            self._read = len(self.ids)
        certain = self._certain()
        return self._hand_on(certain if self.stopped else len(self._held))

    def _decode(self, start: int, stop: int) -> str:
        text: str = self._tokenizer.decode(self.ids[start:stop], skip_special_tokens=True)
        return text

    def _certain(self) -> int:
        """How many of the held characters belong to the text whatever follows."""
        found = [place for stop in self._stop_strings if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return min(found)
        longest = max(
            (n for stop in self._stop_strings for n in range(1, len(stop)) if self._held.endswith(stop[:n])), default=0
        )
        return len(self._held) - longest

    def _hand_on(self, count: int) -> str:
        new, self._held = self._held[:count], "" if self.stopped else self._held[count:]
        self.text += new
        return new
