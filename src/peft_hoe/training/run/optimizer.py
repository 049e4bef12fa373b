"""The optimizer's parameters: the router's and the critic's, and nothing else."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)


def parameter_groups(router: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for an optimizer: router weights with decay, router biases without."""
    weights = [parameter for parameter in router.parameters() if parameter.ndim > 1]
    biases = [parameter for parameter in router.parameters() if parameter.ndim <= 1]
    return [{"params": weights, "weight_decay": weight_decay}, {"params": biases, "weight_decay": 0.0}]


def critic_group(critic: nn.Module, rate: float | None) -> dict[str, Any]:
    """A group for the critic, at a learning rate of its own if there is one."""
    group: dict[str, Any] = {"params": list(critic.parameters()), "weight_decay": 0.0}
    return group if rate is None else group | {"lr": rate}


def take_over(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    """Make a user's optimizer, with its settings, move these parameters and no others.

    The router trains in Parameters that did not exist when the optimizer was made. What it held, momentum included, would move
    other routers. The number of groups stays, because schedulers count them.
    """
    held = sum(len(group["params"]) for group in optimizer.param_groups)
    logger.info("the optimizer's %d tensors are replaced by the %d that train", held, len(parameters))
    optimizer.state.clear()
    for group in optimizer.param_groups:
        group["params"] = []
    optimizer.param_groups[0]["params"] = list(parameters)


def follow_schedule(scheduler: Any) -> None:
    """Set the rates to what a schedule says now, after it and its optimizer were loaded from a checkpoint.

    Theirs are of the schedule that wrote the checkpoint: at the end of a finished one they are 0, and a longer one that goes on
    from there would begin with an update that moves nothing.
    """
    factors = getattr(scheduler, "lr_lambdas", None)
    if factors is None:
        return
    rates = [base * factor(scheduler.last_epoch) for base, factor in zip(scheduler.base_lrs, factors, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


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
