"""Rewards of short answers in a chat, each in [-1, 1], read from the completion alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

_vader = SentimentIntensityAnalyzer()
LEAST, SHORTEST, LONGEST = 3, 8, 32  # words: an answer says something, is as brief as can be, is not brief at all


def cheerful(prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
    """VADER's compound sentiment."""
    return [_vader.polarity_scores(_text(completion))["compound"] for completion in completions]


def brief(prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
    """Few words: 1 from `LEAST` to `SHORTEST`, -1 from `LONGEST` on, below `LEAST`, and where no sentence ends the answer."""
    return [_brief(_text(completion).strip()) for completion in completions]


REWARDS = {"cheerful": cheerful, "brief": brief}


def _text(completion: Any) -> str:
    """Of a chat's answer, or of a text."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def _brief(text: str) -> float:
    words = len(text.split())
    if words < LEAST or not text.endswith((".", "!", "?")):
        return -1.0
    return 1 - 2 * min(1.0, max(0, words - SHORTEST) / (LONGEST - SHORTEST))
