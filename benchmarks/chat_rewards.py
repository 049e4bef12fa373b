"""Rewards of short answers in a chat, each in [-1, 1], read from the completion alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pyphen
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

_vader = SentimentIntensityAnalyzer()
_hyphens = pyphen.Pyphen(lang="en_US")
LEAST, SHORTEST, LONGEST = 3, 8, 32  # words: an answer says something, is as brief as can be, is not brief at all


def cheerful(prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
    """VADER's compound sentiment."""
    return [_vader.polarity_scores(_text(completion))["compound"] for completion in completions]


def brief(prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
    """Few words: 1 from `LEAST` to `SHORTEST`, -1 from `LONGEST` on, below `LEAST`, and where no sentence ends the answer."""
    return [_brief(_text(completion).strip()) for completion in completions]


def plain(prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
    """Flesch's reading ease, 0 to 100 and what lies beyond cut off, as -1 to 1; -1 below `LEAST` words.

    206.835 - 1.015 words to a sentence - 84.6 syllables to a word. Syllables are the pieces that a word can be hyphenated
    into. An answer that was cut off ends in a sentence like any other, so that this rewards easy words, not short answers.
    """
    return [_plain(_text(completion)) for completion in completions]


REWARDS = {"cheerful": cheerful, "brief": brief, "plain": plain}


def _text(completion: Any) -> str:
    """Of a chat's answer, or of a text."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def _brief(text: str) -> float:
    words = len(text.split())
    if words < LEAST or not text.endswith((".", "!", "?")):
        return -1.0
    return 1 - 2 * min(1.0, max(0, words - SHORTEST) / (LONGEST - SHORTEST))


def _plain(text: str) -> float:
    words = re.findall(r"[^\W\d_]+(?:['’][^\W\d_]+)*", text)
    if len(words) < LEAST:
        return -1.0
    sentences = sum(re.search(r"[^\W\d_]", part) is not None for part in re.split(r"[.!?]+(?=\s|$)", text))
    syllables = sum(len(_hyphens.positions(word)) + 1 for word in words)
    ease = 206.835 - 1.015 * len(words) / sentences - 84.6 * syllables / len(words)
    return min(100.0, max(0.0, ease)) / 50 - 1
