"""The Trainer around `RouterPPO`, without TRL: what its constructor makes; `UpdateLoop` is the rest."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import enable_full_determinism
from transformers.utils import logging

from ...errors import HoEError
from ...generation.decoding import Decoding
from ...generation.prompt_rows import check_evaluation_rows, check_prompts
from ...generation.prompts import PromptCollator
from ...generation.vocabulary import tokenizer_of
from ...objectives.normalizer import RewardNormalizer
from ...rewards.sources import Rewards
from ..run.optimizer import critic_group, frozen
from ..run.refused_arguments import check_given
from ..run.steered_policy import check_reference, steerable, stop_dropout
from .actor_critic import ActorCritic
from .batches import check_countable, count_batches
from .config import HoERouterConfig
from .critics import HEADS_LEARNING_RATE, ValueHeads, check_apart, check_used, make_critic
from .references import make_reference, used_ref_model
from .router_ppo import RouterPPO
from .settings import PPOSettings
from .sharding import shard
from .update_loop import UpdateLoop


class PPOShell(UpdateLoop):
    """HoERouterTrainer over transformers' Trainer; `TRLShell` has TRL's PPOTrainer between the two.

    Attributes:
        policy_model: the policy, under PPOTrainer's name for it.
        value_model: the critic, where the user gave one.
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
            raise HoEError(
                f"args is a {type(args).__name__}; use HoERouterConfig, which extends PPOConfig", argument="args"
            )
        check_given(train_dataset=train_dataset, reward_model=reward_model, processing_class=processing_class)
        args = copy.copy(args)  # sizes and numbers are counted out in it
        policy = steerable(model, peft_config)
        check_reference(ref_model, policy)
        ref_model = used_ref_model(ref_model, args.kl_coef, args.kl_reference)
        if args.shard_policy:  # before anything holds on to the weights that are given up
            shard(policy, args.device)
        self._choose_router(policy, args)
        # Before a trainer writes into the policy's settings.
        decoding = args.decoding().resolved(policy, processing_class)
        rewards = Rewards.of(reward_model, self.objectives, timeout=args.reward_timeout)
        for dataset in (train_dataset, eval_dataset):
            check_countable(dataset)
        check_evaluation_rows(eval_dataset)
        data_collator = _collator(data_collator, train_dataset, processing_class, decoding)
        count_batches(args, len(train_dataset))
        logging.set_verbosity(args.get_process_log_level())  # this and the next PPOTrainer leaves out
        if args.full_determinism:
            enable_full_determinism(args.seed)
        check_used(value_model, args.baseline)
        critic = make_critic(policy, value_model, len(self.objectives))
        check_apart(critic, {"policy": [policy], "reference": [ref_model], "reward model": rewards.modules()})
        self.actor_critic = ActorCritic(policy, self.router, critic, bf16=bool(args.bf16), sharded=args.shard_policy)
        with self.model_settings.applied(), frozen(policy):
            for module in (policy, ref_model, critic):
                stop_dropout(module)
            self._construct_trainer(
                ref_model,
                rewards,
                args=args,
                processing_class=processing_class,
                train_dataset=train_dataset,
                data_collator=data_collator,
                eval_dataset=eval_dataset,
                optimizers=optimizers,
                callbacks=callbacks,
            )
        self.policy_model = policy
        self.value_model: Any = None if value_model is None else critic
        self._weigh_objectives(args, args.beta)
        self.normalizer = normalizer
        self.ppo = self._make_ppo(rewards, decoding)

    # -- what is made with the trainer below ---

    def _construct_trainer(self, ref_model: Any, rewards: Rewards, **shared: Any) -> None:
        """The constructor of the trainer below, and what it leaves to us: optimizer and schedule, devices, the seed."""
        super().__init__(model=self.policy, **shared)
        args, handler = self.args, self.callback_handler
        self.create_optimizer_and_scheduler(args.num_total_batches)
        handler.model, handler.optimizer, handler.lr_scheduler = self.model, self.optimizer, self.lr_scheduler
        self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        rewards.to(self.accelerator.device)
        self.ref_model = None if ref_model is None else ref_model.to(self.accelerator.device)
        self.local_seed = args.seed + self.accelerator.process_index * 100_003  # as PPOTrainer's
        torch.manual_seed(self.local_seed)

    def _make_ppo(self, rewards: Rewards, decoding: Decoding) -> RouterPPO:
        """The part that makes the updates, of what the trainer below has prepared."""
        args = self.args
        # Without a KL term a pass of the reference would be for the log alone; TRL's GRPO and RLOO leave it out too.
        reference = make_reference(self.actor_critic, self.ref_model, args.kl_reference) if args.kl_coef > 0 else None
        return RouterPPO(
            self.training_state,
            self.model,
            self.optimizer,
            rewards,
            _settings(args, decoding),
            reference=reference,
            tokenizer=tokenizer_of(self.processing_class),
            accelerator=self.accelerator,
        )

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        """Put actor and critic into the place of the model, and make an optimizer of what trains in it."""
        self.model = self.actor_critic
        self.model.config = self.policy.config
        super().create_optimizer_and_scheduler(num_training_steps)

    def _parameter_groups(self) -> list[dict[str, Any]]:
        critic, rate = self.actor_critic.critic, self.args.value_learning_rate
        if rate is None and isinstance(critic, ValueHeads):
            rate = HEADS_LEARNING_RATE
        return [*super()._parameter_groups(), critic_group(critic, rate)]


def _collator(given: Any, train_dataset: Any, processing_class: Any, decoding: Decoding) -> Any:
    """The user's collator as it is, or ours.

    Raises:
        HoEError: there are no prompts; or arguments of the chat template, which a user's collator does not get.
    """
    if given is None:
        check_prompts(train_dataset, processing_class)
        return PromptCollator(processing_class, decoding.chat_template_kwargs)
    if decoding.chat_template_kwargs:
        raise HoEError(
            f"chat_template_kwargs is {decoding.chat_template_kwargs!r}, but the data_collator makes tokens of chats itself; "
            "give them to it, or leave it out",
            argument="chat_template_kwargs",
            value=decoding.chat_template_kwargs,
        )
    return given


def _settings(args: HoERouterConfig, decoding: Decoding) -> PPOSettings:
    """What of the configuration concerns an update."""
    return PPOSettings(
        decoding=decoding,
        missing_eos_penalty=args.missing_eos_penalty,
        gamma=args.gamma,
        lam=args.lam,
        advantage_scaling=args.advantage_scaling,
        group=args.num_generations if args.baseline == "group" else None,
        cliprange=args.cliprange,
        cliprange_value=args.cliprange_value,
        vf_coef=args.vf_coef,
        kl_coef=args.kl_coef,
        num_ppo_epochs=args.num_ppo_epochs,
        mini_batch=args.local_mini_batch_size or args.per_device_train_batch_size,
        micro_batch=args.per_device_train_batch_size,
        rollout_batch=args.local_rollout_forward_batch_size,
        max_grad_norm=args.max_grad_norm,
        seed=args.seed,
    )
