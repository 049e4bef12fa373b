"""A whole experiment on real policies of a small TinyStories model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_hoe import cli
from peft_hoe.evaluation import Sweep
from peft_hoe.reproduce import Plan, describe, reproduce

pytest.importorskip("trl.experimental.ppo")
pytestmark = [
    pytest.mark.shared,
    # A dozen prompts: some replicates have no order, or lie below the reference point.
    pytest.mark.filterwarnings(r"ignore:\d+ warnings in \d+ replicates:peft_hoe.errors.HoEWarning"),
    pytest.mark.filterwarnings("ignore:the hypervolume is 0:peft_hoe.errors.HoEWarning"),
    pytest.mark.filterwarnings("ignore:the statistic is NaN in up to:peft_hoe.errors.HoEWarning"),
    pytest.mark.filterwarnings("ignore:'.*' steered to '.*' alone lies at:peft_hoe.errors.HoEWarning"),
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


@pytest.mark.slow
def test_stories_from_policies_to_the_page(shared_dir: Path, tmp_path: Path) -> None:
    models = shared_dir / "models"
    rich = Rich()
    plan = Plan.of(
        "own", base=models / "stories260k", output_dir=tmp_path / "out",
        policies={name: models / "policies" / f"stories260k-{name}" for name in ("rich", "dialog")},
        rewards={"rich": rich, "dialog": dialog}, prompts=str(shared_dir / "data" / "stories" / "prompts.json"),
        updates=2, batch_size=16, preferences=PREFERENCES, baselines=["rs", "mod"],
        decoding={"max_new_tokens": 24}, limit=16, cpu=True,
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
    routers = json.loads((tmp_path / "out" / "trained" / "adapter_config.json").read_text())["routers"]
    trained = {tuple(router["preference"]): router["trained"] for router in routers}
    same = np.array_equal(hoe.rewards[0, 1], dropped.rewards[0, 1])
    assert same is not trained.get(tuple(PREFERENCES[1]), False)  # a router votes where it helped
    assert found.summary.splitlines()[-4].startswith("HoE ")
    pairs = json.loads((tmp_path / "out" / "metrics.json").read_text())["comparisons"]
    assert [pair["names"][1] for pair in pairs] == ["HoE, routers dropped", "RS", "MOD"]
    assert "<h2>Methods</h2>" in found.report.read_text()


@pytest.mark.slow
def test_the_same_by_one_command(
    shared_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    splits = json.loads((shared_dir / "data/stories/prompts.json").read_text())
    prompts = {"train": splits["train"][:16], "validation": splits["validation"][:16], "test": splits["test"][:12]}
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    (tmp_path / "preferences.txt").write_text("1,0\n0.75,0.25\n0.5,0.5\n0,1\n")
    arguments = ["reproduce", "own", "--base", str(shared_dir / "models/stories260k"), "--cpu"]
    for name in ("positive", "rich"):
        policy = shared_dir / f"models/policies/stories260k-{name}"
        arguments += ["--policy", f"{name}={policy}", "--reward", f"{name}=stories_rewards:{name}"]
    arguments += ["--prompts", str(tmp_path / "prompts.json"), "--preferences", str(tmp_path / "preferences.txt")]
    arguments += ["--updates", "1", "--batch-size", "16", "--max-new-tokens", "24", "--baselines", "rs,mod"]
    out = tmp_path / "out"
    assert cli.main([*arguments, "--output", str(out), "--quiet"]) == 0

    found = {path.name: Sweep.load(path) for path in (out / "sweeps").iterdir()}
    assert set(found) == {"hoe", "hoe_dropped", "rs", "mod"}
    for name in ("hoe", "hoe_dropped"):  # experts and preferences are the same at the corners
        np.testing.assert_array_equal(found[name].rewards[:, [0, 3]], found["rs"].rewards[:, [0, 3]])
    positive, rich = found["hoe"].points.T
    assert positive[0] > positive[-1]
    assert rich[-1] > rich[0]
    numbers = json.loads((out / "metrics.json").read_text())
    assert [pair["names"][1] for pair in numbers["comparisons"]] == ["HoE, routers dropped", "RS", "MOD"]
    capsys.readouterr()
    assert cli.main([*arguments, "--output", str(out)]) == 0
    assert capsys.readouterr().out.count(": done\n") == 7
