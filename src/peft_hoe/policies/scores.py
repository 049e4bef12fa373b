"""The rewards of a policy: those of the objectives, on the scale of a payoff table, with the preference that weights them.

Shapes: B completions, N objectives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import RewardError
from ..objectives.normalizer import RewardNormalizer
from ..preference import FloatArray, parse_preference
from ..rewards.functions import ObjectiveFunction, as_text, split
from ..rewards.sources import Rewards


class Scores:
    """The rewards as N functions of TRL, computed once for all of them."""

    def __init__(
        self, sources: Any, preference: Any, objectives: Sequence[str] | None, normalizer: RewardNormalizer | None
    ) -> None:
        self.rewards = Rewards.of(sources, _objective_names(sources, objectives, normalizer))
        if normalizer is not None and normalizer.objectives != self.rewards.objectives:
            raise RewardError(
                f"the normalizer is for {list(normalizer.objectives)}, but the rewards are for "
                f"{list(self.rewards.objectives)}; measure its payoff table with the same objectives, in the same order",
                argument="normalizer",
                value=list(normalizer.objectives),
                allowed=list(self.rewards.objectives),
            )
        if self.rewards.needs_tokens:
            raise RewardError(
                "a reward is a bare module that reads the policy's tokens, which GRPOTrainer does not pass on; wrap it as "
                "ClassifierReward(model, tokenizer)",
                argument="rewards",
            )
        self.preference = parse_preference(preference, self.rewards.objectives)
        self.normalizer = normalizer
        self.columns: list[str] = []

    def functions(self) -> list[ObjectiveFunction]:
        """One for each objective, under its name."""
        return split(self._score, self.rewards.objectives)

    def _score(self, prompts: Sequence[Any], completions: Sequence[Any], **others: Any) -> FloatArray:
        """`(B, N)`; a row that lacks a reward which counts is NaN throughout, which TRL leaves out.

        An objective that no completion of a prompt has a reward in tells none of them from another, so none is left out for it:
        a dataset may hold the prompts of several tasks.

        Raises:
            RewardError: a reward fails, or none that counts has a number.
        """
        columns = {name: others[name] for name in self.columns}
        table = self.rewards(prompts, [as_text(completion) for completion in completions], columns, allow_empty=True)
        known = ~np.isnan(table[:, self.preference > 0])
        if not known.any():
            names = [name for name, weight in zip(self.rewards.objectives, self.preference, strict=True) if weight > 0]
            raise RewardError(
                f"the rewards of {names} returned no number for any of {len(table)} completions, only None or NaN; a batch "
                "without a reward cannot be trained on, so leave prompts out that they do not score",
                argument="rewards", value=names,
            )  # fmt: skip
        if self.normalizer is not None:
            table = self.normalizer.normalize(table)
        table[_incomplete(known, prompts)] = np.nan
        return table


def _incomplete(known: Any, prompts: Sequence[Any]) -> Any:
    """Which rows `(B,)` of `known` `(B, K)` lack what another of the same prompt has, or all."""
    keys = np.unique([str(prompt) for prompt in prompts], return_inverse=True)[1]
    anyone = np.stack([known[keys == key].any(axis=0) for key in range(keys.max() + 1)])[keys]
    return (anyone & ~known).any(axis=1) | ~known.any(axis=1)


def _objective_names(
    sources: Any, objectives: Sequence[str] | None, normalizer: RewardNormalizer | None
) -> Sequence[str]:
    if objectives is not None:
        return objectives
    if isinstance(sources, Rewards):
        return sources.objectives
    if normalizer is not None:
        return normalizer.objectives
    if isinstance(sources, Mapping):
        return [name for key in sources for name in ([key] if isinstance(key, str) else key)]
    raise RewardError(
        "the objectives have no names; give objectives=[...], or rewards as {objective: reward}", argument="objectives"
    )
