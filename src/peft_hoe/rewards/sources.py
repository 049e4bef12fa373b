"""Rewards, one column for each objective, from whatever the user has.

Shapes: B samples, N objectives. A reward is better the higher it is; None or NaN says that a sample has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..errors import RewardError
from ..preference import FloatArray
from .calls import Columns, RewardSource, bind, check_numbers, read_rewards, run_call
from .classifier import ClassifierReward
from .functions import NOT_COLUMNS, ObjectiveFunction, as_text, split
from .matching import as_source, match_sources
from .module import ModuleReward


class Rewards:
    """The rewards of N objectives as one callable.

    Args:
        sources: `{objective: source}`, where a tuple of objectives names what one source with several outputs covers; a
            sequence of N sources in the objectives' order; or one source that covers all. A source is a callable
            `(prompts, completions, **columns)` that returns a list of float or None, as ClassifierReward and URLReward
            are, a coroutine function of that form, or an nn.Module with the interface of TRL's PPO (see ModuleReward). An
            nn.ModuleList is a sequence of sources, an nn.ModuleDict a mapping.
        objectives: the N names.
        timeout: seconds that one source may take for a call; default for ever. A source that hangs is left behind in a daemon
            thread: Python cannot stop it.

    Raises:
        RewardError: sources and objectives do not match, or a source is of no known kind.

    >>> from peft_hoe.rewards import Rewards
    >>> rewards = Rewards(
    ...     {"short": lambda prompts, completions: [-float(len(text)) for text in completions],
    ...      "polite": lambda prompts, completions: [float("please" in text) for text in completions]},
    ...     ["polite", "short"],
    ... )
    >>> rewards(["Ask."], ["Now, please."]).tolist()
    [[1.0, -12.0]]
    """

    def __init__(self, sources: Any, objectives: Sequence[str], *, timeout: float | None = None) -> None:
        if timeout is not None and not timeout > 0:
            raise RewardError(
                f"timeout is {timeout}; give seconds above 0, or None to wait for ever",
                argument="timeout",
                value=timeout,
                allowed="above 0",
            )
        self.objectives = tuple(objectives)
        self.timeout = timeout
        self._sources = [
            RewardSource(as_source(source, names), names, [self.objectives.index(name) for name in names])
            for names, source in match_sources(sources, self.objectives)
        ]

    @classmethod
    def of(cls, sources: Any, objectives: Sequence[str], *, timeout: float | None = None) -> Rewards:
        """`sources` itself where it is a Rewards of these objectives, with the timeout that it has; else a new one."""
        if not isinstance(sources, Rewards):
            return cls(sources, objectives, timeout=timeout)
        if sources.objectives != tuple(objectives):
            raise RewardError(
                f"the rewards are for {list(sources.objectives)}, but the objectives are {list(objectives)}",
                argument="rewards",
                value=list(sources.objectives),
                allowed=list(objectives),
            )
        return sources

    @property
    def needs_tokens(self) -> bool:
        """Whether a call needs `input_ids` and `attention_mask`."""
        return any(isinstance(reward.source, ModuleReward) for reward in self._sources)

    def modules(self) -> Iterator[nn.Module]:
        """The models among the sources."""
        for reward in self._sources:
            if isinstance(reward.source, (ClassifierReward, ModuleReward)):
                yield reward.source.model

    def to(self, device: Any) -> Rewards:
        """Move the models among the sources."""
        for module in self.modules():
            module.to(device)
        return self

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str],
        columns: Columns | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        allow_empty: bool = False,
    ) -> FloatArray:
        """Score completions.

        Args:
            prompts: B prompts as the data set holds them, text or chat messages.
            completions: B texts.
            columns: the data set's other columns, `{name: B values}`.
            input_ids: the policy's tokens `(B, S)` of prompt and completion; only modules read them.
            attention_mask: `(B, S)`, 0 on padding, on either side.
            allow_empty: let an objective be without any number, as in a batch of prompts that it does not score.

        Returns:
            `(B, N)` float64, NaN where there is no reward.

        Raises:
            RewardError: a source raised, hung, returned anything else than B numbers for each of its objectives, or (unless
                `allow_empty`) only NaN.
        """
        columns = {name: column for name, column in (columns or {}).items() if name not in ("prompts", "completions")}
        _check_lengths(len(completions), {"prompts": prompts, **columns})
        table = np.full((len(completions), len(self.objectives)), np.nan)
        if not len(completions):
            return table
        for reward in self._sources:
            call = _prepare(reward, prompts, completions, columns, input_ids, attention_mask)
            table[:, reward.indices] = read_rewards(
                run_call(call, reward.label, self.timeout), reward, len(completions)
            )
        known = (~np.isnan(table)).sum(0)
        for reward in () if allow_empty else self._sources:
            check_numbers(reward, [int(known[i]) for i in reward.indices], len(completions))
        return table

    def functions(self, columns: Sequence[str] | None = None) -> list[ObjectiveFunction]:
        """One function for each objective, in their order, as TRL's GRPOTrainer and its like take them.

        Each batch is scored once, by whichever function is called first. Completions of chats are given as text.

        Args:
            columns: of the dataset, which the sources get; None for all that the trainer passes.

        Raises:
            RewardError: a source reads the policy's tokens, which such trainers do not pass on.

        >>> from peft_hoe.rewards import Rewards
        >>> def both(prompts, completions):
        ...     return [[len(text), text.count("e")] for text in completions]
        >>> rewards = Rewards(both, ["long", "many"])
        >>> [(each.__name__, each(prompts=["Tom"], completions=[" went home"])) for each in rewards.functions()]
        [('long', [10.0]), ('many', [2.0])]
        """
        if self.needs_tokens:
            raise RewardError(
                "a reward is a module that reads the policy's tokens, which trainers that take functions do not pass on; wrap "
                "it as peft_hoe.rewards.ClassifierReward(model, its_tokenizer)",
                argument="rewards",
            )

        def score(prompts: Sequence[Any], completions: Sequence[Any], **others: Any) -> FloatArray:
            """Rewards `(B, N)` of B completions; `others` is what a trainer passes, its own settings among the columns."""
            some = {
                name: column
                for name, column in others.items()
                if (
                    name not in NOT_COLUMNS and _is_column(column, len(completions))
                    if columns is None
                    else name in columns
                )
            }
            return self(prompts, [as_text(completion) for completion in completions], some, allow_empty=True)

        return split(score, self.objectives, self.to)

    def check_batch(self, known: Any, count: int) -> None:
        """See that a batch to train on, of all processes, has a number for some objective.

        Args:
            known: how many of the completions have one, `(N,)`.
            count: the completions of the batch.

        Raises:
            RewardError: there is none.
        """
        if not np.asarray(known).any():
            raise RewardError(
                f"the rewards of {list(self.objectives)} returned no number for any of {count} completions, only None or NaN; "
                "a batch without a reward cannot be trained on",
                argument="rewards",
            )


# -- one call ---


def _check_lengths(count: int, columns: Columns) -> None:
    for name, column in columns.items():
        if len(column) != count:
            raise RewardError(
                f"{name} has {len(column)} rows, but there are {count} completions; give one for each",
                argument=name,
                value=len(column),
                allowed=count,
            )


def _is_column(value: Any, count: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == count


def _prepare(
    reward: RewardSource,
    prompts: Sequence[Any],
    completions: Sequence[str],
    columns: Columns,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
) -> Callable[[], Any]:
    source = reward.source
    if isinstance(source, ModuleReward):
        if input_ids is None or attention_mask is None:
            raise RewardError(
                f"{reward.label} is a module that reads tokens; pass input_ids and attention_mask with the call",
                argument=reward.label,
            )
        ids, mask = input_ids, attention_mask
        return lambda: source(ids, mask)
    return bind(source, reward.label, list(prompts), list(completions), columns)
