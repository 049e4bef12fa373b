"""The fields that the configurations of all trainers of routers share.

Mixins before a configuration of TRL or transformers: their defaults win over the other's.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import SchedulerType

from ...errors import HoEError, check_choice
from ...router_recipe import FORWARD, MOST_UPDATES, RESPONSES, UPDATES
from .bounds import check_range, check_whole
from .refused_arguments import REFUSED_BY_ALL, refuse_changed


@dataclass
class RouterArguments:
    """Which router trains, and how.

    Args:
        router: its name; None for the only one.
        model_adapter_name: the HoE adapter; None for the first active one.
        max_steps: updates; by default 60, unless `num_train_epochs` (or `total_episodes`) says how many.
        num_train_epochs: passes over the prompts.
        learning_rate: of the router; None for `router_recipe.learning_rate`, by the model's width and the router's kind.
        per_device_train_batch_size: rows of a forward.
        gradient_accumulation_steps: forwards of an update, 128 rows together by default.
        average_routers: save the mean of the router's weights over all updates in place of the last.
        save_on_interrupt: whether SIGINT (Ctrl-C) ends the update under way, writes a checkpoint and stops; a second one
            interrupts at once.

    By default every update is logged, and there is no gradient checkpointing and no bf16.
    """

    num_train_epochs: float | None = field(default=None, metadata={"help": "Passes over the prompts."})
    learning_rate: float | None = field(default=None, metadata={"help": "Of the router; default by the model's width."})
    per_device_train_batch_size: int = field(default=FORWARD, metadata={"help": "Rows of a forward."})
    gradient_accumulation_steps: int = field(default=RESPONSES // FORWARD, metadata={"help": "Forwards of an update."})
    logging_steps: float = field(default=1, metadata={"help": "Log every X updates."})
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Recompute activations in the backward pass."}
    )
    bf16: bool | None = field(default=False, metadata={"help": "Whether to train in bfloat16 autocast."})

    router: str | None = field(default=None, metadata={"help": "Name of the router that trains; default the only one."})
    model_adapter_name: str | None = field(default=None, metadata={"help": "The HoE adapter; default the active one."})
    average_routers: bool = field(default=False, metadata={"help": "Save the mean of the router over all updates."})
    save_on_interrupt: bool = field(default=True, metadata={"help": "Whether SIGINT saves a checkpoint and stops."})

    def __post_init__(self) -> None:
        settings: Any = self
        _check_launch(settings.deepspeed, settings.fsdp)  # first: transformers would start what is refused
        refuse_changed(self, REFUSED_BY_ALL)
        check_whole(
            self, {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1}
        )
        check_range(self, {"learning_rate": (0, math.inf), "num_train_epochs": (0, math.inf)})
        if not _is_counted(settings):
            settings.max_steps = UPDATES
        if settings.num_train_epochs is None:
            settings.num_train_epochs = 3.0  # transformers'; not read where updates are counted
        super().__post_init__()  # type: ignore[misc]
        if not torch.accelerator.is_available():  # torch would warn that there is nothing to pin memory for
            settings.dataloader_pin_memory = False


@dataclass
class ObjectiveArguments:
    """How the weights of objectives move (`ObjectiveWeights`) and what their rewards are scaled by.

    Args:
        mu: temperature μ of the weights.
        step: α; None for β/μ, 0 for linear scalarisation with the router's preference.
        weighting: "saddle" or "paper".
        reference_point: z*, in normalised rewards.
        payoff_prompts: how many prompts, drawn by `seed`, measure what each objective's expert earns, for the normalisation of
            rewards.
        auto_stop: whether training ends when the worst gap has stopped falling beyond its error, see `run/plateau.py`;
            `max_steps` is then a bound, 240 by default, and the learning rate is constant but for the last 10 updates.
        verdict_texts: after training, how many texts for each of as many prompts of `eval_dataset` say whether the router
            helps; one that does not is left untrained. 0 for no verdict.
        reward_timeout: seconds that one source of rewards may take for a batch; None for ever. A `Rewards` keeps its own.
    """

    mu: float = field(default=0.1, metadata={"help": "Temperature of the weights of objectives."})
    step: float | None = field(default=None, metadata={"help": "Step of the weights; default beta / mu."})
    weighting: str = field(default="saddle", metadata={"help": "saddle or paper."})
    reference_point: float = field(default=1.05, metadata={"help": "Reference point z* in normalised rewards."})
    payoff_prompts: int = field(default=128, metadata={"help": "Prompts that the payoff table is measured on."})
    auto_stop: bool = field(default=False, metadata={"help": "End when the worst gap has stopped falling."})
    verdict_texts: int = field(default=4, metadata={"help": "Texts for each prompt of the verdict; 0 for none."})
    reward_timeout: float | None = field(
        default=None, metadata={"help": "Seconds that one source of rewards may take for a batch; default for ever."}
    )

    def __post_init__(self) -> None:
        if self.auto_stop and not _is_counted(self):
            self.max_steps = MOST_UPDATES
        super().__post_init__()  # type: ignore[misc]
        if self.auto_stop:
            _check_schedule(self)
        check_choice("weighting", self.weighting, ("saddle", "paper"))
        check_whole(self, {"payoff_prompts": 1, "verdict_texts": 0})
        if self.reward_timeout is not None and not self.reward_timeout > 0:
            raise HoEError(
                f"reward_timeout is {self.reward_timeout}; give seconds above 0, or None to wait for ever",
                argument="reward_timeout", value=self.reward_timeout, allowed="above 0",
            )  # fmt: skip


def _is_counted(settings: Any) -> bool:
    """Whether a configuration says how many updates there are."""
    epochs, episodes = settings.num_train_epochs, getattr(settings, "total_episodes", None)
    return settings.max_steps >= 1 or epochs is not None or bool(episodes)


def _check_schedule(settings: Any) -> None:
    """See that a run that finds its own end is given no schedule, all of which need to know it."""
    schedule = SchedulerType(settings.lr_scheduler_type)
    others = {name: getattr(settings, name, None) for name in ("lr_scheduler_kwargs", "warmup_steps", "warmup_ratio")}
    given = {"lr_scheduler_type": None if schedule is SchedulerType.LINEAR else schedule.value, **others}
    for name, value in given.items():
        if value:
            raise HoEError(
                f"{name} is {value!r}, but with auto_stop=True the rate is constant and falls to 0 in the last updates, "
                f"whenever they come; leave {name} out, or auto_stop",
                argument=name,
                value=value,
            )


def _check_launch(deepspeed: Any, fsdp: Any) -> None:
    launched = {name: os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true" for name in ("DEEPSPEED", "FSDP")}
    if fsdp or launched["FSDP"]:
        raise HoEError(
            "accelerate's FSDP is not supported: it would shard the router and the critic too, which are read and written "
            "whole. Launch plain processes (distributed_type: MULTI_GPU); HoERouterConfig alone has shard_policy=True, which "
            "shards the frozen policy with torch's FSDP",
            argument="fsdp",
            value=fsdp or None,
        )
    if deepspeed or launched["DEEPSPEED"]:
        raise HoEError(
            "DeepSpeed is not supported: it takes over the optimizer step, and ZeRO-3 shards the router's weights, which are "
            "read and written whole. Launch plain processes (distributed_type: MULTI_GPU); for a policy that does not fit one "
            "GPU there is HoERouterConfig(shard_policy=True), with HoERouterTrainer only",
            argument="deepspeed",
            value=deepspeed,
        )
