"""HoERouterConfig: PPOConfig, TRL's or the same fields without it, and what the training of a router adds to it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers import SchedulerType

from ...errors import HoEError, check_choice
from ...generation.decoding import Decoding
from ..run.arguments import ObjectiveArguments, RouterArguments
from ..run.bounds import check_range, check_whole
from ..run.refused_arguments import refuse_changed
from ..trl_versions import trl_ppo
from .advantages import BASELINES, SCALINGS
from .refused_arguments import REFUSED

if TYPE_CHECKING or trl_ppo() is None:
    from .ppo_fields import PPOFields as PPOConfig
else:
    from trl.experimental.ppo import PPOConfig

_LEAST = {
    "total_episodes": 1, "num_ppo_epochs": 1, "num_mini_batches": 1, "local_rollout_forward_batch_size": 1,
    "num_sample_generations": 0,
}  # fmt: skip
_LIMITS = {
    "gamma": (0, 1), "lam": (0, 1), "cliprange": (0, math.inf), "cliprange_value": (0, math.inf), "vf_coef": (0, math.inf),
    "kl_coef": (0, math.inf), "value_learning_rate": (0, math.inf),
}  # fmt: skip


@dataclass
class HoERouterConfig(ObjectiveArguments, RouterArguments, PPOConfig):  # type: ignore[misc]
    """Configuration of `HoERouterTrainer`; what PPOConfig has means the same here, with the exceptions below.

    With TRL 1.9 to 1.12 it is a PPOConfig of TRL; with another one, or without, it has the same fields and defaults.

    Args:
        beta: β, how fast the weights of objectives forget.
        advantage_scaling: "joint", "objective" or "none", see `mix_advantages`.
        num_generations: responses to each prompt of an update.
        baseline: what a response must do better than: "critic", the mixed GAE advantage of N value heads, or "group", the mean
            of the other responses to its prompt (leave-one-out), the same for all its tokens; `num_generations` is above 1.
        kl_reference: "base" (adapter off) or "static" (the interpolation that an untrained router gives). With `kl_coef` 0, the
            default, no reference is computed, and no divergence from it is logged.
        value_learning_rate: of the critic; None for 1e-3 with the heads that are made here, and for `learning_rate` with a
            `value_model`, as in PPOTrainer. A rate that suits a router is too high for a whole model: state one for it.
        top_k: responses are drawn from so many most likely tokens; 0 for the whole vocabulary. Their probabilities in the loss
            are those of the whole vocabulary, as in GRPO.
        top_p: likewise from the most likely tokens of so much probability; 1 for the whole vocabulary.
        stop_strings: texts that end a response, which is counted up to and including the token that completes one, and scored
            without it, see `Decoding`. With `stop_token="eos"` a response also ends at the tokenizer's end of text and at what
            the policy's `generation_config` stops at; with neither that nor `stop_token_id` at no token.
        chat_template_kwargs: arguments of the tokenizer's chat template, as in GRPOConfig; also as JSON.
        shard_policy: whether each process holds only a share of the frozen policy's weights, see `sharding.shard`.

    The rest of what is new is in `RouterArguments` and `ObjectiveArguments`. `kl_estimator` is "k3", because the KL divergence
    is a term of the loss, not of the rewards. Other defaults than PPOConfig's, as they were measured: one epoch, no KL term,
    `lam` 1, temperature 1.

    >>> from peft_hoe import HoERouterConfig
    >>> args = HoERouterConfig(output_dir="run", router="r0", max_steps=1, use_cpu=True, bf16=False)
    >>> args.kl_reference, args.num_ppo_epochs
    ('base', 1)
    """

    num_ppo_epochs: int = field(default=1, metadata={"help": "Passes over the responses of an update."})
    kl_coef: float = field(default=0.0, metadata={"help": "Coefficient of the KL divergence."})
    lam: float = field(default=1.0, metadata={"help": "Trace decay of generalised advantage estimation."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of sampling."})
    kl_estimator: str = field(default="k3", metadata={"help": "Only k3: the divergence is a term of the loss."})  # type: ignore[assignment]

    beta: float = field(default=0.1, metadata={"help": "How fast the weights of objectives forget."})
    advantage_scaling: str = field(default="joint", metadata={"help": "joint, objective or none."})
    num_generations: int = field(default=1, metadata={"help": "Responses to each prompt of an update."})
    baseline: str = field(default="critic", metadata={"help": "critic or group."})
    kl_reference: str = field(default="base", metadata={"help": "base (adapter off) or static (untrained router)."})
    value_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the critic; default 1e-3 for heads, learning_rate for a value model."},
    )
    top_k: int = field(default=0, metadata={"help": "Draw from so many most likely tokens; default all."})
    top_p: float = field(default=1.0, metadata={"help": "Draw from the most likely tokens of so much probability."})
    stop_strings: list[str] | None = field(default=None, metadata={"help": "Texts that end a response."})
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of the chat template."}
    )
    shard_policy: bool = field(default=False, metadata={"help": "Shard the frozen policy over the processes."})

    def __post_init__(self) -> None:
        refuse_changed(self, REFUSED)
        check_whole(self, _LEAST)
        check_range(self, _LIMITS)
        super().__post_init__()
        check_choice("baseline", self.baseline, BASELINES)
        if self.num_generations < 1 + (self.baseline == "group"):
            raise HoEError(
                f"num_generations is {self.num_generations}, but baseline={self.baseline!r} needs at least "
                f"{1 + (self.baseline == 'group')} response{'s' * (self.baseline == 'group')} to a prompt",
                argument="num_generations",
                value=self.num_generations,
            )
        check_choice("kl_reference", self.kl_reference, ("base", "static"))
        if self.kl_reference != "base" and self.kl_coef == 0:
            raise HoEError(
                f"kl_reference is {self.kl_reference!r}, but kl_coef is 0, so that nothing is held to a reference; set kl_coef "
                "above 0, or leave kl_reference out",
                argument="kl_reference", value=self.kl_reference,
            )  # fmt: skip
        check_choice("advantage_scaling", self.advantage_scaling, SCALINGS)
        if self.kl_estimator != "k3":
            raise HoEError(
                f"kl_estimator is {self.kl_estimator!r}; the KL divergence is a loss term here, estimated by k3: leave it out",
                argument="kl_estimator", value=self.kl_estimator, allowed=("k3",),
            )  # fmt: skip
        schedule = SchedulerType(self.lr_scheduler_type).value
        if schedule in ("reduce_lr_on_plateau", "greedy"):
            raise HoEError(
                f"lr_scheduler_type is {schedule!r}, which follows a metric; updates follow a schedule",
                argument="lr_scheduler_type", value=schedule,
            )  # fmt: skip
        self.decoding()

    def decoding(self) -> Decoding:
        """How responses are sampled.

        Raises:
            HoEError: the length, the temperature or a stop string is none.
        """
        tokens = () if self.stop_token_id is None else (self.stop_token_id,)
        return Decoding(
            max_new_tokens=self.response_length,
            do_sample=True,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            stop_strings=self.stop_strings or (),  # type: ignore[arg-type]
            stop_tokens=None if self.stop_token == "eos" else tokens,
            chat_template_kwargs=self.chat_template_kwargs,  # type: ignore[arg-type]
        )
