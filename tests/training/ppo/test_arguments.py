"""Every field of HoERouterConfig, TrainingArguments' and PPOConfig's included, is used or refused by name."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from peft_hoe import HoEError, HoEWarning
from peft_hoe.training import HoERouterConfig
from peft_hoe.training.ppo.refused_arguments import REFUSED
from peft_hoe.training.ppo.shell import PPOShell
from peft_hoe.training.run.refused_arguments import REFUSED_BY_ALL, refuse_changed

Make = Callable[..., Any]
FIELDS = {field.name: field.default for field in dataclasses.fields(HoERouterConfig) if field.init}
ALL_REFUSED = {**REFUSED_BY_ALL, **REFUSED, "deepspeed": "", "fsdp": ""}

# Read by TrainingArguments itself when it starts, or by `should_save` and `should_log`.
SET_UP = {
    "ddp_backend", "ddp_timeout", "log_on_each_node", "local_rank", "tf32", "use_cpu", "dataloader_pin_memory",
    "activation_checkpointing", "activation_checkpointing_kwargs",  # the same as gradient_checkpointing
}  # fmt: skip
# For scripts, which TRL's and transformers' own trainers do not read either.
SCRIPTS = {
    "do_train", "do_eval", "do_predict", "resume_from_checkpoint", "sft_model_path", "reward_model_path", "dataset_num_proc",
}  # fmt: skip
# They mean something beside another field only, which is refused.
BESIDE = {
    "ds3_gather_for_generation": "deepspeed", "fsdp_config": "fsdp", "length_column_name": "train_sampling_strategy",
    "liger_kernel_config": "use_liger_kernel",
}  # fmt: skip
# What they ask for is so in any case, whatever they say.
ALWAYS_SO = {
    "dataloader_drop_last",  # every update has a whole batch
    "logging_nan_inf_filter",  # a loop of transformers would mean over the last numbers; metrics here are an update's own
    "remove_unused_columns",  # the other columns go to the rewards, and to no model
    "kl_estimator",  # but for k3, which it is, refused by a check of its own
}
# Read by callbacks of reports, and by what pushes to the Hub.
REPORTS = {"project", "run_name", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"}
HUB = {"hub_model_id", "hub_token", "hub_private_repo", "hub_revision", "hub_strategy", "hub_always_push"}
READ: set[str] = set()
ELSEWHERE = SET_UP | SCRIPTS | set(BESIDE) | ALWAYS_SO | REPORTS | HUB


def other(default: Any) -> Any:
    """Another value than the default."""
    return not default if isinstance(default, bool) else "something"


@pytest.mark.parametrize("name", sorted(ALL_REFUSED.keys() & FIELDS.keys()))
def test_refused_by_name(name: str, make_trainer: Make) -> None:
    with pytest.raises(HoEError) as caught:
        make_trainer(**{name: other(FIELDS[name])})
    if name not in ("deepspeed", "fsdp"):
        assert str(caught.value).startswith(f"{name}=")
        assert ALL_REFUSED[name] in str(caught.value)
    assert caught.value.argument == name


def test_defaults_are_no_arguments() -> None:
    """Also after TrainingArguments has put others in their place, as where a configuration is made from another one."""
    made = dataclasses.replace(HoERouterConfig(output_dir="run", use_cpu=True), gamma=0.5)
    assert made.gamma == 0.5
    refuse_changed(made, REFUSED_BY_ALL | REFUSED)


class Watched(HoERouterConfig):
    """Notes which of its fields are read, but by what writes all of them."""

    def __getattribute__(self, name: str) -> Any:
        if name in FIELDS and sys._getframe(1).f_code.co_name not in (
            "to_dict",
            "__post_init__",
            "__repr__",
            "__str__",
        ):
            READ.add(name)
        return super().__getattribute__(name)


@pytest.mark.parametrize("kind", [None, PPOShell])
def test_what_is_not_refused_is_read(kind: Any, make_trainer: Make, toys: ModuleType, tmp_path: Any) -> None:
    """By the constructor, a run with evaluation, samples and checkpoints, or its end: read by the loop, not copied."""
    settings = {
        **toys._settings(tmp_path), "per_device_train_batch_size": 8, "max_steps": 2, "response_length": 4,
        "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "num_sample_generations": 1,
        "load_best_model_at_end": True, "metric_for_best_model": "objective/scores", "logging_strategy": "steps",
        **toys.checkpointing(),
    }  # fmt: skip
    args = Watched(**settings)
    READ.clear()
    constructor = {"args": args, "eval_dataset": toys.PROMPTS[:4], "normalizer": None}
    trainer = make_trainer(constructor=constructor, kind=kind)
    trainer.train()
    trainer.save_model()
    without_steps = make_trainer(num_train_epochs=1, max_steps=-1)
    assert without_steps.args.num_total_batches == 3
    expected = FIELDS.keys() - ALL_REFUSED.keys() - ELSEWHERE - {"num_train_epochs"}
    if Version(transformers.__version__) >= Version("5.23"):  # before, there are fields that are gone since
        assert sorted(expected - READ) == []
    assert sorted(ALL_REFUSED.keys() & ELSEWHERE) == []


def test_data_seed_draws_the_prompts(make_trainer: Make) -> None:
    """And `seed` all else, as in transformers."""
    plain, own, same = (make_trainer(seed=3, data_seed=seed).next_prompts().texts for seed in (None, 4, 3))
    assert plain == same
    assert plain != own


def test_eval_on_start(make_trainer: Make, toys: ModuleType) -> None:
    trainer = make_trainer(constructor={"eval_dataset": toys.PROMPTS[:4]}, eval_on_start=True)
    trainer.train()
    evaluated = [entry["step"] for entry in trainer.state.log_history if "eval_objective/scores" in entry]
    assert evaluated == [0]


def test_full_determinism(make_trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))  # transformers writes into it
    try:
        make_trainer(full_determinism=True)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_checkpoints_are_pushed(make_trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """After they are whole, as transformers does; PPOTrainer's loop does it too."""
    pushed: list[str] = []
    trainer = make_trainer(save_strategy="steps", save_steps=1)
    trainer.args.push_to_hub = True
    monkeypatch.setattr(trainer, "_push_from_checkpoint", lambda folder: pushed.append(folder.rsplit("/", 1)[1]))
    monkeypatch.setattr(trainer, "_finish_current_push", lambda: pushed.append("finished"))
    trainer.train()
    assert pushed == ["checkpoint-1", "checkpoint-2", "finished"]


def test_the_users_configuration_is_not_written_to(make_trainer: Make, toys: ModuleType, tmp_path: Any) -> None:
    """A second trainer with it, on more prompts, trains on all of them: 24 and 48 prompts make 3 and 6 updates of 8."""
    settings = {**toys._settings(tmp_path), "per_device_train_batch_size": 8, "num_train_epochs": 1}
    args = HoERouterConfig(**settings)
    for rows, updates in ((toys.PROMPTS, 3), ([*toys.PROMPTS, *toys.PROMPTS], 6)):
        trainer = make_trainer(constructor={"args": args, "train_dataset": rows})
        assert trainer.args.num_total_batches == updates
    assert args.total_episodes is None
    assert args.batch_size is None


def test_schedules_that_follow_a_metric_are_refused(make_trainer: Make) -> None:
    with pytest.raises(HoEError, match="'reduce_lr_on_plateau', which follows a metric"):
        make_trainer(lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps")


def test_a_reference_that_nothing_is_held_to_is_told(make_trainer: Make, toys: ModuleType) -> None:
    """A model is what TRL's scripts always give, so that it is no error; the name of one is a user's own wish."""
    with pytest.warns(HoEWarning, match="ref_model is given, but kl_coef is 0 .*ref_model is not used") as caught:
        trainer = make_trainer(constructor={"ref_model": toys.make_base()})
    assert [item.filename for item in caught if item.category is HoEWarning] == [
        toys.__file__
    ]  # where the trainer was made
    assert trainer.ref_model is None
    with pytest.raises(HoEError, match="kl_reference is 'static', but kl_coef is 0") as refused:
        make_trainer(kl_reference="static")
    assert refused.value.argument == "kl_reference"
    with pytest.raises(HoEError, match="ref_model is given, and kl_reference is 'static'"):
        make_trainer(constructor={"ref_model": toys.make_base()}, kl_coef=0.05, kl_reference="static")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, 0) for name in (
            "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "num_ppo_epochs",
            "num_mini_batches", "local_rollout_forward_batch_size", "payoff_prompts", "total_episodes",
        )),
        *((name, -1) for name in (
            "total_episodes", "num_sample_generations", "verdict_texts", "num_train_epochs", "learning_rate",
            "value_learning_rate", "gamma", "lam", "cliprange", "cliprange_value", "vf_coef", "kl_coef",
        )),
        ("gamma", 1.01), ("lam", 2), ("kl_coef", float("nan")), ("payoff_prompts", 2.5), ("verdict_texts", 1.5),
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_named(tmp_path: Any, name: str, value: Any) -> None:
    """Some ended a run with a ZeroDivisionError, and some trained the contrary: a KL coefficient below 0 rewards distance."""
    with pytest.raises(HoEError, match=f"{name} is {value}; it must be") as caught:
        HoERouterConfig(str(tmp_path), use_cpu=True, **{name: value})
    assert caught.value.argument == name
