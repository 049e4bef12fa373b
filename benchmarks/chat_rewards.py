"""Rewards of short answers in a chat, each in [-1, 1], read from the completion alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

_vader = SentimentIntensityAnalyzer()
SHORTEST, LONGEST = 8, 32  # words of an answer that is brief enough, and of one that is not brief at all


def cheerful(prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
    """VADER's compound sentiment."""
    return [_vader.polarity_scores(_text(completion))["compound"] for completion in completions]


def brief(prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
    """Few words: 1 up to `SHORTEST`, -1 from `LONGEST` on and for an answer without words."""
    counts = [len(_text(completion).split()) for completion in completions]
    shares = [(max(count, SHORTEST) - SHORTEST) / (LONGEST - SHORTEST) for count in counts]
    return [1 - 2 * min(1.0, share) if count else -1.0 for count, share in zip(counts, shares, strict=True)]


REWARDS = {"cheerful": cheerful, "brief": brief}


def _text(completion: Any) -> str:
    """Of a chat's answer, or of a text."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])
