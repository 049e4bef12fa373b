"""Real policies of a real (small) TinyStories model, steered."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_hoe
from peft_hoe import Decoding
from peft_hoe.generation.completer import Completer

pytest.importorskip("vaderSentiment")

POLICIES = ("positive", "rich")
PROMPTS, DECODING = 40, Decoding(32)


def positive(prompts: list[str], completions: list[str]) -> list[float]:
    """VADER's compound sentiment, in [-1, 1]."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    vader = SentimentIntensityAnalyzer()
    return [vader.polarity_scores(text)["compound"] for text in completions]


def rich(prompts: list[str], completions: list[str]) -> list[float]:
    """2 * distinct words / words - 1; -1 without words."""
    found = [re.findall(r"[a-z']+", text.lower()) for text in completions]
    return [2 * len(set(words)) / len(words) - 1 if words else -1.0 for words in found]


def dialog(prompts: list[str], completions: list[str]) -> list[float]:
    """min(number of double quotes, 6) / 3 - 1."""
    return [min(text.count('"'), 6) / 3 - 1 for text in completions]


REWARDS = {"positive": positive, "rich": rich, "dialog": dialog}


def steerable(shared_dir: Path, adapter: Path, names: tuple[str, ...]) -> tuple[Any, Any, list[str]]:
    """A model with an adapter of the policies of these names, its tokenizer, and prompts."""
    base = shared_dir / "models" / "stories260k"
    policies = {name: shared_dir / "models" / "policies" / f"stories260k-{name}" for name in names}
    peft_hoe.build_adapter(base, policies, adapter, progress=False)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    prompts = json.loads((shared_dir / "data" / "stories" / "prompts.json").read_text())["test"][:PROMPTS]
    return model, AutoTokenizer.from_pretrained(base, padding_side="left"), prompts


@pytest.fixture(scope="module")
def stories(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Mean rewards (positive, rich) by name of what generated: each preference, base and policy."""
    model, tokenizer, prompts = steerable(shared_dir, tmp_path_factory.mktemp("stories") / "adapter", POLICIES)
    found: dict[str, Any] = {}
    for name in ("base", *POLICIES):
        source = "stories260k" if name == "base" else f"policies/stories260k-{name}"
        plain = AutoModelForCausalLM.from_pretrained(shared_dir / "models" / source).eval()
        texts = Completer(plain, tokenizer, DECODING).complete(plain, prompts)
        found[name] = [float(np.mean(REWARDS[objective](prompts, texts))) for objective in POLICIES]
    grid = [[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]]
    rewards = {name: REWARDS[name] for name in POLICIES}
    points = peft_hoe.sweep(model, tokenizer, prompts, rewards, grid, decoding=DECODING, progress=False).points
    return found | dict(zip(("rich corner", "middle", "positive corner"), points.tolist(), strict=True))


def test_preferences_steer_both_rewards(stories: dict[str, Any]) -> None:
    assert stories["positive corner"][0] > stories["rich corner"][0] + 0.1
    assert stories["rich corner"][1] > stories["positive corner"][1] + 0.05


def test_corners_come_close_to_the_policies(stories: dict[str, Any]) -> None:
    """Rank 16 of 64 and no embeddings: an expert regains at least half of what its policy gains over the base."""
    for i, name in enumerate(POLICIES):
        base, policy, corner = (stories[key][i] for key in ("base", name, f"{name} corner"))
        assert corner >= base + 0.5 * (policy - base), (name, base, policy, corner)


def test_the_middle_lies_between_or_above(stories: dict[str, Any]) -> None:
    for i in range(2):
        worse = min(stories["positive corner"][i], stories["rich corner"][i])
        assert stories["middle"][i] >= worse - 0.05


@pytest.mark.slow
def test_three_policies_and_the_papers_grid(shared_dir: Path, tmp_path: Path) -> None:
    """The whole job: build, load, 13 preferences, table and picture; corners are ordered."""
    model, tokenizer, prompts = steerable(shared_dir, tmp_path / "adapter", ("positive", "rich", "dialog"))
    found = peft_hoe.sweep(model, tokenizer, prompts[:20], REWARDS, decoding=DECODING, progress=False)
    assert found.points.shape == (13, 3)
    where = found.preferences.tolist()
    corners = np.stack([found.points[where.index(corner)] for corner in np.eye(3).tolist()])
    assert corners[:, 0].argmax() == 0
    assert corners[:, 2].argmax() == 2
    assert corners[1, 1] > corners[0, 1]  # dialogue is rich in words as well
    assert len(found.table().splitlines()) == 14
    found.plot(tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
