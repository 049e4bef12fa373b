"""Stop strings: a text ends at the first token after which it holds one of them.

Texts are decoded and looked at, whatever the tokenizer. transformers' StopStringCriteria matches token by token instead, counts
a string that begins in the prompt, and fails on vocabularies of whole words.

Shapes: B rows, P prompt positions, T response positions.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import torch
from transformers import StoppingCriteria


class StopAtStrings(StoppingCriteria):
    """Ends the rows of `generate` whose response holds a stop string.

    Args:
        tokenizer: the policy's.
        strings: at least one.
        width: positions before the response.
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str], width: int) -> None:
        self.tokenizer, self.strings, self.width = tokenizer, tuple(strings), width
        # Every token of a string adds a byte at least; the rest is room for what decoding does to a text's beginning.
        self.tail = max(len(string.encode()) for string in self.strings) + 8

    def __call__(self, input_ids: torch.Tensor, scores: Any, **others: Any) -> torch.Tensor:
        """Which rows end here, `(B,)`."""
        start = max(self.width, input_ids.shape[1] - self.tail)
        texts = self.tokenizer.batch_decode(input_ids[:, start:], skip_special_tokens=True)
        return torch.tensor([holds(text, self.strings) for text in texts], device=input_ids.device)


def holds(text: str, strings: Sequence[str]) -> bool:
    """Whether a text has one of the strings in it."""
    return any(string in text for string in strings)


def before_stop_string(text: str, strings: Sequence[str]) -> str:
    """What a text says before the first of the strings that it holds."""
    return text[: min((place for string in strings if (place := text.find(string)) >= 0), default=len(text))]


def stop_string_lengths(ids: torch.Tensor, tokenizer: Any, strings: Sequence[str]) -> torch.Tensor:
    """How many tokens of each response `(B, T)` there are up to the one that completes a stop string, `(B,)`; T + 1 for none.

    A row that has ended goes on with whatever its batch goes on with, so that its own length does not tell.
    """
    lengths = []
    for row in ids.tolist():

        def complete(count: int, row: list[int] = row) -> bool:
            return holds(tokenizer.decode(row[:count], skip_special_tokens=True), strings)

        lengths.append(bisect_left(range(len(row) + 1), True, key=complete))
    return torch.tensor(lengths, device=ids.device)
