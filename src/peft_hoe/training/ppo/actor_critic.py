"""The steered policy and its critic in one module: what accelerate wraps, and one forward for both.

Shapes: B rows, S = P + T positions of prompt and response, T response positions, V vocabulary, N objectives.
"""

from __future__ import annotations

import torch
from torch import nn

from ...generation.logits import response_logits, sequence_inputs
from ..run.trained_router import TrainedRouter
from .critics import ValueHeads, ValueModel


class ActorCritic(nn.Module):
    """A frozen HoE policy, the Parameters of the router that trains, and the critic.

    Args:
        policy: the PeftModel.
        router: the router that trains; its Parameters and the critic's are the only ones that may train here.
        critic: value heads on the policy's hidden state, or a value model of its own.
        bf16: whether forwards run in bfloat16 autocast.
        sharded: whether the policy's weights are sharded. accelerate gives DistributedDataParallel no module that has shards,
            so the policy is then an attribute but no submodule.
    """

    policy: nn.Module

    def __init__(
        self,
        policy: nn.Module,
        router: TrainedRouter,
        critic: ValueHeads | ValueModel,
        *,
        bf16: bool = False,
        sharded: bool = False,
    ) -> None:
        super().__init__()
        self.bf16, self.sharded = bf16, sharded
        if sharded:
            self.__dict__["policy"] = policy
        else:
            self.policy = policy
        self.router = router
        self.critic = critic

    @property
    def value_model(self) -> ValueHeads | ValueModel:
        """The critic, under the name that it has in TRL."""
        return self.critic

    def train(self, mode: bool = True) -> ActorCritic:
        """As any module's; the policy goes along also where it is no submodule."""
        self.policy.train(mode)
        return super().train(mode)

    def autocast(self) -> torch.autocast:
        """A block in which the policy runs as it does while it trains."""
        device = next(self.parameters()).device.type
        return torch.autocast(device, dtype=torch.bfloat16, enabled=self.bf16)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, response_length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `(B, T, V)` that predict the response's tokens, and values `(B, T, N)` before each."""
        inputs = sequence_inputs(input_ids, attention_mask)
        own_backbone = isinstance(self.critic, ValueModel)
        with self.autocast():
            logits, hidden = response_logits(self.policy, inputs, response_length, hidden=not own_backbone)
            if own_backbone:
                return logits, self.critic(inputs)[:, -response_length - 1 : -1]
            return logits, self.critic(hidden)
