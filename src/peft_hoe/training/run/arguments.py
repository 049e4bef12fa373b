"""The fields that the configurations of all trainers of routers share.

Mixins before a configuration of TRL or transformers: their defaults win over the other's.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch

from ...errors import HoEError, check_choice
from .refused_arguments import REFUSED_BY_ALL, refuse_changed


@dataclass
class RouterArguments:
    """Which router trains, and how.

    Args:
        router: its name; None for the only one.
        model_adapter_name: the HoE adapter; None for the first active one.
        learning_rate: of the router. One step of Adam moves a logit by about the rate times the width of the module's input, so
            a good start is 2 / hidden size; the default suits large models.
        average_routers: save the mean of the router's weights over all updates in place of the last.
        save_on_interrupt: whether SIGINT (Ctrl-C) ends the update under way, writes a checkpoint and stops; a second one
            interrupts at once.

    By default every update is logged, and there is no gradient checkpointing and no bf16.
    """

    learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the router."})
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
        reward_timeout: seconds that one source of rewards may take for a batch; None for ever. A `Rewards` keeps its own.
    """

    mu: float = field(default=0.1, metadata={"help": "Temperature of the weights of objectives."})
    step: float | None = field(default=None, metadata={"help": "Step of the weights; default beta / mu."})
    weighting: str = field(default="saddle", metadata={"help": "saddle or paper."})
    reference_point: float = field(default=1.05, metadata={"help": "Reference point z* in normalised rewards."})
    payoff_prompts: int = field(default=128, metadata={"help": "Prompts that the payoff table is measured on."})
    reward_timeout: float | None = field(
        default=None, metadata={"help": "Seconds that one source of rewards may take for a batch; default for ever."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        check_choice("weighting", self.weighting, ("saddle", "paper"))
        if self.payoff_prompts < 1:
            raise HoEError(
                f"payoff_prompts is {self.payoff_prompts}; at least 1 prompt is needed",
                argument="payoff_prompts", value=self.payoff_prompts, allowed="at least 1",
            )  # fmt: skip
        if self.reward_timeout is not None and not self.reward_timeout > 0:
            raise HoEError(
                f"reward_timeout is {self.reward_timeout}; give seconds above 0, or None to wait for ever",
                argument="reward_timeout", value=self.reward_timeout, allowed="above 0",
            )  # fmt: skip


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
