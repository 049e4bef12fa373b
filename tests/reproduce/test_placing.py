"""`reproduce --auto`: experts and routers are placed, the story is told, and an interrupted run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import PeftModel

from peft_hoe import cli, demo
from peft_hoe.errors import HoEError
from peft_hoe.evaluation import Sweep
from peft_hoe.placing import Budget, place
from peft_hoe.reproduce import Plan, describe, reproduce
from peft_hoe.reproduce.placing import placed_adapter

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:\d+ warnings in \d+ replicates:peft_hoe.errors.HoEWarning"),
    pytest.mark.filterwarnings("ignore:the statistic is NaN in up to:peft_hoe.errors.HoEWarning"),
    pytest.mark.filterwarnings("ignore:.* encloses nothing:peft_hoe.errors.HoEWarning"),
]


def settings(output: Path, **changes: Any) -> dict[str, Any]:
    """Of `Plan.of`, small."""
    texts = demo.load_prompts()
    found: dict[str, Any] = {
        "task": "own", "base": demo.BASE, "policies": demo.POLICIES, "output_dir": output, "auto": True, "updates": 1,
        "rewards": {name: f"peft_hoe.demo.rewards:{name}" for name in demo.REWARDS}, "batch_size": 4, "rank": 4,
        "prompts": {"train": texts[:12], "validation": texts[12:18], "test": texts[18:22]}, "cpu": True,
        "preferences": [[0, 1], [0.5, 0.5], [1, 0]], "decoding": {"max_new_tokens": 6}, "trainer": "distill",
    }  # fmt: skip
    return found | changes


def test_places_are_not_given(tmp_path):
    """But those that are given stay; settings say what is spent, and stages what is done."""
    plan = Plan.of(**settings(tmp_path))
    assert (plan.experts, plan.routers, plan.trains, plan.learns) == ([], [], False, True)
    given = Plan.of(**settings(tmp_path, experts=[[0.5, 0.5]], routers=[[0.25, 0.75]], auto=Budget(seconds=60)))
    assert (given.experts, given.routers, given.trains) == ([[0.5, 0.5]], [[0.25, 0.75]], True)
    assert (plan.settings()["auto"], given.settings()["auto"]) == (True, {"parameters": None, "seconds": 60})
    assert "to do  place: experts and routers where the front" in describe(plan)
    without = Plan.of(**settings(tmp_path, auto=False))
    assert (without.auto, without.experts) == (None, [[0.5, 0.5]])
    assert "place:" not in describe(without)


def test_it_needs_validation_prompts(tmp_path):
    plan = Plan.of(**settings(tmp_path, prompts={"test": ["Once"]}, updates=0))
    with pytest.raises(HoEError, match="no validation prompts to place"):
        reproduce(plan, progress=False)
    assert not (tmp_path / "adapter").exists()


def command(output: Path, *more: str) -> list[str]:
    given = ["reproduce", "own", "--base", demo.BASE, "--prompts", str(demo.embedded.ASSETS / "prompts.json")]
    for name, policy in demo.POLICIES.items():
        given += ["--policy", f"{name}={policy}", "--reward", f"{name}=peft_hoe.demo.rewards:{name}"]
    return [*given, "--output", str(output), "--cpu", *more]


def test_its_budget_on_the_command_line(tmp_path, capsys):
    for more, auto in (
        ((), True),
        (("--budget-parameters", "5000"), {"parameters": 5000, "seconds": None}),
        (("--budget-minutes", "2"), {"parameters": None, "seconds": 120.0}),
    ):
        assert cli.main(command(tmp_path, "--auto", *more, "--dry-run")) == 0
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("auto "))
        assert json.loads(line.removeprefix("auto")) == auto
    for more, message in (
        (("--budget-minutes", "2"), "--budget-minutes are of --auto"),
        (("--auto", "--budget-minutes", "0"), "the budget of seconds is 0"),
    ):
        assert cli.main(command(tmp_path, *more, "--dry-run")) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_an_interrupted_placement_goes_on(tmp_path, monkeypatch):
    """After the first trial, an expert that was kept; what follows is what would have followed."""
    monkeypatch.setattr("peft_hoe.placing.attempts.gain", lambda after, before: (1.0, 0.0, 0.0, 1.0))
    grid = {"preferences": [[0, 1], [0.25, 0.75], [0.5, 0.5], [1, 0]], "updates": 0, "auto": Budget(parameters=10**6)}
    whole = reproduce(Plan.of(**settings(tmp_path / "whole", **grid)), progress=False)
    state = json.loads((tmp_path / "whole" / "placed" / "place.json").read_text())
    assert [trial["kept"] for trial in state["trials"]] == [True, True]

    with monkeypatch.context() as patch:
        patch.setattr("peft_hoe.reproduce.placing.place", interrupted)
        plan = Plan.of(**settings(tmp_path / "out", **grid))
        with pytest.raises(KeyboardInterrupt):
            reproduce(plan, progress=False)
    assert len(json.loads((tmp_path / "out" / "placed" / "place.json").read_text())["trials"]) == 1
    resumed = reproduce(plan, progress=False)
    assert resumed.summary.splitlines()[0].startswith("weakest at [")
    assert np.array_equal(resumed.sweeps["hoe"].rewards, whole.sweeps["hoe"].rewards)
    first, second = (placed_adapter(tmp_path / name) for name in ("whole", "out"))
    assert (first / "adapter_model.safetensors").read_bytes() == (second / "adapter_model.safetensors").read_bytes()
    assert [path.name for path in (tmp_path / "out" / "placed").glob("after-*")] == ["after-2"]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    reproduce(plan, progress=False)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def interrupted(*args: Any, after: Any, **options: Any) -> Any:
    """`place`, with Ctrl-C once the first trial is on disk."""

    def once(trial: Any, sweep: Sweep) -> None:
        after(trial, sweep)
        raise KeyboardInterrupt

    return place(*args, after=once, **options)


@pytest.mark.slow
def test_a_router_is_placed_and_the_page_written(tmp_path, monkeypatch):
    """Sweeps with the router and without it, on the test prompts; the story stands in the summary."""
    monkeypatch.setattr(
        "peft_hoe.placing.attempts.gain",
        lambda after, before: (1.0, 0.0, 0.0, float(after.runs[0]["calibrates"]["trained"] != [])),
    )
    found = reproduce(Plan.of(**settings(tmp_path)), progress=False)
    assert list(found.sweeps) == ["hoe", "hoe_dropped"]
    story = (tmp_path / "placed" / "story.txt").read_text()
    assert story.rstrip() in found.summary
    assert "taken away again" in story
    config = PeftModel.from_pretrained(demo.load_base(), placed_adapter(tmp_path)).peft_config["default"]
    assert [(router.preference, router.trained) for router in config.routers] == [([0.5, 0.5], True)]
    assert config.expert_names == ["cheerful", "vivid"]
    assert found.report.is_file()
