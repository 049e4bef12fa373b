"""Real policies of a real (small) TinyStories model, steered with the functions of examples/steer_stories.py."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_hoe

pytest.importorskip("vaderSentiment")

POLICIES = ("positive", "rich")
PROMPTS, NEW_TOKENS = 40, 32


@pytest.fixture(scope="module")
def example() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "examples" / "steer_stories.py"
    spec = importlib.util.spec_from_file_location("steer_stories", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def stories(shared_dir: Path, example: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Mean rewards (positive, rich) by name of what generated: each preference, base and policy."""
    base = shared_dir / "models" / "stories260k"
    policies = {name: str(shared_dir / "models" / "policies" / f"stories260k-{name}") for name in POLICIES}
    prompts = json.loads((shared_dir / "data" / "stories" / "prompts.json").read_text())["test"][:PROMPTS]
    adapter = tmp_path_factory.mktemp("stories") / "adapter"
    peft_hoe.build_adapter(str(base), policies, adapter, progress=False)
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")

    def means(texts: list[str]) -> list[float]:
        return [float(np.mean([example.REWARDS[name](text) for text in texts])) for name in POLICIES]

    found: dict[str, Any] = {}
    for name, source in {"base": base, **policies}.items():
        model = AutoModelForCausalLM.from_pretrained(source)
        found[name] = means(example.complete(model, tokenizer, prompts, NEW_TOKENS))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    grid = [[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]]
    rows = [preference for preference in grid for _ in prompts]  # one batch of three preferences
    texts = example.complete(model, tokenizer, prompts * len(grid), NEW_TOKENS, preference=rows)
    for i, name in enumerate(("rich corner", "middle", "positive corner")):
        found[name] = means(texts[i * PROMPTS : (i + 1) * PROMPTS])
    return found


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


def test_the_example_runs_on_three_policies(
    shared_dir: Path, example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The whole job: build, load, 13 preferences, table and picture; corners are ordered."""
    names = ("positive", "rich", "dialog")
    policies = [str(shared_dir / "models" / "policies" / f"stories260k-{name}") for name in names]
    arguments = ["--base", shared_dir / "models" / "stories260k", "--prompts", shared_dir / "data/stories/prompts.json"]
    arguments += ["--policies", *policies, "--limit", 20, "--max-new-tokens", 32]
    arguments += ["--output", tmp_path / "adapter", "--picture", tmp_path / "front.png"]
    monkeypatch.setattr("sys.argv", ["steer_stories.py", *map(str, arguments)])
    monkeypatch.setenv("MPLBACKEND", "agg")
    example.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if re.match(r"\[[01][\d., ]*\] +-?\d\.\d{3} ", line)]
    table = {line[:24].strip(): [float(cell) for cell in line[24:].split()] for line in lines}
    assert len(table) == 13
    corners = np.asarray([table["[1.0, 0.0, 0.0]"], table["[0.0, 1.0, 0.0]"], table["[0.0, 0.0, 1.0]"]])
    assert corners[:, 0].argmax() == 0
    assert corners[:, 2].argmax() == 2
    assert corners[1, 1] > corners[0, 1]  # dialogue is rich in words as well
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
