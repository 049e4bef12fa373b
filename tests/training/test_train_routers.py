from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import PeftModel

from peft_hoe import cli

pytest.importorskip("trl.experimental.ppo")


@pytest.fixture
def saved(toys: ModuleType, tmp_path: Path) -> Path:
    """A base with tokenizer, an adapter and prompts on disk."""
    model = toys.make_policy()
    model.save_pretrained(tmp_path / "adapter")
    toys.make_base().save_pretrained(tmp_path / "base")
    toys.make_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "prompts.json").write_text(json.dumps(toys.PROMPTS))
    return tmp_path


def command(folder: Path, *more: str) -> list[str]:
    arguments = [
        "train",
        str(folder / "adapter"),
        "--base",
        str(folder / "base"),
        "--prompts",
        str(folder / "prompts.json"),
    ]
    return [
        *arguments,
        "--output",
        str(folder / "out"),
        "--updates",
        "2",
        "--batch-size",
        "8",
        "--cpu",
        "--quiet",
        *more,
    ]


REWARDS = ("--reward", "low=router_toys:low", "--reward", "high=router_toys:high")


def test_command_trains_all_routers(saved: Path, toys: ModuleType) -> None:
    assert cli.main([*command(saved, "--max-new-tokens", "12", "--micro-batch-size", "4"), *REWARDS]) == 0
    model = PeftModel.from_pretrained(toys.make_base(), saved / "out")
    assert [router.trained for router in model.peft_config["default"].routers] == [True, True]
    before = PeftModel.from_pretrained(toys.make_base(), saved / "adapter").state_dict()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved
    assert all("hoe_router" in name for name in moved)


def test_micro_batches_bound_every_forward(saved: Path, toys: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of rollouts and of the payoff table: memory is what it is for."""
    from peft import PeftModelForCausalLM

    rows = []
    forward = PeftModelForCausalLM.forward
    generate = PeftModelForCausalLM.generate

    def noting(method: Any) -> Any:
        def call(self: Any, *arguments: Any, **keywords: Any) -> Any:
            rows.append(len(keywords["input_ids"]))
            return method(self, *arguments, **keywords)

        return call

    monkeypatch.setattr(PeftModelForCausalLM, "forward", noting(forward))
    monkeypatch.setattr(PeftModelForCausalLM, "generate", noting(generate))
    more = ("--router", "r1", "--max-new-tokens", "12", "--micro-batch-size", "2", "--updates", "1")
    assert cli.main([*command(saved, *more), *REWARDS]) == 0
    assert max(rows) == 2


def test_command_trains_one_router(saved: Path, toys: ModuleType) -> None:
    assert cli.main([*command(saved, "--router", "r1", "--max-new-tokens", "12"), *REWARDS]) == 0
    model = PeftModel.from_pretrained(toys.make_base(), saved / "out")
    assert [router.trained for router in model.peft_config["default"].routers] == [False, True]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((*REWARDS, "--router", "nope"), "nope"),
        (REWARDS[:2], "missing"),
        (("--reward", "low"), "cannot read the reward"),
        ((*REWARDS, "--micro-batch-size", "3"), "no multiple"),
        ((*REWARDS, "--batch-size", "0"), "--batch-size is 0"),
        ((*REWARDS, "--updates", "0"), "--updates is 0"),
        ((*REWARDS, "--reward-timeout", "0"), "reward_timeout is 0"),
        (("--reward", "low=router_toys:hangs", *REWARDS[2:], "--reward-timeout", "0.05"), "within 0.05 s"),
        ((*REWARDS, "--base", "/nowhere"), "cannot load the adapter"),
        ((*REWARDS, "--eval-prompts", "/nowhere.txt"), "cannot read the prompts"),
    ],
)
def test_bad_input_is_one_line(
    saved: Path, toys: ModuleType, more: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(command(saved, *more)) == 2
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert printed.startswith("peft-hoe train: ")
    assert message in printed
