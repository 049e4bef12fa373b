"""The shell around `RouterPPO` as a subclass of TRL's PPOTrainer, where the installed TRL has one."""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from trl.experimental.ppo import PPOTrainer

from ...rewards.sources import Rewards
from .shell import PPOShell


class TRLShell(PPOShell, PPOTrainer):  # type: ignore[misc]
    """HoERouterTrainer over PPOTrainer: its constructor, callbacks, logging and saving stay; its `train` is replaced."""

    def _construct_trainer(self, ref_model: Any, rewards: Rewards, **shared: Any) -> None:
        """PPOTrainer's constructor; through `create_optimizer_and_scheduler` it prepares our actor and critic."""
        PPOTrainer.__init__(
            self,
            model=self.policy,
            ref_model=ref_model,
            reward_model=cast(Any, nn.ModuleList(rewards.modules())),
            value_model=cast(Any, _NoCritic()),
            **shared,
        )


class _NoCritic(nn.Module):
    """What PPOTrainer's constructor looks for in a value model; `ActorCritic` replaces it before it is used."""

    base_model_prefix = "backbone"

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Identity()
