"""A whole experiment on real policies of a small TinyStories model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_hoe.evaluation.reproduce import Plan, describe, reproduce

pytest.importorskip("trl.experimental.ppo")
pytestmark = [
    pytest.mark.shared,
    # A dozen prompts: some replicates have no order, or lie below the reference point.
    pytest.mark.filterwarnings(r"ignore:\d+ warnings in \d+ replicates:peft_hoe.errors.HoEWarning"),
    pytest.mark.filterwarnings("ignore:the statistic is NaN in up to:peft_hoe.errors.HoEWarning"),
]

PREFERENCES = [[0, 1], [0.25, 0.75], [0.5, 0.5], [0.75, 0.25], [1, 0]]


class Rich:
    """2 * distinct words / words - 1; fails once when told to."""

    fails_at = 0

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, prompts: Any, completions: list[str], **columns: Any) -> list[float]:
        self.calls += 1
        if self.calls == Rich.fails_at:
            raise OSError("the server is gone")
        words = [re.findall(r"[a-z']+", text.lower()) for text in completions]
        return [2 * len(set(some)) / len(some) - 1 if some else -1.0 for some in words]


def dialog(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
    return [min(text.count('"'), 6) / 3 - 1 for text in completions]


def test_stories_from_policies_to_the_page(shared_dir: Path, tmp_path: Path) -> None:
    models = shared_dir / "models"
    rich = Rich()
    plan = Plan.of(
        "own", base=models / "stories260k", output_dir=tmp_path / "out",
        policies={name: models / "policies" / f"stories260k-{name}" for name in ("rich", "dialog")},
        rewards={"rich": rich, "dialog": dialog}, prompts=str(shared_dir / "data" / "stories" / "prompts.json"),
        updates=2, batch_size=16, preferences=PREFERENCES, baselines=["rs", "mod"], max_new_tokens=24, limit=16, cpu=True,
    )  # fmt: skip
    Rich.fails_at = 4  # after the payoff table's two calls: the second update
    with pytest.raises(ValueError, match="the server is gone"):
        reproduce(plan, progress=False)
    assert [line.split()[0] for line in describe(plan).splitlines() if " -> " in line] == ["done", *["to"] * 6]
    Rich.fails_at = 0
    told: list[str] = []
    found = reproduce(plan, progress=False, say=told.append)
    assert told[0] == "build: done"
    assert list(found.sweeps) == ["hoe", "hoe_dropped", "rs", "mod"]
    hoe, dropped, soup, fused = found.sweeps.values()
    assert hoe.rewards.shape == (1, 5, 16, 1, 2)
    assert hoe.points[0, 1] > hoe.points[-1, 1] + 0.1  # dialogue where it is wanted
    for other in (dropped, soup, fused):  # the corners are the same experts, but for rounding in other batches
        np.testing.assert_allclose(other.points[[0, -1]], hoe.points[[0, -1]], atol=0.05)
    assert not np.array_equal(hoe.rewards[0, 1], dropped.rewards[0, 1])  # the router's own preference
    assert found.summary.splitlines()[-4].startswith("HoE ")
    pairs = json.loads((tmp_path / "out" / "metrics.json").read_text())["comparisons"]
    assert [pair["names"][1] for pair in pairs] == ["HoE, routers dropped", "RS", "MOD"]
    assert "<h2>Methods</h2>" in found.report.read_text()
