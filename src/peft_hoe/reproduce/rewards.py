"""The rewards of an experiment, and the form of them that GRPO takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..preference import FloatArray
from ..rewards.command_line import parse_rewards
from ..rewards.sources import Rewards
from ..training.grpo.rewards import as_text
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


def separate(rewards: Rewards, columns: Sequence[str]) -> dict[str, Callable[..., list[float]]]:
    """One function for each objective, as TRL calls them; a batch is scored once for all of them.

    Args:
        rewards: of texts.
        columns: the data set's other columns; TRL passes more than these.
    """
    last: dict[str, Any] = {"of": None, "table": None}

    def score(prompts: Sequence[Any], completions: Sequence[Any], others: dict[str, Any]) -> FloatArray:
        texts = [as_text(completion) for completion in completions]
        if last["of"] != (prompts, texts):
            some = {name: others[name] for name in columns if name in others}
            last.update(of=(list(prompts), texts), table=rewards(prompts, texts, some))
        return np.asarray(last["table"])

    def column(index: int) -> Callable[..., list[float]]:
        def reward(prompts: Sequence[Any], completions: Sequence[Any], **others: Any) -> list[float]:
            numbers: list[float] = score(prompts, completions, others)[:, index].tolist()
            return numbers

        return reward

    return {name: column(index) for index, name in enumerate(rewards.objectives)}
