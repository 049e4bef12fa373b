"""The fields of TRL's PPOConfig over transformers' TrainingArguments, for the TRLs that have no PPOConfig."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import TrainingArguments


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class PPOFields(TrainingArguments):
    """Names, types and defaults of PPOConfig in TRL 1.12, and what they mean there.

    Some are not read by HoERouterTrainer: they are there so that a script's arguments are understood on every TRL.
    """

    learning_rate: float = _setting(3e-6, "Initial learning rate.")
    logging_steps: float = _setting(10, "Log every X updates.")
    gradient_checkpointing: bool = _setting(True, "Recompute activations in the backward pass.")
    bf16: bool | None = _setting(None, "Whether to train in bfloat16 autocast.")  # type: ignore[assignment]
    push_to_hub: bool = _setting(False, "Whether to push the adapter to the Hub after training.")

    # How much, and in which portions. What is None is counted out from the others.
    total_episodes: int | None = _setting(None, "Responses to train on; default num_train_epochs times the dataset.")
    num_mini_batches: int = _setting(1, "Optimizer steps that a batch is divided into.")
    num_ppo_epochs: int = _setting(4, "Passes over the responses of an update.")
    local_rollout_forward_batch_size: int = _setting(64, "Rows of a forward without gradients, on each process.")
    num_sample_generations: int = _setting(10, "How often samples are printed during training.")
    dataset_num_proc: int | None = _setting(None, "Processes that prepare the dataset.")
    world_size: int | None = _setting(None, "Processes; counted out.")
    num_total_batches: int | None = _setting(None, "Updates; counted out.")
    micro_batch_size: int | None = _setting(None, "Rows of a forward, over all processes; counted out.")
    local_batch_size: int | None = _setting(None, "Responses of an update on one process; counted out.")
    batch_size: int | None = _setting(None, "Responses of an update; counted out.")
    local_mini_batch_size: int | None = _setting(None, "Rows of an optimizer step on one process; counted out.")
    mini_batch_size: int | None = _setting(None, "Rows of an optimizer step; counted out.")

    # Responses.
    response_length: int = _setting(53, "Tokens of a response.")
    stop_token: Literal["eos"] | None = _setting(None, "eos ends a response at the tokenizer's end of text.")
    stop_token_id: int | None = _setting(None, "Another token that ends a response.")
    temperature: float = _setting(0.7, "Temperature of sampling.")
    missing_eos_penalty: float | None = _setting(None, "What a response without an end loses.")

    # Models.
    sft_model_path: str = _setting("EleutherAI/pythia-160m", "Path of the policy, for scripts.")
    reward_model_path: str = _setting("EleutherAI/pythia-160m", "Path of the reward model, for scripts.")
    model_adapter_name: str | None = _setting(None, "Name of the adapter that trains.")
    ref_adapter_name: str | None = _setting(None, "Name of the adapter that is the reference.")
    ds3_gather_for_generation: bool = _setting(True, "With DeepSpeed ZeRO-3, gather the weights for generation.")

    # The loss.
    whiten_rewards: bool = _setting(False, "Whether to whiten the rewards.")
    kl_coef: float = _setting(0.05, "Coefficient of the KL divergence.")
    kl_estimator: Literal["k1", "k3"] = _setting("k1", "Estimator of the KL divergence.")
    cliprange: float = _setting(0.2, "Clip range of the ratio.")
    vf_coef: float = _setting(0.1, "Coefficient of the value loss.")
    cliprange_value: float = _setting(0.2, "Clip range of the values.")
    gamma: float = _setting(1.0, "Discount factor.")
    lam: float = _setting(0.95, "Trace decay of generalised advantage estimation.")

    def __post_init__(self) -> None:
        self.bf16 = not self.fp16 if self.bf16 is None else self.bf16
        super().__post_init__()
