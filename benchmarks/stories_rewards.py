"""Rewards of short stories, each in [-1, 1], read from the completion alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

_vader = SentimentIntensityAnalyzer()


def positive(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
    """VADER's compound sentiment."""
    return [_vader.polarity_scores(text)["compound"] for text in completions]


def rich(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
    """Share of distinct words; -1 without words."""
    found = [_words(text) for text in completions]
    return [2 * len(set(words)) / len(words) - 1 if words else -1.0 for words in found]


def dialog(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
    """Quotation marks: -1 for none, 1 from six on."""
    return [min(text.count('"'), 6) / 3 - 1 for text in completions]


def past(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
    """Past tense: share of words that end in "ed" or are a common irregular form; -1 for none, 1 from a quarter on."""
    return [min(1.0, 8 * _share(text, lambda word: word.endswith("ed") or word in _PAST) - 1) for text in completions]


def pronouns(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
    """Share of personal pronouns of the third person; -1 for none, 1 from a fifth on."""
    return [min(1.0, 10 * _share(text, _PRONOUNS.__contains__) - 1) for text in completions]


REWARDS = {"positive": positive, "rich": rich, "dialog": dialog, "past": past, "pronouns": pronouns}

_PAST = frozenset(
    "was were had said went did saw made took ran came felt got found gave told thought knew put ate sat fell".split()
)
_PRONOUNS = frozenset("he him his she her hers they them their theirs it its".split())


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def _share(text: str, counts: Callable[[str], bool]) -> float:
    words = _words(text)
    return sum(map(counts, words)) / len(words) if words else 0.0
