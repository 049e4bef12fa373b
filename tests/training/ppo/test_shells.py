"""HoERouterTrainer over TRL's PPOTrainer and over transformers' Trainer: one trainer, one configuration."""

from __future__ import annotations

import dataclasses
import inspect
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import get_type_hints

import pytest
import torch
from packaging import version
from transformers import HfArgumentParser, Trainer

from peft_hoe.training import HoERouterConfig, HoERouterTrainer
from peft_hoe.training.ppo.ppo_fields import PPOFields
from peft_hoe.training.ppo.shell import PPOShell
from peft_hoe.training.trl_versions import trl_ppo

TRL = trl_ppo()
TRL_VERSION = version.parse("0" if TRL is None else metadata.version("trl"))
PPOConfig, PPOTrainer = (None, None) if TRL is None else (TRL.PPOConfig, TRL.PPOTrainer)
with_ppo_trainer = pytest.mark.skipif(TRL is None, reason="the installed TRL has no PPOTrainer")


def other_shell() -> type:
    """HoERouterTrainer over transformers' Trainer, whatever TRL there is."""
    return type("HoERouterTrainer", (PPOShell,), {"__doc__": HoERouterTrainer.__doc__})


@with_ppo_trainer
def test_with_a_ppo_trainer_ours_is_one() -> None:
    assert issubclass(HoERouterTrainer, PPOTrainer)
    assert issubclass(HoERouterConfig, PPOConfig)
    assert not issubclass(other_shell(), PPOTrainer)
    assert inspect.signature(other_shell()) == inspect.signature(HoERouterTrainer)


@pytest.mark.skipif(TRL is not None, reason="the installed TRL has a PPOTrainer")
def test_without_one_ours_is_a_trainer() -> None:
    assert issubclass(HoERouterTrainer, Trainer)
    assert issubclass(HoERouterConfig, PPOFields)


@with_ppo_trainer
@pytest.mark.skipif(version.parse("1.12") > TRL_VERSION, reason="the fields of TRL 1.12")
def test_our_fields_are_those_of_ppo_config() -> None:
    """Names, types and defaults, and what becomes of them."""
    ours, theirs = (
        {field.name: field.default for field in dataclasses.fields(kind)} for kind in (PPOFields, PPOConfig)
    )
    assert ours == theirs
    types = [get_type_hints(kind) for kind in (PPOFields, PPOConfig)]
    assert {name: types[0][name] for name in ours} == {name: types[1][name] for name in ours}
    made = [
        kind(output_dir="run", use_cpu=True, gradient_checkpointing=None).to_dict() for kind in (PPOFields, PPOConfig)
    ]
    assert made[0] == made[1]


def test_the_configuration_is_read_from_a_command_line() -> None:
    """As TRL's script does it."""
    arguments = ["--output_dir", "run", "--missing_eos_penalty", "1.0", "--stop_token", "eos", "--use_cpu", "true"]
    (made,) = HfArgumentParser(HoERouterConfig).parse_args_into_dataclasses(arguments)
    assert (made.missing_eos_penalty, made.stop_token, made.num_ppo_epochs, made.beta) == (1.0, "eos", 1, 0.1)


@with_ppo_trainer
@pytest.mark.parametrize("value_model", [False, True])
def test_both_shells_train_the_same_router(toys: ModuleType, tmp_path: Path, value_model: bool) -> None:
    """In float64: rollouts, rewards, weights, mini-batches and micro-batches, schedule and random numbers are the same."""
    from transformers import LlamaForSequenceClassification

    trained, logged = [], []
    for kind in (HoERouterTrainer, other_shell()):
        critic = None
        if value_model:
            torch.manual_seed(4)
            critic = LlamaForSequenceClassification(toys.make_base().config).double()
        trainer = toys.make_trainer(
            toys.make_policy().double(), tmp_path / str(len(trained)), {"normalizer": None, "value_model": critic}, kind=kind,
            max_steps=3, num_ppo_epochs=2, gradient_accumulation_steps=2, num_mini_batches=2, per_device_train_batch_size=4,
            payoff_prompts=12, response_length=12, stop_token="eos", save_strategy="steps", save_steps=1,
            lr_scheduler_type="cosine", warmup_steps=1,
        )  # fmt: skip
        trainer.train()
        assert all(parameter.dtype == torch.float64 for parameter in trainer.router.parameters())
        trained.append([*trainer.router.parameters(), *trainer.ppo.critic.parameters()])
        logged.append([{**entry, "eps": 0} for entry in trainer.state.log_history])
    for x, y in zip(*trained, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-10)
    assert logged[0] == logged[1]


@with_ppo_trainer
def test_a_checkpoint_of_one_shell_is_resumed_in_the_other(toys: ModuleType, tmp_path: Path) -> None:
    """As after an update of TRL."""
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    first, second = HoERouterTrainer, other_shell()
    for kind, other in ((first, second), (second, first)):
        whole = toys.make_trainer(None, tmp_path / "whole", {}, kind=kind, **settings)
        whole.train()
        resumed = toys.make_trainer(None, tmp_path / "resumed", {}, kind=other, **settings)
        resumed.train(resume_from_checkpoint=tmp_path / "whole" / "checkpoint-2")
        assert resumed.state.episode == whole.state.episode == 32
        for x, y in zip(whole.router.parameters(), resumed.router.parameters(), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-4)
