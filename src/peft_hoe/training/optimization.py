"""The optimizer's parameters: the router's and the critic's, and nothing else."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)


def parameter_groups(router: nn.Module, critic: nn.Module, weight_decay: float, critic_rate: float | None) -> list[Any]:
    """Groups for an optimizer: router weights with decay, router biases without, and the critic, at its own rate if any."""
    weights = [parameter for parameter in router.parameters() if parameter.ndim > 1]
    biases = [parameter for parameter in router.parameters() if parameter.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": weights, "weight_decay": weight_decay},
        {"params": biases, "weight_decay": 0.0},
        {"params": list(critic.parameters()), "weight_decay": 0.0},
    ]
    if critic_rate is not None:
        groups[2]["lr"] = critic_rate
    return groups


def take_over(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    """Make a user's optimizer, with its settings, move these parameters and no others.

    The router trains in Parameters that did not exist when the optimizer was made. What it held, momentum included, would move
    other routers. The number of groups stays, because schedulers count them.
    """
    held = sum(len(group["params"]) for group in optimizer.param_groups)
    logger.info("the optimizer's %d tensors are replaced by the router's and the critic's %d", held, len(parameters))
    optimizer.state.clear()
    for group in optimizer.param_groups:
        group["params"] = []
    optimizer.param_groups[0]["params"] = list(parameters)


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter of the model trains inside; what trained before does afterwards."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, trains in before:
            parameter.requires_grad_(trains)
