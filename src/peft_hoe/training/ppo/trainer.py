"""HoERouterTrainer: STCH-OMD with mixed advantages (paper section 3.4), on TRL's PPOTrainer.

Of TRL's trainer it keeps the constructor, accelerate, callbacks, logging and saving. Its `train`, one loop of 350 lines, is
replaced by the stages of `router_stages.py`.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, cast

from torch import nn
from trl.experimental.ppo import PPOTrainer
from trl.trainer.utils import disable_dropout_in_model

from ...errors import HoEError
from ...generation.prompts import PromptCollator, check_prompts
from ...objectives.payoff import RewardNormalizer
from ...rewards.sources import Rewards
from ..run.optimizer import critic_group, frozen
from ..run.steered_policy import hidden_size, steerable
from .actor_critic import ActorCritic
from .checkpoints import RouterCheckpoints
from .config import HoERouterConfig
from .critics import HEADS_LEARNING_RATE, ValueHeads, ValueModel
from .rollouts import base_reference, model_reference, static_reference
from .sharding import shard
from .stages import RouterStages


class HoERouterTrainer(RouterStages, RouterCheckpoints, PPOTrainer):  # type: ignore[misc]
    """Trains one router of a HoE adapter for its preference; everything else stays as it is, to the bit.

    Args:
        args: the configuration.
        processing_class: the policy's tokenizer, with a padding token.
        model: a PeftModel with a HoE adapter.
        ref_model: a reference for the KL term; None for `args.kl_reference`.
        reward_model: rewards of all objectives, see `Rewards`.
        train_dataset: rows with `prompt` (text or chat messages) or `input_ids`; other columns are passed to the rewards.
        value_model: a critic in TRL's form with 1 or N outputs; None for N heads on the policy's hidden state.
        data_collator: used as given; None for `PromptCollator`.
        eval_dataset: prompts of the sample table and, where there is no `normalizer`, of the payoff table.
        optimizers: optimizer and scheduler; the optimizer's settings are used, what it held is replaced.
        callbacks: as in transformers.
        peft_config: a HoEConfig, to make the adapter here.
        normalizer: the scale of the rewards; None to measure it before the first update.

    Raises:
        HoEError: rewards, router, dataset or model do not fit together.
    """

    def __init__(
        self,
        args: HoERouterConfig,
        processing_class: Any,
        model: Any,
        ref_model: Any = None,
        reward_model: Any = None,
        train_dataset: Any = None,
        value_model: Any = None,
        data_collator: Any = None,
        eval_dataset: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        callbacks: list[Any] | None = None,
        peft_config: Any = None,
        *,
        normalizer: RewardNormalizer | None = None,
    ) -> None:
        if not isinstance(args, HoERouterConfig):
            raise HoEError(f"args is a {type(args).__name__}; use HoERouterConfig, which extends PPOConfig")
        if train_dataset is None or reward_model is None:
            raise HoEError("train_dataset and reward_model are required")
        policy = steerable(model, peft_config)
        if args.shard_policy:  # before anything holds on to the weights that are given up
            shard(policy, args.device)
        self._choose_router(policy, args)
        self.decoding = args.decoding().resolved(
            policy, processing_class
        )  # before TRL writes into the policy's settings
        self.rewards = Rewards.of(reward_model, self.objectives, timeout=args.reward_timeout)
        if data_collator is None:
            check_prompts(train_dataset, processing_class)
            data_collator = PromptCollator(processing_class)
        self._critic: ValueHeads | ValueModel = (
            ValueHeads(hidden_size(policy), len(self.objectives))
            if value_model is None
            else ValueModel(value_model, len(self.objectives))
        )
        with self.model_settings.applied(), frozen(policy):
            super().__init__(
                args=args,
                processing_class=processing_class,
                model=policy,
                ref_model=ref_model,
                reward_model=cast(Any, nn.ModuleList(self.rewards.modules())),
                train_dataset=train_dataset,
                value_model=cast(Any, _NoCritic()),
                data_collator=data_collator,
                eval_dataset=eval_dataset,
                optimizers=optimizers,
                callbacks=callbacks,
            )
        self.value_model: Any = None if value_model is None else self._critic
        disable_dropout_in_model(self._critic)  # TRL does so for the stand-in that it was given
        self.normalizer = normalizer
        self.weights = self._objective_weights(args, args.beta)
        self._reference = self._make_reference(ref_model)

    # -- what TRL's constructor calls ---

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        """Put actor and critic into TRL's place for them, and make an optimizer of what trains in it."""
        if self.args.max_steps > 0:
            self.args.num_total_batches = num_training_steps = self.args.max_steps
        if self.args.num_sample_generations > 0:  # TRL has counted before max_steps was applied
            self.sample_generations_freq = max(1, self.args.num_total_batches // self.args.num_sample_generations)
        self.model = ActorCritic(
            self.policy, self.router, self._critic, bf16=bool(self.args.bf16), sharded=self.args.shard_policy
        )
        self.model.config = self.policy.config
        super().create_optimizer_and_scheduler(num_training_steps)

    def _parameter_groups(self) -> list[dict[str, Any]]:
        rate = self.args.value_learning_rate
        if rate is None and isinstance(self._critic, ValueHeads):
            rate = HEADS_LEARNING_RATE
        return [*super()._parameter_groups(), critic_group(self._critic, rate)]

    def _make_reference(self, ref_model: Any) -> Any:
        if ref_model is not None:
            return model_reference(self.ref_model)
        make = {"base": base_reference, "static": static_reference}[self.args.kl_reference]
        return make(self._actor_critic)

    # -- training ---

    def _train(self, folder: Path | None, **others: Any) -> None:
        self._begin(folder)
        self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
        while self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            self.control = self.callback_handler.on_step_begin(self.args, self.state, self.control)
            started = time.monotonic()
            metrics = self.step()
            metrics["eps"] = self.args.batch_size / (time.monotonic() - started)
            self._finish_step(metrics)
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)

    def _begin(self, folder: Path | None) -> None:
        """Fresh state, or a checkpoint's; and the scale of the rewards."""
        args, state = self.args, self.state
        state.global_step, state.episode, state.epoch = 0, 0, 0.0
        state.max_steps = args.num_total_batches
        state.num_train_epochs = math.ceil(args.num_total_batches * args.batch_size / self.train_dataset_len)
        state.compute_steps(args, state.max_steps)
        self.control.should_training_stop = False
        self.optimizer.zero_grad()  # of a run that failed in its first update
        if folder is not None:
            self._resume(folder)
        if self.normalizer is None:
            self.normalizer = self.measure_payoff()
        else:
            self.normalizer.check_objectives(self.objectives)

    def _finish_step(self, metrics: dict[str, float]) -> None:
        """Count, log, save, and stop where someone asked for it."""
        args, state = self.args, self.state
        state.global_step += 1
        state.episode += args.batch_size
        state.epoch = state.episode / self.train_dataset_len
        metrics |= {"lr": self.lr_scheduler.get_last_lr()[0], "episode": state.episode}
        self.lr_scheduler.step()
        self.control = self.callback_handler.on_step_end(args, state, self.control)
        self._step_ended()
        if self.control.should_log:
            self.log(metrics)
        if self.control.should_save:
            self._save_checkpoint(self.model, trial=None)
            self.control = self.callback_handler.on_save(args, state, self.control)
        if args.num_sample_generations > 0 and (state.global_step - 1) % self.sample_generations_freq == 0:
            self.generate_completions(sampling=True)


class _NoCritic(nn.Module):
    """What TRL's constructor looks for in a value model; `ActorCritic` replaces it before it is used."""

    base_model_prefix = "backbone"

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Identity()
