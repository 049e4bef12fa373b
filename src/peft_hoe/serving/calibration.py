"""What trained routers vote on some prompts, and what a model loses when it votes that whatever it reads.

Prompts run one at a time, so nothing is padded and every recorded vote belongs to a token. Shapes: L experts, S tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import HoEError, StaticMergeError
from ..tuner.functional import record_votes, use_preference
from ..tuner.layer import HoELayer
from ..tuner.steering import Steering
from .frozen_model import frozen


@dataclass(frozen=True)
class Difference:
    """How a frozen model's predictions differ from the routed model's, over all tokens of the prompts.

    Attributes:
        tokens: how many predictions were compared.
        kl: mean KL divergence of the frozen model's next token from the routed model's, in nats.
        agreement: share of places where both find the same token likeliest.
        largest: largest difference of a log-probability.
    """

    tokens: int
    kl: float
    agreement: float
    largest: float


class Calibration:
    """A model and the prompts that its routers are asked about.

    Args:
        model: a decoder-only model that carries HoE layers.
        tokenizer: the model's.
        prompts: texts, or lists of chat messages, which go through the chat template.
        adapter: name of the adapter; the only active one.

    Raises:
        HoEError: no prompts, one without tokens, no tokenizer, or a model that cannot be compared.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, prompts: Sequence[Any], adapter: str) -> None:
        if tokenizer is None:
            raise HoEError(
                "prompts were given without a tokenizer; pass the base model's as tokenizer=", argument="tokenizer"
            )
        if not prompts:
            raise HoEError(
                "prompts is empty; give at least one text to calibrate on, or leave prompts out",
                argument="prompts", value=prompts, allowed="at least one text",
            )  # fmt: skip
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise HoEError(
                f"{type(model).__name__} has an encoder; calibration knows decoder-only models",
                argument="model", value=type(model).__name__, allowed="a decoder-only model",
            )  # fmt: skip
        self.model, self.adapter = model, adapter
        self._layers = [module for module in model.modules() if isinstance(module, HoELayer)]
        if any(layer.merged for layer in self._layers):
            raise StaticMergeError("the model is merged; call unmerge_adapter() first", argument="model")
        if active := [name for name in Steering.of(model).active if name != adapter]:
            raise HoEError(
                f"other adapters are active: {active}; activate {adapter!r} alone with set_adapter",
                argument="adapter_name", value=active, allowed=[adapter],
            )  # fmt: skip
        device = next(model.parameters()).device
        self.prompts = [_tokens(tokenizer, prompt).to(device) for prompt in prompts]

    @torch.no_grad()
    def mean_votes(self, preference: Sequence[float]) -> dict[str, Tensor]:
        """Mean votes `(L,)` float64 at a preference `(N,)` over all tokens, of every module that a prompt reached."""
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        for ids in self.prompts:
            with self._routed(preference), record_votes(self.model, self.adapter) as votes:
                self.model(input_ids=ids)
            for module, vote in votes.items():
                rows = vote.double().cpu().reshape(-1, vote.shape[-1])
                sums[module] = rows.sum(0) + sums.get(module, 0)
                counts[module] = counts.get(module, 0) + len(rows)
        return {module: total / counts[module] for module, total in sums.items()}

    @torch.no_grad()
    def difference(
        self, preference: Sequence[float], factors: Mapping[str, tuple[Tensor, Tensor]], norms: Mapping[str, Tensor]
    ) -> Difference:
        """Compare the routed model at a preference `(N,)` with its base under an exported LoRA.

        Args:
            preference: of the routed model.
            factors: A `(r, d_in)` and B `(d_out, r)` by module.
            norms: weights and biases `(d,)` that are saved whole, by parameter.
        """
        tokens, kl, same, largest = 0, 0.0, 0, 0.0
        for ids in self.prompts:
            with self._routed(preference):
                routed = self._log_probabilities(ids)
            with frozen(self._layers, factors, norms):
                fixed = self._log_probabilities(ids)
            tokens += len(routed)
            kl += float((routed.exp() * (routed - fixed)).sum())
            same += int((routed.argmax(-1) == fixed.argmax(-1)).sum())
            largest = max(largest, float((routed - fixed).abs().max()))
        return Difference(tokens, kl / tokens, same / tokens, largest)

    def _routed(self, preference: Sequence[float]) -> Any:
        return use_preference(self.model, {self.adapter: list(preference)})

    def _log_probabilities(self, ids: Tensor) -> Tensor:
        logits = getattr(self.model(input_ids=ids), "logits", None)
        if logits is None:
            raise HoEError(
                f"{type(self.model).__name__} returns no logits to compare; leave the prompts out",
                argument="model", value=type(self.model).__name__, allowed="a model that returns logits",
            )  # fmt: skip
        return F.log_softmax(logits.double().flatten(0, -2), dim=-1)


def _tokens(tokenizer: Any, prompt: Any) -> Tensor:
    """Ids `(1, S)`."""
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    else:
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise HoEError(f"the prompt {prompt!r} has no token; leave it out", argument="prompts", value=prompt)
    return torch.tensor([ids])
