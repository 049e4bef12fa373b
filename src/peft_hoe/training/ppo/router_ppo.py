"""PPO of one router for several objectives: rollout -> score -> normalise -> weigh -> advantages -> update.

Needs neither TRL nor a Trainer: a policy, its router and a critic, what accelerate made of them, rewards, and settings.

Shapes: B prompts on this process, T response positions, N objectives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ...errors import HoEError
from ...generation.decoding import Decoding
from ...generation.prompts import PromptBatch
from ...generation.responses import Responses, generate_responses
from ...objectives.normalizer import RewardNormalizer
from ...objectives.payoff import measure_payoff
from ...objectives.weights import ObjectiveWeights
from ...preference import FloatArray
from ...rewards.sources import Rewards
from ..run.logged import weighing_metrics
from ..run.processes import mean_rewards, on_first_process, over_processes
from ..run.steered_policy import without_dropout
from ..run.training_state import RouterTrainingState
from .actor_critic import ActorCritic
from .advantages import estimate_advantages, leave_one_out, mix_advantages, place_rewards
from .logged import rollout_metrics, scalar_metrics
from .references import Reference
from .rollouts import Rollout, evaluate_rollout, have_end
from .settings import PPOSettings
from .updates import Targets, update


class RouterPPO:
    """Updates of one router; `step(prompts)` makes one, and each of its stages can be called by itself.

    Args:
        state: the policy, the router, the weights of the objectives and, once it is known, the scale of the rewards.
        model: an `ActorCritic` of them as accelerate prepared it.
        optimizer: holds the router's and the critic's Parameters.
        rewards: of the N objectives.
        settings: of the updates.
        reference: the KL reference, whose divergence is measured and logged; None for none, where `settings.kl_coef` is 0.
        tokenizer: the policy's.
        accelerator: accelerate's.

    Raises:
        HoEError: there are no weights of objectives, or a KL term without a reference.
    """

    def __init__(
        self,
        state: RouterTrainingState,
        model: Any,
        optimizer: Any,
        rewards: Rewards,
        settings: PPOSettings,
        *,
        reference: Reference | None,
        tokenizer: Any,
        accelerator: Any,
    ) -> None:
        if state.weights is None:
            raise HoEError(
                "the state has no weights of objectives; set state.weights to ObjectiveWeights(...)", argument="state"
            )
        if reference is None and settings.kl_coef > 0:
            raise HoEError(
                f"kl_coef is {settings.kl_coef}, but there is no reference; give make_reference(...), or set kl_coef to 0",
                argument="reference",
            )
        self.state, self.model, self.optimizer = state, model, optimizer
        self.rewards, self.settings, self.reference = rewards, settings, reference
        self.tokenizer, self.accelerator = tokenizer, accelerator
        self.actor_critic: ActorCritic = accelerator.unwrap_model(model)
        self.policy, self.router, self.critic = state.policy, state.router, self.actor_critic.critic
        self.weights: ObjectiveWeights = state.weights

    def step(self, prompts: PromptBatch) -> dict[str, float]:
        """One update; what there is to log about it."""
        rollout = self.rollout(prompts, keep=self._starts_with_the_rollout(len(prompts.ids)))
        raw = self.score(rollout)
        rewards = self.normalize(raw)
        weights = self.weigh(rewards)
        targets = self.advantages(rollout, rewards, weights)
        metrics = self.update(rollout, targets)
        return metrics | self._metrics(rollout, raw, rewards, weights)

    # -- the stages ---

    def rollout(self, prompts: PromptBatch, *, keep: bool = False) -> Rollout:
        """Responses to prompts, with log-probabilities, values, and those of the reference where there is one.

        `keep` is `evaluate_rollout`'s: the update that follows then starts from this forward, and nothing may change between.
        """
        settings = self.settings
        self.model.eval()
        with self.actor_critic.autocast():
            responses = self.respond(prompts, settings.decoding)
            return evaluate_rollout(
                self.actor_critic,
                prompts,
                responses,
                settings.decoding.temperature,
                settings.rollout_batch,
                self.reference,
                keep=keep,
            )

    def _starts_with_the_rollout(self, rows: int) -> bool:
        """Whether the first forward of an update is the one that evaluates the rollout, so that it need not be made twice.

        It is where one step has all rows, on one process, and there is no checkpointing, which saves the memory that a kept
        graph takes. Training mode changes nothing: dropout is off in the policy and in the critic.
        """
        settings = self.settings
        return (
            rows <= min(settings.mini_batch, settings.micro_batch)
            and self.model is self.actor_critic
            and not self.actor_critic.sharded
            and not any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules())
        )

    def score(self, rollout: Rollout) -> FloatArray:
        """Raw rewards `(B, N)`, NaN where there is none.

        Raises:
            RewardError: a reward fails, or no objective has a number on any process; then all of them raise.
        """
        raw = self.score_responses(rollout.prompts, rollout.responses)
        known = over_processes(self.accelerator, [*(~np.isnan(raw)).sum(0), len(raw)])
        self.rewards.check_batch(known[:-1], int(known[-1]))
        return raw

    def normalize(self, raw: FloatArray) -> FloatArray:
        """Rewards `(B, N)` on the payoff table's scale."""
        return self._scale.normalize(raw)

    @property
    def _scale(self) -> RewardNormalizer:
        if self.state.normalizer is None:
            raise HoEError(
                "there is no normalizer yet: call train(), or set it to measure_payoff()", argument="normalizer"
            )
        return self.state.normalizer

    def weigh(self, rewards: FloatArray) -> FloatArray:
        """The weights u `(N,)` after the mean over all processes of normalised rewards `(B, N)`."""
        return self.weights.update(mean_rewards(self.accelerator, rewards))

    def advantages(self, rollout: Rollout, rewards: FloatArray, weights: FloatArray) -> Targets:
        """Mixed advantages and returns from normalised rewards `(B, N)` and weights `(N,)`."""
        settings, mask = self.settings, rollout.responses.mask
        scores = torch.as_tensor(rewards, dtype=torch.float32, device=mask.device)
        known = ~scores.isnan()
        if settings.missing_eos_penalty is not None:
            endless = ~have_end(rollout.responses, self.tokenizer.eos_token_id)
            scores = scores - settings.missing_eos_penalty * endless.float().unsqueeze(1)
        each, returns = estimate_advantages(
            place_rewards(scores, mask), rollout.values, mask, gamma=settings.gamma, lam=settings.lam
        )
        if settings.group is not None:
            each = leave_one_out(scores, settings.group).unsqueeze(1).expand_as(each)
        mixed = mix_advantages(
            each,
            torch.as_tensor(weights, dtype=torch.float32, device=mask.device),
            mask,
            scaling=settings.advantage_scaling,
            scored=known,
            reduce=lambda tensor: self.accelerator.reduce(tensor, reduction="sum"),
        )
        return Targets(mixed, returns, known)

    def update(self, rollout: Rollout, targets: Targets) -> dict[str, float]:
        """PPO epochs over the rollout."""
        settings = self.settings
        self.model.train()
        for module in (self.policy, self.critic):
            without_dropout(module)
        return update(
            self.model,
            self.accelerator,
            self.optimizer,
            rollout,
            targets,
            settings.loss,
            epochs=settings.num_ppo_epochs,
            mini_batch=settings.mini_batch,
            micro_batch=settings.micro_batch,
            clip=(self.router, self.critic),
            max_grad_norm=settings.max_grad_norm,
        )

    # -- what they are made of ---

    @property
    def greedy(self) -> Decoding:
        """The run's decoding without chance."""
        return replace(self.settings.decoding, do_sample=False, temperature=1.0, top_k=0, top_p=1.0)

    def respond(self, prompts: PromptBatch, decoding: Decoding) -> Responses:
        """Responses to prompts; the policy's own generation settings play no part."""
        return generate_responses(self.policy, prompts, self.tokenizer, decoding, self.settings.rollout_batch)

    def score_responses(self, prompts: PromptBatch, responses: Responses) -> FloatArray:
        """As `score`, of this process alone: an objective may be without any number."""
        tokens: dict[str, torch.Tensor] = {}
        if self.rewards.needs_tokens:
            tokens = {
                "input_ids": torch.cat([prompts.ids, responses.ids], dim=1),
                "attention_mask": torch.cat([prompts.mask, responses.mask], dim=1),
            }
        return self.rewards(prompts.texts, responses.texts, prompts.columns, allow_empty=True, **tokens)

    def measure_payoff(self, prompts: PromptBatch) -> RewardNormalizer:
        """The payoff table at this decoding; the first process measures, so that all hold the same table."""
        return on_first_process(
            self.accelerator,
            lambda: measure_payoff(
                self.policy,
                self.router.adapter,
                prompts,
                self.rewards,
                processing_class=self.tokenizer,
                decoding=self.settings.decoding,
                batch_size=self.settings.rollout_batch,
                seed=self.settings.seed,
                bf16=self.actor_critic.bf16,
            ),
            together=self.actor_critic.sharded,
        )

    def _metrics(self, rollout: Rollout, raw: FloatArray, rewards: FloatArray, weights: FloatArray) -> dict[str, float]:
        found = rollout_metrics(
            rollout, self.accelerator, self.state.experts, self.router.voting_experts, self.tokenizer.eos_token_id
        )
        raw_mean, mean = (mean_rewards(self.accelerator, each) for each in (raw, rewards))
        penalty = (self.settings.missing_eos_penalty or 0.0) * (1 - found["completion/ended"])
        non_score = -self.settings.kl_coef * found["objective/kl"] if "objective/kl" in found else 0.0
        found |= scalar_metrics(mean, weights, non_score, penalty)
        return found | weighing_metrics(self._scale, raw_mean, mean, self.weights)

    # -- checkpoints ---

    def state_dict(self) -> dict[str, Any]:
        """Router, weights, scale, critic and optimizer: all that the next update depends on but for random numbers."""
        return self.state.state_dict() | {
            "critic": self.critic.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from `state_dict`.

        Raises:
            HoEError: it belongs to other settings of the objectives' weights.
        """
        self.state.load_state_dict(saved, self.accelerator.device)
        self.critic.load_state_dict(saved["critic"])
        self.optimizer.load_state_dict(saved["optimizer"])
