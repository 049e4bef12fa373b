"""The Trainer around `RouterPPO`: its constructor, its loop over updates, logging and saving; no TRL."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from ...errors import HoEError
from ...generation.decoding import Decoding
from ...generation.prompt_rows import check_prompts, drawn_rows, prompt_rows
from ...generation.prompts import PromptBatch, PromptCollator, as_prompt_batch
from ...generation.settings import evaluating
from ...objectives.normalizer import RewardNormalizer
from ...rewards.sources import Rewards
from ...tuner.functional import use_preference
from ..run.checkpoints import finish_checkpoint, read_state, rng_state, set_rng_state, write_state
from ..run.optimizer import critic_group, follow_schedule, frozen
from ..run.router_trainer import RouterTrainer
from ..run.steered_policy import steerable, stop_dropout
from .actor_critic import ActorCritic
from .batches import check_countable, count_batches
from .config import HoERouterConfig
from .critics import HEADS_LEARNING_RATE, ValueHeads, make_critic
from .evaluation import evaluation_metrics, process_share
from .logged import sample_table
from .rollouts import make_reference
from .router_ppo import PPOSettings, RouterPPO
from .sharding import shard


class PPOShell(RouterTrainer):
    """HoERouterTrainer over transformers' Trainer; `TRLShell` has TRL's PPOTrainer between the two.

    Attributes:
        ppo: what makes the updates.
        policy_model: the policy, under PPOTrainer's name for it.
        value_model: the critic, where the user gave one.
    """

    # Trainer's, which are there once its constructor has run.
    model: Any
    lr_scheduler: Any
    train_dataset: Any
    eval_dataset: Any
    state: Any  # with `episode`, as PPOTrainer has it

    same_settings = (
        "seed",
        "average_routers",
        "advantage_scaling",
        "temperature",
        "response_length",
        "stop_token",
        "stop_token_id",
        "stop_strings",
        "chat_template_kwargs",
        "batch_size",
    )
    ppo: RouterPPO

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
        # Before a trainer writes into the policy's settings.
        decoding = args.decoding().resolved(policy, processing_class)
        rewards = Rewards.of(reward_model, self.objectives, timeout=args.reward_timeout)
        for dataset in (train_dataset, eval_dataset):
            check_countable(dataset)
        if data_collator is None:
            check_prompts(train_dataset, processing_class)
            data_collator = PromptCollator(processing_class, decoding.chat_template_kwargs)
        elif decoding.chat_template_kwargs:
            raise HoEError(
                f"chat_template_kwargs is {args.chat_template_kwargs!r}, but the data_collator makes tokens of chats itself; "
                "give them to it, or leave it out"
            )
        count_batches(args, len(train_dataset))
        critic = make_critic(policy, value_model, len(self.objectives))
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
        self.ppo = RouterPPO(
            self.training_state,
            self.model,
            self.optimizer,
            rewards,
            _settings(args, decoding),
            reference=make_reference(self.actor_critic, self.ref_model, args.kl_reference),
            tokenizer=getattr(processing_class, "tokenizer", processing_class),
            accelerator=self.accelerator,
        )

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

    # -- prompts ---

    def next_prompts(self) -> PromptBatch:
        """This process's prompts of the next update, as the update's number says."""
        args, size = self.args, len(self.train_dataset)
        chosen = prompt_rows(size, self.state.global_step * args.batch_size, args.batch_size, args.seed)
        mine = chosen[self.accelerator.process_index :: self.accelerator.num_processes]
        return self._prompts(self.train_dataset, mine)

    def _prompts(self, dataset: Any, numbers: Sequence[int]) -> PromptBatch:
        """The rows of these numbers."""
        rows, collate = [dataset[number] for number in numbers], self.data_collator
        batch = collate(rows, numbers) if type(collate) is PromptCollator else collate(rows)
        return as_prompt_batch(batch, self.processing_class, self.accelerator.device)

    def measure_payoff(self) -> RewardNormalizer:
        """The payoff table at this run's decoding, on evaluation prompts where there are any, else on training prompts."""
        source = self.train_dataset if self.eval_dataset is None else self.eval_dataset
        source = next(iter(source.values())) if isinstance(source, Mapping) else source
        drawn = drawn_rows(len(source), self.args.payoff_prompts, self.args.seed)
        return self.ppo.measure_payoff(self._prompts(source, drawn))

    def generate_completions(self, sampling: bool = False) -> None:
        """Print greedy responses to the first prompts of the evaluation set, with their rewards, at the router's preference.

        Args:
            sampling: PPOTrainer prints the first batch of the set, or all of it; here it makes no difference.
        """
        main = self.accelerator.is_main_process
        if self.eval_dataset is None or not (main or self.args.shard_policy):  # shards are gathered by all together
            return
        rows = next(iter(self.eval_dataset.values())) if isinstance(self.eval_dataset, Mapping) else self.eval_dataset
        prompts = self._prompts(rows, range(min(len(rows), self.args.per_device_eval_batch_size)))
        here = use_preference(self.policy, {self.router.adapter: self.router.preference.tolist()})
        with evaluating(self.policy), here:
            responses = self.ppo.respond(prompts, self.ppo.greedy)
        if main:
            sample_table(prompts, responses, self.ppo.score_responses(prompts, responses), self.objectives)

    # -- the loop ---

    def _train(self, folder: Path | None, **others: Any) -> None:
        self._begin(folder)
        self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
        self.control = self.callback_handler.on_epoch_begin(self.args, self.state, self.control)
        while self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            self.control = self.callback_handler.on_step_begin(self.args, self.state, self.control)
            started = time.monotonic()
            metrics = self.ppo.step(self.next_prompts())
            metrics["eps"] = self.args.batch_size / (time.monotonic() - started)
            self._finish_step(metrics)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            best = read_state(Path(self.state.best_model_checkpoint))
            self.training_state.load_router(best, self.accelerator.device)
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)

    def _begin(self, folder: Path | None) -> None:
        """Fresh state, or a checkpoint's; and the scale of the rewards."""
        args, state = self.args, self.state
        state.global_step, state.episode, state.epoch = 0, 0, 0.0
        state.max_steps = args.num_total_batches
        state.num_train_epochs = math.ceil(args.num_total_batches * args.batch_size / len(self.train_dataset))
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
        """Count, log, evaluate, save, and stop where someone asked for it."""
        args, state, size = self.args, self.state, len(self.train_dataset)
        epochs = state.episode // size
        self._count(state.global_step + 1)
        metrics |= {"lr": self.lr_scheduler.get_last_lr()[0], "episode": state.episode}
        self.lr_scheduler.step()
        self.control = self.callback_handler.on_step_end(args, state, self.control)
        self.update_ended()
        epoch_ended = state.episode // size > epochs or self.control.should_training_stop
        if epoch_ended:
            self.control = self.callback_handler.on_epoch_end(args, state, self.control)
        if self.control.should_log:
            self.log(metrics)
        if self.control.should_evaluate:
            best = self._determine_best_metric(metrics=self.evaluate(), trial=None)
            self.control.should_save = best if args.save_strategy == "best" else self.control.should_save
        if self.control.should_save:
            self._save_checkpoint(self.model, trial=None)
            self.control = self.callback_handler.on_save(args, state, self.control)
        if epoch_ended and not self.control.should_training_stop:
            self.control = self.callback_handler.on_epoch_begin(args, state, self.control)
        every = max(1, args.num_total_batches // max(1, args.num_sample_generations))
        if args.num_sample_generations > 0 and (state.global_step - 1) % every == 0:
            self.generate_completions(sampling=True)

    def _count(self, updates: int) -> None:
        """So many updates are made."""
        self.state.global_step = updates
        self.state.episode = updates * self.args.batch_size
        self.state.epoch = self.state.episode / len(self.train_dataset)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """What responses to evaluation prompts earn, see `evaluation_metrics`; logged, and given to callbacks.

        Args:
            eval_dataset: rows with `prompt` or `input_ids`, or several of them by name; None for the constructor's.
            ignore_keys: of a model's output; there is none here.
            metric_key_prefix: before each name.

        Raises:
            HoEError: there is no evaluation dataset.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise HoEError("there is nothing to evaluate on; give eval_dataset to the trainer or to evaluate()")
        named = dataset if isinstance(dataset, Mapping) else {"": dataset}
        found: dict[str, float] = {}
        with self.model_settings.applied():
            if self.normalizer is None:
                self.normalizer = self.measure_payoff()
            for name, rows in named.items():
                mine, counted = process_share(len(rows), self.accelerator.process_index, self.accelerator.num_processes)
                metrics = evaluation_metrics(self.ppo, self._prompts(rows, mine), counted)
                prefix = f"{metric_key_prefix}_{name}_" if name else f"{metric_key_prefix}_"
                found |= {f"{prefix}{key}": value for key, value in metrics.items()}
        self.log(found)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    # -- saving and resuming ---

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter, its router trained, to `output_dir` (default `args.output_dir`)."""
        if not self.args.should_save:
            return  # transformers 5.23 asks for an attribute that PPOTrainer does not set
        wrapped, self.model = self.model, self.policy
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            self.model = wrapped

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write `checkpoint-<update>`: whole, or not at all."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        unfinished = folder.with_name(f"unfinished-{folder.name}")
        state = self._run_state()
        self.save_model(str(unfinished), _internal_call=True)
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(folder)
        if self.accelerator.is_main_process:
            write_state(unfinished, state)
            self.state.save_to_json(str(unfinished / "trainer_state.json"))
            finish_checkpoint(unfinished, folder, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def _run_state(self) -> dict[str, Any]:
        scheduler, rng = self.lr_scheduler.state_dict(), gather_object([rng_state()])
        return super()._run_state() | self.ppo.state_dict() | {"scheduler": scheduler, "rng": rng}

    def _resume(self, folder: Path) -> None:
        """Continue from a checkpoint."""
        saved = read_state(folder)
        self._check_settings(saved, folder)
        self.ppo.load_state_dict(saved)
        self.lr_scheduler.load_state_dict(saved["scheduler"])
        follow_schedule(self.lr_scheduler)
        progress = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        self._count(progress["global_step"])
        self.state.log_history = progress["log_history"]
        set_rng_state(saved["rng"][self.accelerator.process_index])


def _settings(args: HoERouterConfig, decoding: Decoding) -> PPOSettings:
    """What of the configuration concerns an update."""
    return PPOSettings(
        decoding=decoding,
        missing_eos_penalty=args.missing_eos_penalty,
        gamma=args.gamma,
        lam=args.lam,
        advantage_scaling=args.advantage_scaling,
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
