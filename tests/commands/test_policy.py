"""`peft-hoe policy` on the embedded base: what it trains, prints, keeps and refuses."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("trl")

from peft_hoe import demo
from peft_hoe.cli import main

REWARDS = [f"--reward={name}=peft_hoe.demo.rewards:{name}" for name in ("cheerful", "vivid")]
SMALL = "--updates 2 --batch-size 16 --group-size 8 --max-new-tokens 12 --cpu".split()


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "prompts.json"
    path.write_text(json.dumps(demo.load_prompts()))
    return str(path)


def policy(prompts: str, output: Path, *arguments: str, rewards: list[str] = REWARDS) -> int:
    return main(["policy", demo.BASE, *rewards, "--prompts", prompts, "--output", str(output), *SMALL, *arguments])


@pytest.mark.slow
def test_the_printed_command_builds_from_the_policies(
    prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import peft

    out = tmp_path / "out put"
    assert policy(prompts, out, "--rank", "3") == 0
    printed = capsys.readouterr().out
    assert "update 2 of 2: cheerful " in printed
    assert [line for line in printed.splitlines() if line.startswith("vivid: mean reward")]
    command = shlex.split(printed.strip().splitlines()[-1])
    assert command[:2] == ["peft-hoe", "build"]
    assert main([*command[1:], "--quiet"]) == 0
    model = peft.AutoPeftModelForCausalLM.from_pretrained(str(out / "adapter"))
    config = model.peft_config["default"]
    assert config.objectives == ["cheerful", "vivid"]
    names, ranks = config.expert_names, [spec.r or config.r for spec in config.experts]
    assert dict(zip(names, ranks, strict=True))["cheerful"] == 3  # as it is, not cut or filled up
    vivid = peft.PeftModel.from_pretrained(demo.load_base(), str(out / "vivid")).eval()
    ids = torch.tensor([[1, 5, 6, 7]])
    torch.testing.assert_close(model.eval()(ids, preference=[0, 1]).logits, vivid(ids).logits, rtol=0, atol=1e-4)


def test_stop_strings_reach_the_training(prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--stop` was no option; answers end at the two characters that stand for the end of a line too."""
    seen: list[str] = []

    def cheerful(prompts: list[str], completions: list[str]) -> list[float]:
        seen.extend(completions)
        return [float(len(text)) for text in completions]

    monkeypatch.setattr(demo.rewards, "cheerful", cheerful)
    assert policy(prompts, tmp_path / "out", "--stop", "e", "--stop", r"\n", "--quiet", rewards=REWARDS[:1]) == 0
    assert len(seen) == 2 * 16
    assert not [text for text in seen if "e" in text or "\n" in text]


def test_every_weight_and_quietly(prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert policy(prompts, tmp_path / "out", "--full", "--quiet", rewards=REWARDS[1:]) == 0
    assert "update 2 of 2" not in capsys.readouterr().out
    before, after = (
        load_file(Path(demo.BASE) / "model.safetensors"),
        load_file(tmp_path / "out/vivid/model.safetensors"),
    )
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before if "_proj" in name)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_with_the_policies_that_are_missing(
    prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert policy(prompts, tmp_path / "out", rewards=REWARDS[:1]) == 0
    weights = (tmp_path / "out/cheerful/adapter_model.safetensors").read_bytes()
    assert policy(prompts, tmp_path / "out") == 2
    assert "cheerful exists and is not empty: keep it with --resume" in capsys.readouterr().err
    assert policy(prompts, tmp_path / "out", "--resume") == 0
    printed = capsys.readouterr().out
    assert f"cheerful: kept {tmp_path / 'out' / 'cheerful'}" in printed
    assert f"--policy cheerful={tmp_path / 'out' / 'cheerful'} --policy vivid=" in printed
    assert (tmp_path / "out/cheerful/adapter_model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "0"], "--rank is 0; it must be at least 1"),
        (["--rank", "4", "--full"], "--rank 4 is of a LoRA adapter, and --full trains none"),
        (["--group-size", "1"], "--group-size 1; a group has at least 2"),
        (["--group-size", "5"], "--batch-size is 16 and --group-size 5"),
        (["--micro-batch-size", "3"], "--batch-size 16 is no multiple of --micro-batch-size 3"),
        (["--learning-rate", "0"], "--learning-rate is 0.0; it must be above 0"),
        (["--temperature", "-1"], "--temperature is -1.0; it must be above 0"),
        (["--reward", "vivid=math:pi"], "names 'vivid' twice"),
        (["--report-to", "nowhere"], "metrics cannot be reported to 'nowhere'"),
        (["--reward", "warm=math:pi"], "has no function 'pi'"),
        (["--reward", "a/b=math:sqrt"], "the objective 'a/b' cannot name a folder"),
        (["--reward", "warm"], "--reward is 'warm'; write NAME=SOURCE"),
        (["--reward", "warm=math"], "cannot read the reward 'warm=math'"),
        (["--prompts", "missing.json"], "cannot read the prompts 'missing.json'"),
    ],
)
def test_errors_come_before_anything_is_trained(
    prompts: str, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert policy(prompts, tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_none_is_named(prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*REWARDS, "--prompts", prompts, "--output", str(tmp_path / "out"), *SMALL]
    assert main(["policy", str(tmp_path / "nothing"), *arguments]) == 2
    assert "cannot load the configuration of" in capsys.readouterr().err


def test_a_folder_of_something_else_is_left_alone(
    prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "vivid").mkdir()
    (tmp_path / "vivid" / "mine.txt").write_text("keep")
    assert policy(prompts, tmp_path, "--resume") == 2
    assert "vivid exists and is not empty: it holds no policy; name another --output" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["vivid"]
