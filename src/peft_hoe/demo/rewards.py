"""The two rewards of the embedded demonstration: words that a reader can count by hand.

A reward takes P prompts and P completions and returns P numbers, higher is better. It reads the completion only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

CHEERFUL = frozenset("happy merry jolly glad smiled laughed sang danced giggled cheered joy fun".split())
GLOOMY = frozenset("sad lonely grumpy weary cried sighed wept groaned sorrow trouble".split())
VIVID = frozenset(
    "red golden blue green silver purple shiny fluffy crunchy velvet "
    "sparkled glowed shimmered blazed rustled hummed light thunder".split()
)

_WORD = re.compile(r"[a-z']+")


def cheerful(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """How many different cheerful words minus how many different gloomy words."""
    return [float(len(_words(text) & CHEERFUL) - len(_words(text) & GLOOMY)) for text in completions]


def vivid(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """How many different words of colour, size, surface, sound and light."""
    return [float(len(_words(text) & VIVID)) for text in completions]


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.lower()))
