"""HoERouterConfig: PPOConfig, and what the training of a router adds to it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from trl.experimental.ppo import PPOConfig

from ..errors import HoEError
from .advantages import SCALINGS


@dataclass
class HoERouterConfig(PPOConfig):  # type: ignore[misc]
    """Configuration of `HoERouterTrainer`; what PPOConfig has means the same here, with the exceptions below.

    Args:
        router: name of the router that trains; None for the only one.
        mu: μ, temperature of the weights of objectives: small follows the worst gap, large stays near the preference.
        beta: β, how fast the weights forget.
        step: α; None for β/μ, 0 for linear scalarisation with the router's preference.
        weighting: "saddle" or "paper", see `ObjectiveWeights`.
        reference_point: z*, in normalised rewards.
        advantage_scaling: "joint", "objective" or "none", see `mix_advantages`.
        kl_reference: "base" (adapter off) or "static" (the interpolation that an untrained router gives).
        average_routers: save the mean of the router's weights over all updates in place of the last.
        save_on_interrupt: whether SIGINT (Ctrl-C) ends the update under way, writes a checkpoint and stops; a second one
            interrupts at once.
        payoff_prompts: how many prompts measure what each objective's expert earns, for the normalisation of rewards.
        value_learning_rate: of the critic; None for `learning_rate`.
        shard_policy: whether each process holds only a share of the frozen policy's weights, see `sharding.shard`.

    Other defaults than PPOConfig's: `learning_rate` is for routers of large models. One step of Adam moves a logit by about the
    rate times the width of the module's input, so a good start is 2 / hidden size. Every update is logged;
    `kl_estimator` is "k3", because the KL divergence is a term of the loss, not of the rewards; no gradient checkpointing and
    no bf16 unless asked for.
    """

    learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the router."})
    logging_steps: float = field(default=1, metadata={"help": "Log every X updates."})
    gradient_checkpointing: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Recompute activations in the backward pass."}
    )
    bf16: bool | None = field(  # type: ignore[assignment]
        default=False, metadata={"help": "Whether to train in bfloat16 autocast."}
    )
    kl_estimator: str = field(default="k3", metadata={"help": "Only k3: the divergence is a term of the loss."})  # type: ignore[assignment]

    router: str | None = field(default=None, metadata={"help": "Name of the router that trains; default the only one."})
    mu: float = field(default=0.1, metadata={"help": "Temperature of the weights of objectives."})
    beta: float = field(default=0.1, metadata={"help": "How fast the weights of objectives forget."})
    step: float | None = field(default=None, metadata={"help": "Step of the weights; default beta / mu."})
    weighting: str = field(default="saddle", metadata={"help": "saddle or paper."})
    reference_point: float = field(default=1.05, metadata={"help": "Reference point z* in normalised rewards."})
    advantage_scaling: str = field(default="joint", metadata={"help": "joint, objective or none."})
    kl_reference: str = field(default="base", metadata={"help": "base (adapter off) or static (untrained router)."})
    average_routers: bool = field(default=False, metadata={"help": "Save the mean of the router over all updates."})
    save_on_interrupt: bool = field(default=True, metadata={"help": "Whether SIGINT saves a checkpoint and stops."})
    payoff_prompts: int = field(default=128, metadata={"help": "Prompts that the payoff table is measured on."})
    value_learning_rate: float | None = field(
        default=1e-3, metadata={"help": "Learning rate of the critic; None for learning_rate."}
    )
    shard_policy: bool = field(default=False, metadata={"help": "Shard the frozen policy over the processes."})

    def __post_init__(self) -> None:
        _check_launch(self.deepspeed, self.fsdp)  # first: transformers would start what is refused
        super().__post_init__()
        _check_choice("kl_reference", self.kl_reference, ("base", "static"))
        _check_choice("advantage_scaling", self.advantage_scaling, SCALINGS)
        _check_choice("weighting", self.weighting, ("saddle", "paper"))
        if self.kl_estimator != "k3":
            raise HoEError(
                f"kl_estimator is {self.kl_estimator!r}; the KL divergence is a loss term here, estimated by k3: leave it out"
            )
        if self.whiten_rewards:
            raise HoEError(
                "whiten_rewards=True would undo the payoff table's scale; leave it out, and see advantage_scaling"
            )
        if self.fp16:
            raise HoEError("fp16=True is not supported: there is no loss scaling here; use bf16=True")
        if self.payoff_prompts < 1:
            raise HoEError(f"payoff_prompts is {self.payoff_prompts}; at least 1 prompt is needed")
        if not self.temperature > 0:
            raise HoEError(f"temperature is {self.temperature}; it must be above 0")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise HoEError(f"{name} is {value!r}; use one of {', '.join(choices)}")


def _check_launch(deepspeed: Any, fsdp: Any) -> None:
    launched = {name: os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true" for name in ("DEEPSPEED", "FSDP")}
    if fsdp or launched["FSDP"]:
        raise HoEError(
            "accelerate's FSDP is not supported: it would shard the router and the critic too, which are read and written "
            "whole. Launch plain processes (distributed_type: MULTI_GPU) with HoERouterConfig(shard_policy=True), which "
            "shards the frozen policy with torch's FSDP"
        )
    if deepspeed or launched["DEEPSPEED"]:
        raise HoEError(
            "DeepSpeed is not supported: it takes over the optimizer step, and ZeRO-3 shards the router's weights, which are "
            "read and written whole. Launch plain processes (distributed_type: MULTI_GPU); for a policy that does not fit one "
            "GPU add HoERouterConfig(shard_policy=True)"
        )
