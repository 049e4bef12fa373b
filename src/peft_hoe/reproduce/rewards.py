"""The rewards of an experiment."""

from __future__ import annotations

from typing import Any

from ..rewards.command_line import parse_rewards
from ..rewards.sources import Rewards
from .plan import Plan


def load_rewards(plan: Plan, device: str) -> Rewards:
    """The recipe's rewards, but for those that the user gives.

    Raises:
        RewardError: one cannot be imported or loaded.
    """
    texts = [f"{name}={source}" for name, source in plan.rewards.items() if isinstance(source, str)]
    sources: dict[Any, Any] = parse_rewards(texts)
    sources |= {name: source for name, source in plan.rewards.items() if not isinstance(source, str)}
    others = [name for name in plan.objectives if name not in plan.rewards]
    if plan.recipe is not None and others:
        sources |= plan.recipe.rewards(others, device=device)
    return Rewards(sources, plan.objectives).to(device)
