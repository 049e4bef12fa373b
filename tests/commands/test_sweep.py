"""`peft-hoe sweep` on a toy: what it writes, how it goes on, and errors of one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from peft import get_peft_model

from peft_hoe import HoEConfig, cli
from peft_hoe.evaluation import Sweep, sweep
from peft_hoe.objectives import RewardNormalizer

# With four prompts some replicates lie below the reference point.
pytestmark = [
    pytest.mark.filterwarnings(r"ignore:\d+ warnings in \d+ replicates:peft_hoe.errors.HoEWarning"),
    pytest.mark.filterwarnings("ignore:the statistic is NaN in up to:peft_hoe.errors.HoEWarning"),
    pytest.mark.filterwarnings("ignore:.* encloses nothing:peft_hoe.errors.HoEWarning"),
    pytest.mark.filterwarnings("ignore:.*replicates have no scale:peft_hoe.errors.HoEWarning"),
]

REWARDS = ("--reward", "low=router_toys:low", "--reward", "high=router_toys:high")


@pytest.fixture(scope="module")
def saved(toys: ModuleType, policy, tmp_path_factory) -> Path:
    """A base with tokenizer, an adapter and prompts on disk."""
    folder = tmp_path_factory.mktemp("sweep")
    policy.save_pretrained(folder / "adapter")
    toys.make_base().save_pretrained(folder / "base")
    toys.make_tokenizer().save_pretrained(folder / "base")
    (folder / "prompts.json").write_text(json.dumps(toys.PROMPTS[:4]))
    return folder


def command(folder: Path, output: Path, *more: str) -> list[str]:
    files = ["--base", str(folder / "base"), "--prompts", str(folder / "prompts.json"), "--output", str(output)]
    return ["sweep", str(folder / "adapter"), *files, "--cpu", "--max-new-tokens", "5", *more]


@pytest.mark.slow
def test_command_writes_what_the_function_finds(saved, toys, policy, tokenizer, tmp_path, capsys):
    assert cli.main([*command(saved, tmp_path, "--report", "--quiet"), *REWARDS]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "front.png", "generations.jsonl", "metrics.json", "report.html", "rewards.npy", "sweep.json",
    ]  # fmt: skip
    prompts = [row["prompt"] for row in toys.PROMPTS[:4]]
    expected = sweep(policy, tokenizer, prompts, toys.REWARDS, decoding={"max_new_tokens": 5}, progress=False)
    found = Sweep.load(tmp_path)
    assert found.completions == expected.completions
    np.testing.assert_array_equal(found.rewards, expected.rewards)
    assert found.preferences.shape == (11, 2)
    numbers = json.loads((tmp_path / "metrics.json").read_text())
    volume = float(expected.metrics().values["hypervolume"].estimate)
    assert numbers["metrics"]["values"]["hypervolume"]["estimate"] == pytest.approx(volume)
    assert capsys.readouterr().out == (
        f"saved in {tmp_path}: sweep.json, rewards.npy, generations.jsonl, metrics.json, front.png, report.html\n"
    )


@pytest.mark.slow
def test_options_baselines_and_going_on(saved, tmp_path, capsys):
    lines = tmp_path / "preferences.txt"
    lines.write_text("1,0\n\nhigh=1\nlow=0.5,high=0.5\n")
    (tmp_path / "held_out.txt").write_text("w3 w4\nw5\nw9 w20\n")
    options = [
        "--preferences",
        str(lines),
        "--payoff-prompts",
        str(tmp_path / "held_out.txt"),
        "--sample",
        "--texts",
        "2",
    ]
    options += [
        "--temperature",
        "1.3",
        "--seed",
        "3",
        "--batch-size",
        "7",
        "--routers",
        "drop",
        "--name",
        "mine",
        *REWARDS,
    ]
    assert cli.main(command(saved, tmp_path / "out", *options)) == 0
    shown = capsys.readouterr().out
    assert "preference (low, high)" in shown
    assert "(payoff prompts)" in shown
    found = Sweep.load(tmp_path / "out")
    np.testing.assert_allclose(found.preferences, [[1, 0], [0, 1], [0.5, 0.5]])
    assert (found.name, found.rewards.shape) == ("mine", (1, 3, 4, 2, 2))
    run = found.runs[0]
    assert run["decoding"] | {"temperature": 1.3, "do_sample": True} == run["decoding"]
    assert run["drawing"] == {"seed": 3, "batch_size": 7, "texts": 2}
    assert run["settings"] == {"routers": "drop"}
    log = tmp_path / "out" / "generations.jsonl"
    before = log.read_bytes()
    baseline = ["--baseline", f"itself={log}"]
    assert cli.main(command(saved, tmp_path / "out", *options, *baseline)) == 0
    assert log.read_bytes() == before
    shown = capsys.readouterr().out
    assert "A = mine, B = itself: neither front dominates the other" in shown
    pair = json.loads((tmp_path / "out" / "metrics.json").read_text())["comparisons"][0]
    assert pair["values"]["hypervolume A - B"]["estimate"] == 0


@pytest.mark.slow
def test_judges_are_asked_about_baselines(saved, toys, policy, tokenizer, tmp_path, monkeypatch):
    from peft_hoe.evaluation import URLJudge

    prompts = [row["prompt"] for row in toys.PROMPTS[:4]]
    scale = RewardNormalizer(np.eye(2), ["low", "high"])
    short = sweep(
        policy, tokenizer, prompts, toys.REWARDS, decoding={"max_new_tokens": 2}, payoff=scale, progress=False
    )
    short.save(tmp_path / "short")
    seen = []

    def ask(judge, prompt, first, second):
        seen.append((judge.url, judge.model, judge.criterion, dict(judge.headers)))
        return "A" if len(first) > len(second) else "tie" if len(first) == len(second) else "B"

    monkeypatch.setattr(URLJudge, "__call__", ask)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    options = ["--baseline", f"short={tmp_path / 'short' / 'generations.jsonl'}", "--judge", "http://here/v1"]
    options += ["--judge-model", "big", "--judge-criterion", "longer", "--report", "--quiet", *REWARDS]
    assert cli.main(command(saved, tmp_path / "out", *options)) == 0
    assert seen[0] == ("http://here/v1", "big", "longer", {"Authorization": "Bearer secret"})
    rates = json.loads((tmp_path / "out" / "metrics.json").read_text())["judged"][0]
    assert rates["names"] == ["HoE", "short"]
    assert rates["wins"] + rates["ties"] + rates["losses"] == 44
    assert rates["win_rate"]["estimate"] > 0.9
    assert "Judge: HoE against short" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (REWARDS[:2], "missing"),
        (("--reward", "low"), "cannot read the reward"),
        ((*REWARDS, "--preferences", "/nowhere.txt"), "cannot read the preferences"),
        ((*REWARDS, "--payoff-prompts", "/nowhere.txt"), "cannot read the prompts"),
        ((*REWARDS, "--base", "/nowhere"), "there is no folder '/nowhere' for the base"),
        ((*REWARDS, "--texts", "2"), "greedy texts are all the same"),
        ((*REWARDS, "--max-new-tokens", "0"), "max_new_tokens is 0"),
        ((*REWARDS, "--baseline", "x"), "write NAME=FILE"),
        ((*REWARDS, "--judge", "http://x"), "--judge-model"),
        ((*REWARDS, "--judge", "http://x", "--judge-model", "m"), "at least one --baseline"),
    ],
)
def test_bad_input_is_one_line(saved, tmp_path, more, message, capsys):
    assert cli.main(command(saved, tmp_path, *more)) == 2
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert printed.startswith("peft-hoe sweep: ")
    assert message in printed


def test_a_missing_package_is_told_before_the_work(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "moocore", None)
    for name in [name for name in sys.modules if name.startswith("peft_hoe.metrics")]:
        monkeypatch.delitem(sys.modules, name)
    import peft_hoe

    monkeypatch.delattr(peft_hoe, "metrics", raising=False)
    assert cli.main([*command(saved, tmp_path), *REWARDS]) == 2
    assert "pip install 'peft-hoe[eval]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_names_of_objectives_may_hold_commas_and_blanks(saved, toys, tmp_path):
    """As whoever trained the adapter called them; in rewards, preferences, files and the page."""
    names = ["short, sweet", "very long"]
    config = HoEConfig(objectives=names, r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_weights=False)
    get_peft_model(toys.make_base(), config).save_pretrained(tmp_path / "adapter")
    (tmp_path / "preferences.txt").write_text("short, sweet=0.3,very long=0.7\n0,1\n1,0\n")
    out = tmp_path / "out"
    arguments = [
        "sweep", tmp_path / "adapter", "--base", saved / "base", "--prompts", saved / "prompts.json", "--output", out,
        "--reward", "short, sweet=router_toys:low", "--reward", " very long = router_toys:high", "--preferences",
        tmp_path / "preferences.txt", "--cpu", "--max-new-tokens", 5, "--report", "--quiet",
    ]  # fmt: skip
    assert cli.main([str(item) for item in arguments]) == 0
    found = Sweep.load(out)
    assert list(found.objectives) == names
    np.testing.assert_allclose(found.preferences, [[0.3, 0.7], [0, 1], [1, 0]])
    assert "short, sweet" in (out / "report.html").read_text()
