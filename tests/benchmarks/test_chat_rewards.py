"""Rewards of answers in a chat, each by what a reader can count."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def rewards(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("pyphen")
    pytest.importorskip("vaderSentiment")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("chat_rewards")


@pytest.mark.parametrize(
    ("text", "words", "sentences", "syllables"),
    [
        ("Absolutely, I'd be happy to help you with that.", 9, 1, 13),
        ("Absolutely! I'd be happy to help you with that", 9, 2, 13),  # cut off: its end is a sentence all the same
        ("Version 2.0: a versatile [appliance]", 4, 1, 9),
    ],
)
def test_plain_is_the_reading_ease(rewards, text, words, sentences, syllables):
    ease = 206.835 - 1.015 * words / sentences - 84.6 * syllables / words
    assert rewards.plain(None, [text]) == pytest.approx([min(100, max(0, ease)) / 50 - 1])


def test_plain_wants_an_answer_and_knows_no_more_than_easy(rewards):
    answers = ["", "Hi.", "3 + 3 = 6", "The cat sat on the mat.", "Internationalization necessitates standardization."]
    assert rewards.plain(None, answers) == [-1, -1, -1, 1, -1]


@pytest.mark.parametrize(("words", "reward"), [(2, -1), (3, 1), (8, 1), (20, 0), (32, -1), (40, -1)])
def test_brief_counts_words(rewards, words, reward):
    assert rewards.brief(None, [" ".join(["word"] * words) + "."]) == [reward]
    assert rewards.brief(None, [[{"role": "assistant", "content": "no end " * words}]]) == [-1]
