from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_hoe import cli
from peft_hoe.errors import RewardError

pytestmark = pytest.mark.slow

pytest.importorskip("trl.experimental.ppo")


@pytest.fixture
def saved(toys: ModuleType, tmp_path: Path) -> Path:
    """A base with tokenizer, an adapter and prompts on disk, in float64."""
    model = toys.make_policy().double()
    model.save_pretrained(tmp_path / "adapter")
    toys.make_base().double().save_pretrained(tmp_path / "base")
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
        ((*REWARDS, "--base", "/nowhere"), "there is no folder '/nowhere' for the base"),
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


# -- a run that ended before its time ---

FLAKY = ("--reward", "low=router_toys:flaky", *REWARDS[2:])


def run_flaky(
    saved: Path, toys: ModuleType, monkeypatch: pytest.MonkeyPatch, output: str, *more: str, fails_at: int = 0
) -> tuple[int, int]:
    """Exit status, and how often the reward was called: twice for the payoff table, and once for each update."""
    load = AutoModelForCausalLM.from_pretrained
    # transformers 4 loads in float32 whatever was saved.
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *a, **k: load(*a, **{"dtype": torch.float64, **k})
    )
    monkeypatch.setitem(toys.CALLS, "made", 0)
    monkeypatch.setitem(toys.CALLS, "fails at", fails_at)
    arguments = command(saved, *FLAKY, "--updates", "3", "--save-steps", "1", "--max-new-tokens", "12", *more)
    status = cli.main([*arguments, "--output", str(saved / output)])
    return status, toys.CALLS["made"]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(folder / "adapter_model.safetensors")
    return tensors


@pytest.mark.parametrize(
    ("fails_at", "left"),
    [(2, 2 + 6), (4, 2 + 3), (6, 3), (7, 2)],
    ids=["payoff", "second update of r0", "first of r1", "second of r1"],
)
def test_resumed_routers_are_those_of_an_uninterrupted_run(
    saved: Path, toys: ModuleType, monkeypatch: pytest.MonkeyPatch, fails_at: int, left: int
) -> None:
    assert run_flaky(saved, toys, monkeypatch, "whole") == (0, 2 + 6)
    assert run_flaky(saved, toys, monkeypatch, "out", fails_at=fails_at) == (2, fails_at)
    assert run_flaky(saved, toys, monkeypatch, "out", "--resume") == (0, left)
    whole, resumed = adapter(saved / "whole"), adapter(saved / "out")
    assert whole.keys() == resumed.keys()
    for name in whole:
        assert whole[name].dtype == torch.float64
        torch.testing.assert_close(whole[name], resumed[name], rtol=0, atol=1e-7)
    config = PeftModel.from_pretrained(toys.make_base(), saved / "out").peft_config["default"]
    assert [router.trained for router in config.routers] == [True, True]
    # All is finished now: nothing is trained again, and nothing is lost.
    assert run_flaky(saved, toys, monkeypatch, "out", "--resume") == (0, 0)
    assert all(torch.equal(tensor, adapter(saved / "out")[name]) for name, tensor in resumed.items())


def test_what_an_earlier_run_left_is_not_resumed(
    saved: Path, toys: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checkpoints have higher numbers, and its routers are finished; neither belongs to the new run."""
    assert run_flaky(saved, toys, monkeypatch, "out") == (0, 8)
    assert run_flaky(saved, toys, monkeypatch, "out", "--seed", "1", fails_at=4) == (2, 4)
    assert run_flaky(saved, toys, monkeypatch, "out", "--seed", "1", "--resume") == (0, 2 + 3)


def test_other_settings_are_not_resumed(
    saved: Path, toys: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_flaky(saved, toys, monkeypatch, "out", "--resume") == (2, 0)
    assert "no run of several routers" in capsys.readouterr().err
    assert run_flaky(saved, toys, monkeypatch, "out", fails_at=7) == (2, 7)
    for changed in (("--updates", "4"), ("--seed", "1"), ("--mu", "0.2")):
        assert run_flaky(saved, toys, monkeypatch, "out", "--resume", *changed) == (2, 0)
        assert "r0/router_finished.pt was written by a run with" in capsys.readouterr().err


@pytest.mark.parametrize("average", [False, True])
def test_finished_routers_return_with_averages_and_a_value_model(
    toys: ModuleType, tmp_path: Path, average: bool
) -> None:
    """The second router starts from the value model as the first one left it, also after an interruption."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from peft_hoe.objectives import RewardNormalizer
    from peft_hoe.training import HoERouterConfig
    from peft_hoe.training.every_router import train_routers

    def run(folder: str, fails_at: int = 0, resume: bool = False) -> dict[str, torch.Tensor]:
        toys.CALLS |= {"made": 0, "fails at": fails_at}
        torch.manual_seed(4)
        config = LlamaConfig(**toys.make_base().config.to_dict() | {"num_labels": 2})
        model = toys.make_policy()
        train_routers(
            model,
            HoERouterConfig(
                output_dir=str(tmp_path / folder), use_cpu=True, report_to=[], disable_tqdm=True, num_sample_generations=0,
                per_device_train_batch_size=4, max_steps=2, response_length=6, learning_rate=0.01,
                average_routers=average, save_strategy="no", logging_strategy="no",
            ),
            processing_class=toys.make_tokenizer(),
            reward_model={"low": toys.flaky, "high": toys.high},
            train_dataset=toys.PROMPTS,
            normalizer=RewardNormalizer([[0.65, 0.45], [0.45, 0.65]], ["low", "high"]),
            value_model=LlamaForSequenceClassification(config),
            resume_from_checkpoint=resume,
        )  # fmt: skip
        return {name: parameter.detach() for name, parameter in model.named_parameters()}

    whole = run("whole")
    with pytest.raises(RewardError, match="out of order"):
        run("out", fails_at=3)
    resumed = run("out", resume=True)
    assert toys.CALLS["made"] == 2
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
