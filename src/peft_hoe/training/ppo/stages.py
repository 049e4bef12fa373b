"""The stages of an update: rollout -> score -> weigh -> advantages -> update, and what they are called with.

Shapes: B prompts on this process, T response positions, N objectives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ...errors import HoEError
from ...generation.decoding import Decoding
from ...generation.prompts import PromptBatch, PromptCollator, as_prompt_batch, prompt_rows
from ...generation.responses import generate_responses
from ...objectives.payoff import RewardNormalizer, measure_payoff
from ...objectives.weights import ObjectiveWeights
from ...preference import FloatArray
from ...rewards.sources import Rewards
from ..run.logged import weighing_metrics
from ..run.processes import mean_rewards, on_first_process, over_processes
from ..run.steered_policy import without_dropout
from ..run.trained_router import TrainedRouter
from .advantages import estimate_advantages, mix_advantages, place_rewards
from .logged import rollout_metrics, sample_table, scalar_metrics
from .rollouts import Rollout, evaluate_rollout
from .updates import LossSettings, Targets, update


class RouterStages:
    """The part of the trainer that makes one update; each stage can be called by itself."""

    args: Any
    accelerator: Any
    state: Any
    model: Any
    policy_model: Any
    optimizer: Any
    processing_class: Any
    data_collator: Any
    train_dataset: Any
    eval_dataset: Any
    train_dataset_len: int
    decoding: Decoding
    router: TrainedRouter
    rewards: Rewards
    weights: ObjectiveWeights
    normalizer: RewardNormalizer | None
    objectives: list[str]
    _critic: Any
    _reference: Any
    _experts: list[str]

    @property
    def _actor_critic(self) -> Any:
        """The actor and critic, out of the wrapper for several processes."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def _tokenizer(self) -> Any:
        return getattr(self.processing_class, "tokenizer", self.processing_class)

    def step(self) -> dict[str, float]:
        """One update; what there is to log about it."""
        prompts = self.next_prompts()
        rollout = self.rollout(prompts)
        raw = self.score(rollout)
        rewards = self.normalize(raw)
        weights = self.weigh(rewards)
        targets = self.advantages(rollout, rewards, weights)
        metrics = self.update(rollout, targets)
        metrics |= rollout_metrics(
            rollout, self.accelerator, self._experts, self.router.voting_experts, self._tokenizer.eos_token_id
        )
        raw_mean, mean = (mean_rewards(self.accelerator, each) for each in (raw, rewards))
        penalty = (self.args.missing_eos_penalty or 0.0) * (1 - metrics["completion/ended"])
        metrics |= scalar_metrics(mean, weights, metrics["objective/kl"], self.args.kl_coef, penalty)
        return metrics | weighing_metrics(self.objectives, raw_mean, mean, self.weights)

    def next_prompts(self) -> PromptBatch:
        """This process's prompts of the next update, as the update's number says."""
        args = self.args
        chosen = prompt_rows(
            self.train_dataset_len, self.state.global_step * args.batch_size, args.batch_size, args.seed
        )
        mine = chosen[self.accelerator.process_index :: self.accelerator.num_processes]
        return self._batch(self.train_dataset, mine)

    def _batch(self, dataset: Any, numbers: Sequence[int]) -> PromptBatch:
        rows, collate = [dataset[number] for number in numbers], self.data_collator
        batch = collate(rows, numbers) if type(collate) is PromptCollator else collate(rows)
        return as_prompt_batch(batch, self.processing_class, self.accelerator.device)

    def rollout(self, prompts: PromptBatch) -> Rollout:
        """Responses to prompts, with log-probabilities, reference and values."""
        args, chunk = self.args, self.args.local_rollout_forward_batch_size
        self.model.eval()
        with self._actor_critic.autocast():
            responses = generate_responses(self.policy_model, prompts, self.processing_class, self.decoding, chunk)
            return evaluate_rollout(self._actor_critic, prompts, responses, args.temperature, chunk, self._reference)

    def score(self, rollout: Rollout) -> FloatArray:
        """Raw rewards `(B, N)`, NaN where there is none.

        Raises:
            RewardError: a reward fails, or an objective has no number on any process; then all of them raise.
        """
        raw = self._score(rollout)
        known = over_processes(self.accelerator, [*(~np.isnan(raw)).sum(0), len(raw)])
        self.rewards.check_numbers(known[:-1], int(known[-1]))
        return raw

    def _score(self, rollout: Rollout) -> FloatArray:
        """As `score`, of this process alone: an objective may be without any number."""
        ids, mask = rollout.sequences(slice(None))
        return self.rewards(
            rollout.prompts.texts,
            rollout.responses.texts,
            rollout.prompts.columns,
            input_ids=ids if self.rewards.needs_tokens else None,
            attention_mask=mask if self.rewards.needs_tokens else None,
            allow_empty=True,
        )

    def normalize(self, raw: FloatArray) -> FloatArray:
        """Rewards `(B, N)` on the payoff table's scale."""
        if self.normalizer is None:
            raise HoEError("there is no normalizer yet: call train(), or set it to measure_payoff()")
        return self.normalizer.normalize(raw)

    def weigh(self, rewards: FloatArray) -> FloatArray:
        """The weights u `(N,)` after the mean over all processes of normalised rewards `(B, N)`."""
        return self.weights.update(mean_rewards(self.accelerator, rewards))

    def advantages(self, rollout: Rollout, rewards: FloatArray, weights: FloatArray) -> Targets:
        """Mixed advantages and returns from normalised rewards `(B, N)` and weights `(N,)`."""
        args, mask = self.args, rollout.responses.mask
        scores = torch.as_tensor(rewards, dtype=torch.float32, device=mask.device)
        known = ~scores.isnan()
        if args.missing_eos_penalty is not None:
            scores = scores - args.missing_eos_penalty * (~rollout.responses.ended).float().unsqueeze(1)
        each, returns = estimate_advantages(
            place_rewards(scores, mask), rollout.values, mask, gamma=args.gamma, lam=args.lam
        )
        mixed = mix_advantages(
            each,
            torch.as_tensor(weights, dtype=torch.float32, device=mask.device),
            mask,
            scaling=args.advantage_scaling,
            scored=known,
            reduce=lambda tensor: self.accelerator.reduce(tensor, reduction="sum"),
        )
        return Targets(mixed, returns, known)

    def update(self, rollout: Rollout, targets: Targets) -> dict[str, float]:
        """PPO epochs over the rollout."""
        args = self.args
        self.model.train()
        without_dropout(self.policy_model)
        return update(
            self.model,
            self.accelerator,
            self.optimizer,
            rollout,
            targets,
            LossSettings(args.temperature, args.cliprange, args.cliprange_value, args.vf_coef, args.kl_coef),
            epochs=args.num_ppo_epochs,
            mini_batch=args.local_mini_batch_size,
            micro_batch=args.per_device_train_batch_size,
            clip=(self.router, self._critic),
            max_grad_norm=args.max_grad_norm,
        )

    def measure_payoff(self) -> RewardNormalizer:
        """The payoff table at this run's decoding, on evaluation prompts where there are any, else on training prompts.

        The first process measures, so that all hold the same table, whatever their rewards are.
        """
        return on_first_process(self.accelerator, self._measure_payoff)

    def _measure_payoff(self) -> RewardNormalizer:
        args = self.args
        source = self.train_dataset if self.eval_dataset is None else self.eval_dataset
        prompts = self._batch(source, range(min(len(source), args.payoff_prompts)))
        return measure_payoff(
            self.policy_model,
            self.router.adapter,
            prompts,
            self.rewards,
            processing_class=self.processing_class,
            decoding=self.decoding,
            batch_size=args.local_rollout_forward_batch_size,
            seed=args.seed,
            bf16=bool(args.bf16),
        )

    def generate_completions(self, sampling: bool = False) -> None:
        """Print greedy responses to the first prompts of the evaluation set, with their rewards."""
        main = self.accelerator.is_main_process
        if self.eval_dataset is None or not (main or self.args.shard_policy):  # shards are gathered by all together
            return
        count = min(len(self.eval_dataset), self.args.per_device_eval_batch_size)
        prompts = self._batch(self.eval_dataset, range(count))
        self.model.eval()
        greedy = replace(self.decoding, do_sample=False, temperature=1.0)
        responses = generate_responses(self.policy_model, prompts, self.processing_class, greedy, count)
        if not main:
            return
        empty = torch.empty(0)
        scored = self._score(Rollout(prompts, responses, empty, empty, empty, empty, None))
        sample_table(prompts, responses, scored, self.objectives)
