"""Critics: one value for each objective and token.

Shapes: B rows, S positions, d hidden size, N objectives.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ...errors import HoEError
from ...generation.vocabulary import check_tokens
from ..run.steered_policy import hidden_size

HEADS_LEARNING_RATE = 1e-3
logger = logging.getLogger(__name__)


class ValueHeads(nn.Module):
    """N heads on the steered policy's last hidden state: no second language model is held.

    The hidden state is detached, so values do not steer the router.
    """

    def __init__(self, hidden_size: int, objectives: int) -> None:
        super().__init__()
        self.heads = nn.Linear(hidden_size, objectives)
        nn.init.zeros_(self.heads.weight)
        nn.init.zeros_(self.heads.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`(B, S, d)` to `(B, S, N)`."""
        values: torch.Tensor = self.heads(hidden.detach().to(self.heads.weight.dtype))
        return values


def make_critic(policy: Any, value_model: nn.Module | None, objectives: int) -> ValueHeads | ValueModel:
    """A user's value model for N objectives, or heads on the policy's hidden state where there is none.

    Raises:
        HoEError: its number of outputs is neither 1 nor N.
    """
    if value_model is None:
        return ValueHeads(hidden_size(policy), objectives)
    return ValueModel(value_model, objectives)


def check_used(value_model: Any, baseline: str) -> None:
    """See that a user's value model is not run and trained for nothing.

    Raises:
        HoEError: the baseline takes no values.
    """
    if value_model is not None and baseline == "group":
        raise HoEError(
            "value_model is given, but baseline='group' compares the responses to a prompt with each other and uses no values; "
            "leave value_model out, or baseline",
            argument="value_model",
        )


def check_apart(critic: nn.Module, others: Mapping[str, Iterable[nn.Module | None]]) -> None:
    """See that a critic, which trains, holds no parameter of a model that must stay as it is.

    Args:
        critic: heads or a value model.
        others: the models, by what errors call them.

    Raises:
        HoEError: it does.
    """
    own = {id(parameter) for parameter in critic.parameters()}
    for name, models in others.items():
        for model in models:
            if model is not None and any(id(parameter) in own for parameter in model.parameters()):
                raise HoEError(
                    f"value_model holds parameters of the {name}, and it trains, so that the {name} would change; load the "
                    "value model by itself",
                    argument="value_model",
                )


class ValueModel(nn.Module):
    """A value model in TRL's form (a backbone under `base_model_prefix` and `score`), with N outputs.

    A model with one output is copied first, and gets its head N times.

    Raises:
        HoEError: its number of outputs is neither 1 nor N.
    """

    def __init__(self, model: nn.Module, objectives: int) -> None:
        super().__init__()
        prefix, score = getattr(model, "base_model_prefix", None), getattr(model, "score", None)
        if prefix is None or not hasattr(model, prefix) or not isinstance(score, nn.Linear):
            raise HoEError(
                f"value_model is a {type(model).__name__}; it needs a backbone under `base_model_prefix` and a linear `score`, "
                "as AutoModelForSequenceClassification has, or leave it out for value heads on the policy",
                argument="value_model",
                value=type(model).__name__,
            )
        if score.out_features not in (1, objectives):
            raise HoEError(
                f"value_model has {score.out_features} outputs; it needs 1 or one for each of the {objectives} objectives",
                argument="value_model",
                value=score.out_features,
                allowed=(1, objectives),
            )
        self.base_model_prefix = prefix
        self.add_module(prefix, getattr(model, prefix))  # parameters keep their names
        self.score = copy.deepcopy(score)
        if score.out_features == 1 and objectives > 1:
            logger.info("value_model has one output; its head is copied %d times, one per objective", objectives)
            self.score = nn.Linear(score.in_features, objectives, bias=score.bias is not None).to(score.weight)
            with torch.no_grad():
                self.score.weight.copy_(score.weight.expand(objectives, -1))
                if score.bias is not None:
                    self.score.bias.copy_(score.bias.expand(objectives))

    def forward(self, inputs: dict[str, Any]) -> torch.Tensor:
        """The policy's inputs to values `(B, S, N)`."""
        check_tokens(inputs["input_ids"], getattr(self, self.base_model_prefix), what="value_model")
        output = getattr(self, self.base_model_prefix)(
            **inputs, return_dict=True, output_hidden_states=True, use_cache=False
        )
        values: torch.Tensor = self.score(output.hidden_states[-1])
        return values.float()
