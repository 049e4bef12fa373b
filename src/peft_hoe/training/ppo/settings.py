"""What an update of PPO depends on, beside the policy, its rewards and its prompts."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...generation.decoding import Decoding
from .updates import LossSettings


@dataclass(frozen=True)
class PPOSettings:
    """What an update depends on; names are PPOConfig's where it has them, defaults HoERouterConfig's.

    Attributes:
        decoding: how responses are sampled, and the payoff table's.
        missing_eos_penalty: what a response loses, in normalised rewards, that neither ended nor holds an end of text; None
            for nothing.
        gamma: discount of GAE.
        lam: its trace decay.
        advantage_scaling: see `mix_advantages`.
        group: responses to one prompt, which stand one after the other and are each other's baseline; None for the critic.
        cliprange: of the ratio.
        cliprange_value: of the values.
        vf_coef: weight of the value loss.
        kl_coef: weight of the divergence from the reference; 0 for no KL term.
        num_ppo_epochs: passes over a rollout.
        mini_batch: rows of an optimizer step, on this process.
        micro_batch: rows of a forward with gradients.
        rollout_batch: rows of a forward without, and of generation.
        max_grad_norm: bound of the gradients of router and critic, each by itself; 0 for none.
        seed: of the payoff table's sampling.
    """

    decoding: Decoding = field(default_factory=lambda: Decoding(53, do_sample=True))
    missing_eos_penalty: float | None = None
    gamma: float = 1.0
    lam: float = 1.0
    advantage_scaling: str = "joint"
    group: int | None = None
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.1
    kl_coef: float = 0.0
    num_ppo_epochs: int = 1
    mini_batch: int = 8
    micro_batch: int = 8
    rollout_batch: int = 64
    max_grad_norm: float = 1.0
    seed: int = 42

    @property
    def loss(self) -> LossSettings:
        """The coefficients of the loss."""
        return LossSettings(self.decoding.temperature, self.cliprange, self.cliprange_value, self.vf_coef, self.kl_coef)
