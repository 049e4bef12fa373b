"""Rewards in the form that TRL's GRPOTrainer calls, one function for each objective.

Shapes: B samples in groups of G completions of one prompt, N objectives.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from ...errors import RewardError
from ...preference import FloatArray
from ...rewards.calls import RewardSource, bind, read_rewards, run_call, took_too_long
from ...rewards.classifier import ClassifierReward
from ...rewards.functions import NOT_COLUMNS, ObjectiveFunction, as_text, split
from ...rewards.matching import match_sources
from ...rewards.module import ModuleReward
from ...rewards.sources import Rewards
from ...rewards.url import URLReward


def reward_functions(sources: Any, objectives: Sequence[str], *, timeout: float | None = None) -> list[Any]:
    """What TRL takes as `reward_funcs`, in the objectives' order.

    Args:
        sources: a Rewards; or `{objective: source}`, where a tuple of objectives names what one source covers, a sequence in
            the objectives' order, or one source for all. A source is what TRL takes (the name of a classifier, a classifier, a
            function, also an asynchronous one), ClassifierReward or URLReward; one of several is called once a batch.
        objectives: the N names.
        timeout: seconds that a call may take; default for ever. Classifiers that TRL runs are not bounded.

    Raises:
        RewardError: sources and objectives do not match, or a source is of no known kind.
    """
    if isinstance(sources, Rewards):
        return list(Rewards.of(sources, objectives).functions())
    found: dict[str, Any] = {}
    for names, source in match_sources(sources, tuple(objectives)):
        found |= zip(names, _functions(source, names, timeout), strict=True)
    return [found[name] for name in objectives]


def processing_classes(given: Any, objectives: Sequence[str], functions: Sequence[Any]) -> Any:
    """The tokenizers of classifiers as TRL takes them; `{objective: tokenizer}` becomes a list.

    Args:
        given: by the user.
        objectives: the N names.
        functions: what TRL takes as `reward_funcs`, N of them.

    Raises:
        RewardError: one is named for what is no objective, or for a reward that reads text.
    """
    found = _by_objective(given, objectives)
    listed = found if isinstance(found, (list, tuple)) else [found] * len(objectives)
    for name, tokenizer, function in zip(objectives, listed, functions, strict=False):
        if tokenizer is not None and not isinstance(function, (str, nn.Module)):
            raise RewardError(
                f"reward_processing_classes has a tokenizer for {name!r}, whose reward is called with text; leave it out there "
                "(ClassifierReward has its own)",
                argument="reward_processing_classes",
                value=name,
            )
    return found


def _by_objective(given: Any, objectives: Sequence[str]) -> Any:
    if not isinstance(given, Mapping) or hasattr(given, "pad_token_id"):
        return given
    unknown = [name for name in given if name not in objectives]
    if unknown:
        raise RewardError(
            f"reward_processing_classes are given for {unknown}, but the objectives are {list(objectives)}",
            argument="reward_processing_classes",
            value=unknown,
            allowed=list(objectives),
        )
    return [given.get(name) for name in objectives]


def _functions(source: Any, names: tuple[str, ...], timeout: float | None) -> list[Any]:
    """One function, or what TRL runs itself, for each of a source's objectives."""
    label = f"the reward of {names[0]!r}" if len(names) == 1 else f"the reward of {list(names)}"
    width = len(names)
    if isinstance(source, nn.Module):
        width = getattr(getattr(source, "score", None), "out_features", 1)
    elif isinstance(source, ClassifierReward):
        width = source.outputs
    if width != len(names):
        needed = "one is" if len(names) == 1 else f"{len(names)} are"
        raise RewardError(
            f"{label} is a {type(source).__name__} with {width} outputs, but {needed} needed; choose them with "
            "ClassifierReward(model, tokenizer, output=...)",
            argument="reward_funcs",
            value=source,
        )
    if isinstance(source, ModuleReward):
        raise RewardError(
            f"{label} is a ModuleReward, which reads the policy's tokens, but GRPO's rewards read text; use "
            "ClassifierReward(model, tokenizer)",
            argument="reward_funcs",
            value=source,
        )
    if isinstance(source, (str, nn.Module)):
        if len(names) > 1:
            raise RewardError(
                f"{label} is {source if isinstance(source, str) else type(source).__name__!r}, which TRL runs for one "
                "objective only; use ClassifierReward(model, tokenizer, output=[...]) for several",
                argument="reward_funcs",
                value=source,
            )
        return [source]
    if inspect.iscoroutinefunction(source) and len(names) == 1:  # TRL runs several of them at the same time
        return [source if timeout is None else _bounded(source, label, timeout)]
    if not callable(source):
        raise RewardError(
            f"{label} is {source!r}; give a function (prompts, completions, **columns), a sequence classifier or its name, "
            "ClassifierReward(model, tokenizer) or URLReward(url)",
            argument="reward_funcs",
            value=source,
        )
    return list(_scored(source, names, timeout))


def _bounded(source: Any, label: str, timeout: float) -> Any:
    """An asynchronous function that may take so long."""

    @functools.wraps(source)
    async def bounded(*args: Any, **columns: Any) -> Any:
        try:
            return await asyncio.wait_for(source(*args, **columns), timeout)
        except asyncio.TimeoutError:
            raise took_too_long(label, timeout) from None

    return bounded


def _scored(source: Any, names: tuple[str, ...], timeout: float | None) -> list[ObjectiveFunction]:
    """A user's source, called once a batch, as one function for each of its objectives.

    Completions are what TRL makes of them: text, or for chat prompts lists with the assistant's message. ClassifierReward and
    URLReward are always given text.
    """
    reward = RewardSource(source, names, list(range(len(names))))
    reads_text = isinstance(source, (ClassifierReward, URLReward))

    def score(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> FloatArray:
        """Rewards `(B, K)` of B completions; RewardError names the source where it fails."""
        if reads_text:
            completions = [as_text(completion) for completion in completions]
            columns = {name: column for name, column in columns.items() if name not in NOT_COLUMNS}
        call = bind(source, reward.label, list(prompts), list(completions), columns)
        return read_rewards(run_call(call, reward.label, timeout), reward, len(completions))

    return split(score, names, source.model.to if isinstance(source, ClassifierReward) else None)


def known_means(rewards: FloatArray) -> FloatArray:
    """Mean of each column of `(B, N)`, `(N,)`; NaN is left out, and a column of nothing else is NaN."""
    known = ~np.isnan(rewards)
    count = known.sum(0)
    return np.divide(np.where(known, rewards, 0.0).sum(0), count, out=np.full(count.shape, np.nan), where=count > 0)


def fill_missing(rewards: FloatArray, group: int) -> FloatArray:
    """Put the mean of a completion's group where it has no reward `(B, N)`: its advantage in that objective is then 0.

    TRL adds the objectives up with NaN as 0, which is no neutral value but a bad or a good one. A completion without any reward
    stays NaN, which TRL leaves out, and so does an objective that a whole group lacks.
    """
    groups = rewards.reshape(-1, group, rewards.shape[1])
    means = np.stack([known_means(each) for each in groups])[:, None, :]
    unknown = np.isnan(groups)
    filled = np.where(unknown & ~unknown.all(axis=2, keepdims=True), means, groups)
    return np.asarray(filled.reshape(rewards.shape))
