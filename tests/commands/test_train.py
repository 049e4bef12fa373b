"""`train_routers` and the command with every trainer but PPO, which has tests of its own."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import PeftModel

import peft_hoe
from peft_hoe import cli
from peft_hoe.commands import train
from peft_hoe.commands.train_settings import configuration
from peft_hoe.training import HoEDistillationConfig

REWARDS = ("--reward", "low=router_toys:low", "--reward", "high=router_toys:high")


@pytest.fixture
def saved(toys: ModuleType, tmp_path: Path) -> Path:
    """A base with tokenizer, an adapter, prompts, texts and pairs on disk."""
    toys.make_policy().save_pretrained(tmp_path / "adapter")
    toys.make_base().save_pretrained(tmp_path / "base")
    toys.make_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "prompts.json").write_text(json.dumps(toys.PROMPTS))
    (tmp_path / "texts.json").write_text(json.dumps([{"text": f"w{i} w{2 * i} w3 w4"} for i in range(8)]))
    for name in ("low", "high"):
        (tmp_path / f"{name}.json").write_text(json.dumps(toys.make_pairs(name)))
    return tmp_path


def command(folder: Path, trainer: str, *more: str) -> list[str]:
    head = ["train", str(folder / "adapter"), "--base", str(folder / "base"), "--trainer", trainer]
    tail = ["--output", str(folder / "out"), "--updates", "2", "--batch-size", "8", "--cpu", "--quiet"]
    return [*head, *tail, *more]


def configured(trainer: str, *given: str) -> Any:
    """The configuration that a command line leads to."""
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    return configuration(parser.parse_args(["adapter", "--output", "out", "--trainer", trainer, "--cpu", *given]))


def options(folder: Path, trainer: str) -> list[str]:
    prompts = ["--prompts", str(folder / "prompts.json")]
    return {
        "grpo": [*prompts, *REWARDS, "--group-size", "4", "--max-new-tokens", "12"],
        "distill": [*prompts, "--max-new-tokens", "6"],
        "dpo": ["--pairs", f"low={folder / 'low.json'}", "--pairs", f"high={folder / 'high.json'}"],
    }[trainer]


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["grpo", "distill", "dpo"])
def test_command_trains_all_routers(saved: Path, toys: ModuleType, trainer: str, capsys: Any) -> None:
    if trainer != "distill":
        pytest.importorskip("trl")
    assert cli.main(command(saved, trainer, *options(saved, trainer))) == 0
    assert ("payoff table" in capsys.readouterr().out) is (trainer == "grpo")
    model = PeftModel.from_pretrained(toys.make_base(), saved / "out")
    assert [router.trained for router in model.peft_config["default"].routers] == [True, True]
    before = PeftModel.from_pretrained(toys.make_base(), saved / "adapter").state_dict()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved
    assert all("hoe_router" in name for name in moved)


@pytest.mark.parametrize(("given", "expected"), [((), (1, "critic")), (("--group-size", "4"), (4, "group"))])
def test_a_group_takes_the_place_of_the_critic(given: tuple[str, ...], expected: tuple[int, str]) -> None:
    args = configured("ppo", *given)
    assert (args.num_generations, args.baseline) == expected


@pytest.mark.parametrize("trainer", ["ppo", "grpo", "distill"])
def test_how_texts_are_written_reaches_every_trainer(trainer: str) -> None:
    """By the fields that its configuration has for it."""
    if trainer == "grpo":
        pytest.importorskip("trl")
    given = ("--stop", r"w1\n", "--top-k", "5", "--top-p", "0.9", "--chat-template-kwargs", '{"brief": true}')
    args = configured(trainer, *given)
    assert (args.stop_strings, args.top_k, args.top_p, args.temperature) == (["w1\n"], 5, 0.9, 1.0)
    assert args.chat_template_kwargs == {"brief": True}
    length = {"ppo": "response_length", "grpo": "max_completion_length", "distill": "max_new_tokens"}[trainer]
    assert getattr(args, length) == 64
    if trainer != "grpo":
        assert args.decoding().record["top_p"] == 0.9


@pytest.mark.parametrize("trainer", ["ppo", "grpo"])
def test_more_prompts_may_scale_the_rewards(trainer: str) -> None:
    """The remedy of a spread that may be chance."""
    if trainer == "grpo":
        pytest.importorskip("trl")
    found = [configured(trainer, *more) for more in ([], ["--payoff-prompts", "500"])]
    assert [args.payoff_prompts for args in found] == [128, 500]


@pytest.mark.parametrize("trainer", ["ppo", "grpo"])
def test_training_may_find_its_own_end(trainer: str) -> None:
    if trainer == "grpo":
        pytest.importorskip("trl")
    found = [
        (args.auto_stop, args.max_steps)
        for more in ([], ["--updates", "7"], ["--updates", "auto"], ["--updates", "auto", "--max-updates", "9"])
        for args in [configured(trainer, *more)]
    ]
    assert found == [(False, 60), (False, 7), (True, 240), (True, 9)]


def test_command_distils_on_texts(saved: Path, toys: ModuleType) -> None:
    assert cli.main(command(saved, "distill", "--prompts", str(saved / "texts.json"), "--router", "r1")) == 0
    model = PeftModel.from_pretrained(toys.make_base(), saved / "out")
    assert [router.trained for router in model.peft_config["default"].routers] == [False, True]


@pytest.mark.slow
def test_command_reports_each_router(saved: Path, trackio: Any, capsys: Any) -> None:
    """Quietly too: what is reported is not what is printed."""
    assert cli.main(command(saved, "distill", *options(saved, "distill"), "--report-to", "trackio")) == 0
    assert [settings["name"] for name, settings in trackio.calls if name == "init"] == ["r0", "r1"]
    assert [metrics["train/global_step"] for name, metrics in trackio.calls if name == "log"] == [1, 2, 2] * 2
    assert capsys.readouterr().out == f"saved in {saved / 'out'}\n"


@pytest.mark.parametrize(
    ("trainer", "more", "message"),
    [
        ("grpo", REWARDS, "--trainer grpo needs --prompts"),
        ("grpo", ("--prompts", "prompts.json"), "--trainer grpo needs --reward"),
        (
            "grpo",
            ("--prompts", "prompts.json", *REWARDS, "--group-size", "3"),
            "--group-size is 3, but the 8 responses",
        ),
        ("ppo", ("--prompts", "prompts.json", *REWARDS, "--group-size", "3"), "--group-size is 3, but the 8 responses"),
        ("ppo", ("--prompts", "prompts.json", *REWARDS, "--group-size", "1"), "--group-size is 1, but the 8 responses"),
        ("dpo", (), "--trainer dpo needs --pairs"),
        ("dpo", ("--pairs", "low"), "--pairs is 'low'; write NAME=FILE"),
        ("dpo", ("--pairs", "low=prompts.json"), "must hold a list of pairs: objects with `chosen`"),
        ("dpo", ("--pairs", "low=low.json", "--pairs", "low=low.json"), "names 'low' twice"),
        ("dpo", ("--pairs", "low=low.json", "--mu", "1"), "has no use for --mu"),
        ("distill", ("--prompts", "prompts.json", "--payoff-prompts", "9"), "has no use for --payoff-prompts"),
        ("grpo", ("--prompts", "prompts.json", *REWARDS, "--payoff-prompts", "0"), "--payoff-prompts is 0; it must be"),
        ("dpo", ("--pairs", "low=low.json", "--stop", "w1"), "has no use for --stop"),
        ("dpo", ("--pairs", "low=low.json", "--temperature", "1"), "has no use for --temperature"),
        ("distill", ("--prompts", "prompts.json", "--top-p", "0"), "top_p is 0.0"),
        ("distill", ("--prompts", "prompts.json", *REWARDS), "has no use for --reward"),
        (
            "distill",
            ("--prompts", "prompts.json", "--updates", "auto"),
            "--updates is auto, which follows the worst gap",
        ),
        ("distill", ("--prompts", "prompts.json", "--updates", "many"), "--updates is 'many'; give a number, or auto"),
        (
            "distill",
            ("--prompts", "prompts.json", "--max-updates", "9"),
            "--max-updates is 9, which bounds --updates auto",
        ),
        ("distill", ("--prompts", "nowhere.json"), "cannot read the prompts"),
        ("distill", ("--prompts", "prompts.json", "--report-to", "tensorbord"), "cannot be reported to 'tensorbord'"),
    ],
)
def test_bad_input_is_one_line(
    saved: Path, trainer: str, more: tuple[str, ...], message: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if trainer != "distill":
        pytest.importorskip("trl")
    monkeypatch.chdir(saved)
    assert cli.main(command(saved, trainer, *more)) == 2
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert printed.startswith("peft-hoe train: ")
    assert message in printed


@pytest.mark.slow
def test_a_run_that_ended_goes_on(toys: ModuleType, tmp_path: Path) -> None:
    """After the first router is finished and the second is half way; the routers are those of an uninterrupted run."""

    def run(folder: Path, resume: bool = False, callbacks: Any = None) -> Any:
        model = toys.make_policy().double()
        args = HoEDistillationConfig(
            output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, per_device_train_batch_size=8, max_steps=4,
            learning_rate=0.05, save_strategy="steps", save_steps=2, max_new_tokens=6,
        )  # fmt: skip
        peft_hoe.train_routers(
            model, args, trainer="distill", train_dataset=toys.PROMPTS, processing_class=toys.make_tokenizer(),
            resume_from_checkpoint=resume, callbacks=callbacks,
        )  # fmt: skip
        return model

    whole = run(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="stop here"):
        run(tmp_path / "ended", callbacks=[stop_in_second(3)])
    resumed = run(tmp_path / "ended", resume=True)
    for x, y in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-7)
    assert [router.trained for router in resumed.peft_config["default"].routers] == [True, True]


def stop_in_second(step: int) -> Any:
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            if args.router == "r1" and state.global_step == step:
                raise RuntimeError("stop here")

    return Stop()
