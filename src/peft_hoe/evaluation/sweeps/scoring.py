"""From completions to rewards, and from rewards to the scale of hypervolumes.

Shapes: S runs of training, K preferences, P prompts, T texts for each prompt, N objectives.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...errors import HoEError, HoEWarning, RewardError
from ...generation.decoding import differences
from ...objectives.normalizer import RewardNormalizer
from ...preference import FloatArray
from ...rewards.sources import Rewards
from .batches import Texts


def objective_names(given: Sequence[str] | None, known: Sequence[str] | None, rewards: Any) -> tuple[str, ...]:
    """The N names: what the method knows, what the user said, or the names of the rewards.

    Raises:
        HoEError: nobody knows, or they contradict each other.
    """
    if given is not None and known is not None and tuple(given) != tuple(known):
        raise HoEError(
            f"objectives are {list(given)}, but the method's are {list(known)}; leave objectives= out",
            argument="objectives", value=list(given), allowed=list(known),
        )  # fmt: skip
    if given is not None or known is not None:
        return tuple(given if given is not None else known or ())
    if isinstance(rewards, Rewards):
        return rewards.objectives
    if isinstance(rewards, Mapping) and rewards:
        return tuple(name for key in rewards for name in ((key,) if isinstance(key, str) else key))
    raise HoEError(
        'the objectives have no names; give objectives=["a", "b"], or rewards as {"a": ..., "b": ...}',
        argument="objectives",
    )


def text_rewards(rewards: Any, objectives: Sequence[str]) -> Rewards:
    """Rewards that can score texts alone.

    Raises:
        RewardError: there are none, or one reads the policy's token ids, which a file of completions does not hold.
    """
    if rewards is None:
        raise RewardError(
            f"there are no rewards; give one for each of {list(objectives)}",
            argument="rewards", allowed=list(objectives),
        )  # fmt: skip
    scorer = Rewards.of(rewards, objectives)
    if scorer.needs_tokens:
        raise RewardError(
            "a reward is a module that reads the policy's token ids, but sweeps score texts; wrap it as "
            "peft_hoe.rewards.ClassifierReward(model, its_tokenizer)",
            argument="rewards", allowed="rewards that read texts",
        )  # fmt: skip
    return scorer


def score(
    rewards: Rewards, prompts: Sequence[Any], completions: Texts, columns: Mapping[str, Sequence[Any]] | None = None
) -> FloatArray:
    """Rewards `(K, P, T, N)` of completions `(K, P, T)`, one call for each preference; NaN where there is no text or no reward.

    Raises:
        RewardError: a reward fails, or gives no number at all for a preference; or a column has not P values.
    """
    for name, column in (columns or {}).items():
        if len(column) != len(prompts):
            raise RewardError(
                f"column {name!r} has {len(column)} rows, but there are {len(prompts)} prompts",
                argument=name, value=len(column), allowed=len(prompts),
            )  # fmt: skip
    table = np.full((len(completions), len(prompts), len(completions[0][0]), len(rewards.objectives)), np.nan)
    for k, by_prompt in enumerate(completions):
        there = [(p, t) for p, texts in enumerate(by_prompt) for t, text in enumerate(texts) if text is not None]
        some = {name: [column[p] for p, _ in there] for name, column in (columns or {}).items()}
        texts = [str(by_prompt[p][t]) for p, t in there]
        for place, row in zip(there, rewards([prompts[p] for p, _ in there], texts, some), strict=True):
            table[k][place] = row
    return table


def own_corners(
    table: FloatArray,
    preferences: FloatArray,
    objectives: Sequence[str],
    decoding: Mapping[str, Any],
    measurement: Mapping[str, Any],
) -> RewardNormalizer | None:
    """The payoff table that a sweep's own one-hot preferences make, from rewards `(S, K, P, T, N)`; None without a scale.

    Warns:
        HoEWarning: a one-hot preference is not among them, or an objective is the same at all of them, or nearly so.
    """
    rows = [np.flatnonzero(np.abs(preferences - corner).max(axis=1) < 1e-9) for corner in np.eye(len(objectives))]
    missing = [name for name, row in zip(objectives, rows, strict=True) if not len(row)]
    reason = f"the one-hot preferences of {missing} are not in the sweep"
    if not missing:
        runs = table[:, [row[0] for row in rows]]  # (S, N, P, T, N)
        corners = np.concatenate(list(runs), axis=2)
        try:
            return RewardNormalizer.measured(corners, objectives, decoding, measurement)
        except RewardError as error:
            reason = str(error)
    warnings.warn(
        f"rewards are not normalised: {reason}. Hypervolumes need a scale: give payoff=",
        HoEWarning,
        stacklevel=3,
    )
    return None


def check_decoding(normalizer: RewardNormalizer | None, decoding: Mapping[str, Any]) -> None:
    """A payoff table belongs to its decoding: that of sampled training is none for greedy evaluation.

    Warns:
        HoEWarning: it is of another one.
    """
    if normalizer is None or not normalizer.decoding:
        return
    different = differences(normalizer.decoding, decoding)
    if different:
        warnings.warn(
            f"the payoff table was measured with another decoding than the sweep's ({'; '.join(different)}); give "
            "held-out prompts as payoff= to measure one at the sweep's own decoding",
            HoEWarning,
            stacklevel=3,
        )
