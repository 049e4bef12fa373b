"""`peft-hoe reproduce` on a toy: what it writes, that nothing is done twice, and how it goes on."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import signal
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel

from peft_hoe import cli
from peft_hoe.errors import HoEError, RewardError
from peft_hoe.evaluation import Sweep, sweep
from peft_hoe.inputs import load_adapter
from peft_hoe.reproduce import Plan, describe, reproduce
from peft_hoe.reproduce.training import arguments, check_trainer

# With four prompts some replicates lie below the reference point.
pytestmark = [
    pytest.mark.filterwarnings(r"ignore:\d+ warnings in \d+ replicates:peft_hoe.errors.HoEWarning"),
    pytest.mark.filterwarnings("ignore:the statistic is NaN in up to:peft_hoe.errors.HoEWarning"),
    pytest.mark.filterwarnings("ignore:.* encloses nothing:peft_hoe.errors.HoEWarning"),
    pytest.mark.filterwarnings("ignore:pruning dropped:peft_hoe.errors.HoEWarning"),
    pytest.mark.filterwarnings("ignore:.*replicates have no scale:peft_hoe.errors.HoEWarning"),
]


@pytest.fixture(autouse=True)
def _routers_help(monkeypatch: pytest.MonkeyPatch) -> None:
    """A router that has made one update is kept, whatever the verdict."""
    monkeypatch.setattr("peft_hoe.training.run.verdict.SURE", -1.0)


@pytest.fixture(scope="module")
def saved(toys: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two policies and prompts on disk."""
    folder = tmp_path_factory.mktemp("reproduce")
    base = toys.make_base()
    base.save_pretrained(folder / "base")
    toys.make_tokenizer().save_pretrained(folder / "base")
    for seed, name in enumerate(("low", "high")):
        generator = torch.Generator().manual_seed(seed)
        policy = toys.make_base()
        with torch.no_grad():
            for weight in policy.parameters():
                weight += 0.2 * torch.randn(weight.shape, generator=generator)
        policy.save_pretrained(folder / name)
    texts = [row["prompt"] for row in toys.PROMPTS]
    splits = {"train": texts[:12], "validation": texts[12:18], "test": texts[18:22]}
    (folder / "prompts.json").write_text(json.dumps(splits))
    (folder / "preferences.txt").write_text("0,1\n0.5,0.5\n1,0\n")
    return folder


def settings(folder: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """Of `Plan.of`, small."""
    found: dict[str, Any] = {
        "task": "own", "base": folder / "base", "policies": {name: folder / name for name in ("low", "high")},
        "rewards": {"low": "router_toys:flaky", "high": "router_toys:high"}, "prompts": str(folder / "prompts.json"),
        "output_dir": output, "updates": 1, "batch_size": 4, "learning_rate": 0.5, "preferences": [[0, 1], [1, 0]],
        "decoding": {"max_new_tokens": 5}, "cpu": True, "save_steps": 1,
    }  # fmt: skip
    return found | changes


def command(folder: Path, output: Path, *more: str) -> list[str]:
    options = {
        "--base": folder / "base", "--prompts": folder / "prompts.json", "--output": output, "--updates": 1, "--batch-size": 4,
        "--preferences": folder / "preferences.txt", "--max-new-tokens": 5,
    }  # fmt: skip
    given = [str(item) for pair in options.items() for item in pair]
    for name in ("low", "high"):
        given += ["--policy", f"{name}={folder / name}", "--reward", f"{name}=router_toys:{name}"]
    return ["reproduce", "own", *given, "--cpu", *more]


def tensors(folder: Path, toys: ModuleType) -> dict[str, torch.Tensor]:
    return dict(PeftModel.from_pretrained(toys.make_base(), folder).state_dict())


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def test_the_decoding_on_the_command_line(saved, tmp_path, capsys):
    """Temperature, top-k and top-p sample; training and sweeps end at the same places."""
    more = ("--stop", "w9", "--stop", r"\n", "--temperature", "0.7", "--top-p", "0.9")
    assert cli.main([*command(saved, tmp_path, *more), "--dry-run"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("decoding"))
    assert json.loads(line.removeprefix("decoding")) == {
        "max_new_tokens": 5, "do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 0.9, "stop_strings": ["w9", "\n"],
        "stop_tokens": None,
    }  # fmt: skip
    wanted = {"stop_strings": ["w9"], "temperature": 0.7, "top_k": 3, "top_p": 0.9}
    plan = Plan.of(**settings(saved, tmp_path, decoding={"max_new_tokens": 5, "do_sample": True, **wanted}))
    for trainer in ("ppo", "grpo", "distill"):
        if trainer != "grpo" or importlib.util.find_spec("trl") is not None:
            args = arguments(dataclasses.replace(plan, trainer=trainer), False, tmp_path)
            assert {name: getattr(args, name) for name in wanted} == wanted
    for changes, told in (
        ({"trainer": "grpo", "batch_size": 11}, "the batch of 11 cannot be divided into groups"),
        ({"decoding": {"repetition_penalty": 1.2}}, "routers train with the stop tokens of tokenizer and model"),
    ):
        with pytest.raises(HoEError, match=told):
            check_trainer(Plan.of(**settings(saved, tmp_path, **changes)))


@pytest.mark.slow
def test_one_command_does_everything_and_nothing_twice(saved, toys, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = command(saved, out, "--baselines", "rs")
    assert cli.main([*arguments, "--dry-run"]) == 0
    assert not out.exists()
    lines = capsys.readouterr().out.splitlines()
    names = ["build", "train", "sweep hoe", "sweep hoe_dropped", "sweep rs", "report"]
    assert [line.split(":")[0] for line in lines if line.startswith("to do")] == [f"to do  {name}" for name in names]
    assert cli.main([*arguments, "--quiet"]) == 0
    assert {path.name for path in out.iterdir()} == {
        "adapter", "trained", "baselines", "sweeps", "report.html", "front.png", "metrics.json", "summary.txt",
        "reproduce.json",
    }  # fmt: skip
    routers = PeftModel.from_pretrained(toys.make_base(), out / "trained").peft_config["default"].routers
    assert [(router.preference, router.trained) for router in routers] == [([0.75, 0.25], True), ([0.25, 0.75], True)]

    found = {name: Sweep.load(out / "sweeps" / name) for name in ("hoe", "hoe_dropped", "rs")}
    model, tokenizer = load_adapter(str(out / "trained"), str(saved / "base"))
    splits = json.loads((saved / "prompts.json").read_text())
    expected = sweep(
        model.eval(), tokenizer, splits["test"], toys.REWARDS, [[0, 1], [0.5, 0.5], [1, 0]], decoding={"max_new_tokens": 5},
        payoff=splits["validation"], progress=False,
    )  # fmt: skip
    assert found["hoe"].completions == expected.completions
    np.testing.assert_array_equal(found["hoe"].normalizer.payoff, expected.normalizer.payoff)
    for other in (found["hoe_dropped"], found["rs"]):  # all on one scale
        np.testing.assert_array_equal(other.normalizer.payoff, expected.normalizer.payoff)
    numbers = json.loads((out / "metrics.json").read_text())
    assert [pair["names"] for pair in numbers["comparisons"]] == [["HoE", "HoE, routers dropped"], ["HoE", "RS"]]
    assert numbers["settings"]["updates"] == 1
    page = (out / "report.html").read_text()
    assert all(f"<h2>{title}</h2>" in page for title in ("Methods", "Against HoE, routers dropped", "Against RS"))

    before = files(out)
    capsys.readouterr()
    assert cli.main(arguments) == 0
    assert files(out) == before
    assert capsys.readouterr().out.startswith("".join(f"{name}: done\n" for name in names))


@pytest.mark.slow
def test_a_baseline_is_added_and_other_settings_are_refused(saved, toys, tmp_path, capsys):
    plan = Plan.of(**settings(saved, tmp_path, updates=0))
    assert plan.trains is False
    first = reproduce(plan, progress=False)
    assert list(first.sweeps) == ["hoe"]
    before = files(tmp_path / "sweeps")
    told: list[str] = []
    more = Plan.of(**settings(saved, tmp_path, updates=0, baselines=["mod"], sweep_batch_size=3))
    second = reproduce(more, progress=False, say=told.append)
    assert [line.split(":")[0] for line in told if not line.endswith("done")] == ["sweep mod", "report"]
    assert list(second.sweeps) == ["hoe", "mod"]
    assert before.items() <= files(tmp_path / "sweeps").items()
    assert "MOD" in second.summary
    before = files(tmp_path)
    others = Plan.of(**settings(saved, tmp_path, updates=0, seed=3, decoding={"max_new_tokens": 6}))
    for call in (reproduce, describe):
        with pytest.raises(
            HoEError,
            match=r"decoding was .*_tokens': 5.* is .*_tokens': 6.*; seed was 0, is 3.*--restart",
        ):
            call(others)
    assert files(tmp_path) == before
    (tmp_path / "mine.txt").write_text("kept")
    assert list(reproduce(others, restart=True, progress=False).sweeps) == ["hoe"]
    assert (tmp_path / "mine.txt").read_text() == "kept"
    assert not (tmp_path / "sweeps" / "mod").exists()


@pytest.fixture(scope="module")
def uninterrupted(saved, toys, tmp_path_factory) -> tuple[Path, dict[str, int]]:
    """An experiment with two routers; calls of the flaky reward before each stage."""
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    calls: dict[str, int] = {}
    toys.CALLS.update({"made": 0, "fails at": 0})

    def say(line: str) -> None:
        calls[line.split(":")[0]] = toys.CALLS["made"]

    reproduce(Plan.of(**two_routers(saved, out)), progress=False, say=say)
    return out, calls


def two_routers(folder: Path, output: Path) -> dict[str, Any]:
    return settings(folder, output, updates=2, routers=[[0.25, 0.75], [0.75, 0.25]])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "back", "finished"),
    [
        ("sweep hoe", 0, ["build"]),  # the last update of the second router
        ("sweep hoe_dropped", 1, ["build", "train"]),  # within the sweep, after its payoff table
    ],
)
def test_a_failure_keeps_what_is_done(saved, toys, tmp_path, uninterrupted, stage, back, finished):
    """Whatever is interrupted ends as if nothing had been."""
    whole, calls = uninterrupted
    plan = Plan.of(**two_routers(saved, tmp_path / "out"))
    toys.CALLS.update({"made": 0, "fails at": calls[stage] - back})
    with pytest.raises(RewardError, match="out of order"):
        reproduce(plan, progress=False)
    assert list(json.loads((tmp_path / "out" / "reproduce.json").read_text())["finished"]) == finished
    assert [line[:6].strip() for line in describe(plan).splitlines()[-5:]].count("done") == len(finished)
    toys.CALLS.update({"made": 0, "fails at": 0})
    found = reproduce(plan, progress=False)
    wanted, got = tensors(whole / "trained", toys), tensors(tmp_path / "out" / "trained", toys)
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    for name, one in found.sweeps.items():
        np.testing.assert_array_equal(one.rewards, Sweep.load(whole / "sweeps" / name).rewards)
    assert toys.CALLS["made"] < calls["report"]  # what was done is not done again


def stops(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """As if Ctrl-C were pressed during the first update of a run."""
    if STOPS and len(prompts) == 4:
        STOPS.pop()
        os.kill(os.getpid(), signal.SIGINT)
    return [text.count("w1") + 0.1 * text.count("w2") for text in completions]


STOPS = [True]


@pytest.mark.slow
def test_ctrl_c_in_training_stops_the_experiment(saved, toys, tmp_path):
    """The trainer ends quietly after SIGINT: that must not pass for a finished stage."""
    plan = Plan.of(**settings(saved, tmp_path, updates=3, rewards={"low": stops, "high": toys.high}))
    with pytest.raises(KeyboardInterrupt):
        reproduce(plan, progress=False)
    assert list(json.loads((tmp_path / "reproduce.json").read_text())["finished"]) == ["build"]
    assert (tmp_path / "trained" / "r0" / "checkpoint-1").is_dir()
    reproduce(plan, progress=False)
    assert (tmp_path / "trained" / "r0" / "checkpoint-3").is_dir()
    assert json.loads((tmp_path / "reproduce.json").read_text())["settings"]["rewards"]["high"] == "router_toys:high"


def test_the_command_says_that_it_can_go_on(saved, tmp_path, monkeypatch, capsys):
    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("peft_hoe.reproduce.reproduce", interrupted)
    assert cli.main(command(saved, tmp_path)) == 130
    assert capsys.readouterr().out == "interrupted; the same command goes on from here\n"


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["grpo", "distill"])
def test_other_trainers(saved, toys, tmp_path, trainer):
    if trainer == "grpo":
        pytest.importorskip("trl")
    plan = Plan.of(**settings(saved, tmp_path, trainer=trainer, rewards=toys.REWARDS))
    reproduce(plan, progress=False)
    before, after = tensors(tmp_path / "adapter", toys), tensors(tmp_path / "trained", toys)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all("hoe_router" in name for name in moved)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--reward", "low=router_toys:low"), "names 'low' twice"),
        (("--prompts", "train=/nowhere.txt"), "write FILE, or SPLIT=FILE"),
        (("--trainer", "reinforce"), "use one of 'ppo', 'grpo', 'distill'"),
        (("--baselines", "rs,best"), "each can be given once, of"),
        (("--baselines", "morlhf"), "each can be given once, of"),
        (("--batch-size", "7", "--trainer", "grpo", "--baselines", "rs", "--micro-batch-size", "2"), "multiple"),
        (("--limit", "0"), "limit is 0"),
        (("--seeds", "0 1"), "--seeds is '0 1'; give whole numbers with commas"),
        (("--seeds", "0,0"), "seeds are [0, 0]; give each once"),
        (("--seeds", "0,1", "--router", "none"), "no router is trained"),
        (("--seeds", "0,1", "--auto"), "placed by measurement (--auto)"),
        (("--router", "0.5,0.6"), "sums to 1.1"),
        (("--data", "/nowhere"), "there is no recipe"),
    ],
)
def test_bad_arguments_are_one_line_and_write_nothing(saved, tmp_path, more, message, capsys):
    assert cli.main(command(saved, tmp_path / "out", *more)) == 2
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert printed.startswith("peft-hoe reproduce: ")
    assert message in printed
    assert not (tmp_path / "out").exists()


def test_a_folder_of_others_is_left_alone(saved, tmp_path):
    (tmp_path / "adapter").mkdir()
    plan = Plan.of(**settings(saved, tmp_path))
    for restart in (False, True):
        with pytest.raises(HoEError, match=r"holds no reproduce\.json"):
            reproduce(plan, restart=restart, progress=False)
    assert (tmp_path / "adapter").is_dir()
    (tmp_path / "reproduce.json").write_text("{")
    with pytest.raises(HoEError, match="damaged"):
        reproduce(plan, progress=False)


def test_a_missing_file_is_told_before_anything_is_built(saved, tmp_path):
    plan = Plan.of(**settings(saved, tmp_path / "out", rewards={"low": "nowhere:low", "high": "router_toys:high"}))
    with pytest.raises(RewardError, match="nowhere"):
        reproduce(plan, progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_several_texts_of_every_method_and_several_experiments_as_one(saved, tmp_path, capsys):
    """Sampled, with dense soups beside; the stack of two experiments is on one scale."""
    more = (
        "--baselines",
        "rs_dense",
        "--router",
        "none",
        "--texts",
        "3",
        "--temperature",
        "0.7",
        "--top-p",
        "0.9",
        "--quiet",
    )
    for seed in ("0", "1"):
        assert cli.main([*command(saved, tmp_path / seed, *more), "--seed", seed]) == 0
    scale = Sweep.load(tmp_path / "0/sweeps/hoe").normalizer
    assert scale.measurement["texts"] == 3
    stacks = []
    for name in ("hoe", "rs_dense"):
        runs = [Sweep.load(tmp_path / seed / "sweeps" / name) for seed in ("0", "1")]
        assert {run.rewards.shape for run in runs} == {(1, 3, 4, 3, 2)}  # runs, preferences, prompts, texts, objectives
        assert all(run.runs[0]["decoding"]["top_p"] == 0.9 for run in runs)
        for run in runs:
            run.normalizer, run.payoff_source = scale, "given"
        stacks.append(Sweep.stack(runs))
    found = stacks[0].compare(stacks[1], replicates=50)
    assert "hypervolume A - B" in found.values
    assert cli.main([*command(saved, tmp_path / "2", "--texts", "2"), "--dry-run"]) == 2
    assert "greedy texts are all the same" in capsys.readouterr().err


def test_each_seed_has_stages_of_its_own(saved, tmp_path, capsys):
    more = ("--seeds", "0,1", "--baselines", "rs,lora_moe")
    assert cli.main([*command(saved, tmp_path, *more), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.removeprefix("to do").split(":")[0].strip() for line in lines if line.startswith("to do")] == [
        "build", "train-seed0", "train-seed1", "sweep hoe-seed0", "sweep hoe-seed1", "stack hoe", "sweep hoe_dropped",
        "sweep rs", "sweep lora_moe-seed0", "sweep lora_moe-seed1", "stack lora_moe", "report",
    ]  # fmt: skip
    plan = Plan.of(**settings(saved, tmp_path, seeds=[3, 4]))
    one, two = (arguments(plan, False, tmp_path, seed=seed) for seed in (3, 4))
    assert [(args.seed, args.run_name) for args in (one, two)] == [(3, "seed3"), (4, "seed4")]


@pytest.mark.slow
def test_seeds_of_training_are_stacked_and_more_may_be_added(saved, toys, tmp_path):
    """The first seed is the run that trains once with it; the scale is the first sweep's, whatever comes later."""
    several = settings(saved, tmp_path / "several", rewards=toys.REWARDS, baselines=["rs"])
    once = settings(saved, tmp_path / "once", rewards=toys.REWARDS)
    reproduce(Plan.of(**once), progress=False)
    first = reproduce(Plan.of(**several, seeds=[0, 1]), progress=False)
    out = tmp_path / "several"
    zero, one, same = (
        tensors(path, toys) for path in (out / "trained-seed0", out / "trained-seed1", tmp_path / "once/trained")
    )
    assert all(torch.equal(zero[name], same[name]) for name in same)
    assert any(not torch.equal(zero[name], one[name]) for name in zero)
    apart = [Sweep.load(out / "sweeps" / f"hoe-seed{seed}") for seed in (0, 1)]
    np.testing.assert_array_equal(first.sweeps["hoe"].rewards, np.concatenate([each.rewards for each in apart]))
    assert [run["training_seed"] for run in first.sweeps["hoe"].runs] == [0, 1]
    for other in (apart[1], first.sweeps["rs"], first.sweeps["hoe"]):
        np.testing.assert_array_equal(other.normalizer.payoff, apart[0].normalizer.payoff)
    assert first.sweeps["hoe"].payoff_source == apart[0].payoff_source == "payoff prompts"
    assert "2 runs" in first.summary

    told: list[str] = []
    before = files(out / "sweeps" / "rs")
    more = reproduce(Plan.of(**several, seeds=[0, 1, 2]), progress=False, say=told.append)
    done = ["train-seed2", "sweep hoe-seed2", "stack hoe", "report"]
    assert [line.split(":")[0] for line in told if not line.endswith("done")] == done
    assert more.sweeps["hoe"].rewards.shape[0] == 3
    assert files(out / "sweeps" / "rs") == before
    for seeds in ([1, 0], []):
        with pytest.raises(HoEError, match=r"seeds was \[0, 1, 2\], is \["):
            describe(Plan.of(**several, seeds=seeds))
    (out / "trained-seed7").mkdir()
    again = reproduce(Plan.of(**several, seeds=[1]), restart=True, progress=False)
    assert again.sweeps["hoe"].rewards.shape[0] == 1
    assert sorted(path.name for path in out.glob("trained*")) == ["trained-seed1"]


@pytest.mark.slow
def test_an_interrupted_seed_goes_on(saved, toys, tmp_path):
    """It stops in the second seed's training; the first's is not done again, and both are as without an interruption."""
    wanted = reproduce(
        Plan.of(**settings(saved, tmp_path / "whole", seeds=[0, 1], rewards=toys.REWARDS)), progress=False
    )
    calls: dict[str, int] = {}
    plan = Plan.of(**settings(saved, tmp_path / "out", seeds=[0, 1]))
    toys.CALLS.update({"made": 0, "fails at": 0})
    reproduce(
        Plan.of(**settings(saved, tmp_path / "counted", seeds=[0, 1])), progress=False,
        say=lambda line: calls.update({line.split(":")[0]: toys.CALLS["made"]}),
    )  # fmt: skip
    toys.CALLS.update({"made": 0, "fails at": calls["sweep hoe-seed0"]})  # the last reward of the second training
    with pytest.raises(RewardError, match="out of order"):
        reproduce(plan, progress=False)
    assert list(json.loads((tmp_path / "out" / "reproduce.json").read_text())["finished"]) == ["build", "train-seed0"]
    toys.CALLS.update({"made": 0, "fails at": 0})
    found = reproduce(plan, progress=False)
    np.testing.assert_array_equal(found.sweeps["hoe"].rewards, wanted.sweeps["hoe"].rewards)


@pytest.mark.slow
def test_a_baseline_that_is_trained_has_every_seed(saved, toys, tmp_path):
    found = reproduce(
        Plan.of(**settings(saved, tmp_path, rewards=toys.REWARDS, baselines=["lora_moe"], seeds=[0, 1])), progress=False
    )
    assert [run["training_seed"] for run in found.sweeps["lora_moe"].runs] == [0, 1]
    zero, one = (tensors(tmp_path / f"baselines/seed{seed}/lora_moe/trained", toys) for seed in (0, 1))
    assert any(not torch.equal(zero[name], one[name]) for name in zero)
