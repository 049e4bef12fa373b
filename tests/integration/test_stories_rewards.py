from __future__ import annotations

import runpy
from pathlib import Path

import pytest

pytest.importorskip("vaderSentiment")


def test_rewards_by_hand():
    rewards = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks/stories_rewards.py"))["REWARDS"]
    texts = ['"Hi!" he said. "The cat is big."', "She played. She was here.", "the the", ""]
    found = {name: reward(texts, texts) for name, reward in rewards.items()}
    assert list(found) == ["positive", "rich", "dialog", "past", "pronouns"]
    assert found["rich"] == [1.0, pytest.approx(2 * 4 / 5 - 1), 0.0, -1.0]  # she is there twice
    assert found["dialog"] == [pytest.approx(4 / 3 - 1), -1.0, -1.0, -1.0]
    assert found["past"] == [pytest.approx(8 / 7 - 1), 1.0, -1.0, -1.0]  # said; played and was, two of five
    assert found["pronouns"] == [pytest.approx(10 / 7 - 1), 1.0, -1.0, -1.0]
    happy, sad, nothing = rewards["positive"]([], ["I love this happy day", "I hate this sad day", ""])
    assert happy > 0.5
    assert sad < -0.5
    assert nothing == 0
