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
from ...rewards.calls import Part, bind, read_rewards, run_call, took_too_long
from ...rewards.models import ClassifierReward, ModuleReward
from ...rewards.sources import match_sources
from ...rewards.url import URLReward

_NOT_COLUMNS = ("completion_ids", "trainer_state", "log_extra", "log_metric", "environments")


def reward_functions(sources: Any, objectives: Sequence[str], *, timeout: float | None = None) -> list[Any]:
    """What TRL takes as `reward_funcs`, in the objectives' order.

    Args:
        sources: `{objective: source}`, a sequence in the objectives' order, or one source for one objective. A source is what
            TRL takes (the name of a classifier, a classifier, a function, also an asynchronous one), ClassifierReward or
            URLReward.
        objectives: the N names.
        timeout: seconds that a call may take; default for ever. Classifiers that TRL runs are not bounded.

    Raises:
        RewardError: sources and objectives do not match, or a source is of no known kind.
    """
    found = {}
    for names, source in match_sources(sources, tuple(objectives)):
        if len(names) != 1:
            raise RewardError(
                f"one reward is given for the objectives {list(names)}; GRPO takes one for each, as {{objective: function}} or "
                "in their order"
            )
        found[names[0]] = _function(source, names[0], timeout)
    return [found[name] for name in objectives]


def processing_classes(given: Any, objectives: Sequence[str]) -> Any:
    """The tokenizers of classifiers as TRL takes them; `{objective: tokenizer}` becomes a list.

    Raises:
        RewardError: one is named for what is no objective.
    """
    if not isinstance(given, Mapping) or hasattr(given, "pad_token_id"):
        return given
    unknown = [name for name in given if name not in objectives]
    if unknown:
        raise RewardError(
            f"reward_processing_classes are given for {unknown}, but the objectives are {list(objectives)}"
        )
    return [given.get(name) for name in objectives]


def _function(source: Any, objective: str, timeout: float | None) -> Any:
    label = f"the reward of {objective!r}"
    width = 1
    if isinstance(source, nn.Module):
        width = getattr(getattr(source, "score", None), "out_features", 1)
    elif isinstance(source, ClassifierReward):
        width = source.outputs
    if width != 1:
        raise RewardError(
            f"{label} is a {type(source).__name__} with {width} outputs, but one is needed; choose it with "
            "ClassifierReward(model, tokenizer, output=...)"
        )
    if isinstance(source, ModuleReward):
        raise RewardError(
            f"{label} is a ModuleReward, which reads the policy's tokens, but GRPO's rewards read text; use "
            "ClassifierReward(model, tokenizer)"
        )
    if isinstance(source, (str, nn.Module)):
        return source
    if inspect.iscoroutinefunction(source):
        return source if timeout is None else _bounded(source, label, timeout)
    if not callable(source):
        raise RewardError(
            f"{label} is {source!r}; give a function (prompts, completions, **columns), a sequence classifier or its name, "
            "ClassifierReward(model, tokenizer) or URLReward(url)"
        )
    return RewardFunction(source, objective, timeout)


def _bounded(source: Any, label: str, timeout: float) -> Any:
    """An asynchronous function that may take so long."""

    @functools.wraps(source)
    async def bounded(*args: Any, **columns: Any) -> Any:
        try:
            return await asyncio.wait_for(source(*args, **columns), timeout)
        except asyncio.TimeoutError:
            raise took_too_long(label, timeout) from None

    return bounded


class RewardFunction:
    """A user's reward with the arguments that TRL passes, of which it is given what it takes.

    Completions are what TRL makes of them: text, or for chat prompts lists with the assistant's message. ClassifierReward and
    URLReward are always given text.
    """

    def __init__(self, source: Any, objective: str, timeout: float | None = None) -> None:
        self.source, self.timeout = source, timeout
        self.__name__ = objective  # what TRL calls it
        self._part = Part(source, (objective,), [0])
        self._reads_text = isinstance(source, (ClassifierReward, URLReward))

    def to(self, device: Any) -> None:
        """Move the source's model, if it has one."""
        if isinstance(self.source, ClassifierReward):
            self.source.model.to(device)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        """B rewards, NaN where there is none.

        Raises:
            RewardError: the source raised, or returned anything else than B numbers or None.
        """
        if self._reads_text:
            completions = [as_text(completion) for completion in completions]
            columns = {name: column for name, column in columns.items() if name not in _NOT_COLUMNS}
        call = bind(self.source, self._part.label, list(prompts), list(completions), columns)
        returned = run_call(call, self._part.label, self.timeout)
        rewards: list[float] = read_rewards(returned, self._part, len(completions))[:, 0].tolist()
        return rewards


def as_text(completion: Any) -> str:
    """A completion as text: itself, or what the assistant's messages say."""
    if isinstance(completion, str):
        return completion
    return "".join(message["content"] or "" for message in completion)


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
