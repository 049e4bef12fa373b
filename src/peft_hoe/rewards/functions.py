"""Rewards of several objectives as one function for each, for trainers that take functions, such as TRL's GRPOTrainer.

Shapes: B completions, K objectives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..preference import FloatArray

# What TRL passes to reward functions beside the columns of the dataset.
NOT_COLUMNS = ("completion_ids", "trainer_state", "log_extra", "log_metric", "environments")


class ObjectiveFunction:
    """The reward of one objective, called as TRL calls reward functions; made by `split`.

    Attributes:
        __name__: the objective's, under which TRL logs it.
    """

    def __init__(self, name: str, column: Callable[..., FloatArray], to: Callable[[Any], Any] | None) -> None:
        self.__name__ = name
        self._column, self._to = column, to

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        """B rewards, NaN where there is none.

        Raises:
            RewardError: the source failed.
        """
        rewards: list[float] = self._column(prompts, completions, columns).tolist()
        return rewards

    def to(self, device: Any) -> None:
        """Move the source's models, if it has any."""
        if self._to is not None:
            self._to(device)


def split(
    score: Callable[..., FloatArray], names: Sequence[str], to: Callable[[Any], Any] | None = None
) -> list[ObjectiveFunction]:
    """K functions from one that scores all K objectives; it is called once for each batch.

    A batch is over when a function is asked for the second time, or for other completions.

    Args:
        score: `(prompts, completions, **columns)` to rewards `(B, K)`.
        names: of the K objectives.
        to: moves its models to a device.
    """
    last: dict[str, Any] = {"of": None, "table": np.empty((0, 0)), "asked": set()}

    def of(index: int) -> Callable[..., FloatArray]:
        def column(prompts: Sequence[Any], completions: Sequence[Any], columns: dict[str, Any]) -> FloatArray:
            batch = (list(prompts), list(completions))
            if last["of"] != batch or index in last["asked"]:
                last.update(of=batch, table=score(prompts, completions, **columns), asked=set())
            last["asked"].add(index)
            return np.asarray(last["table"])[:, index]

        return column

    return [ObjectiveFunction(name, of(index), to) for index, name in enumerate(names)]


def as_text(completion: Any) -> str:
    """A completion as text: itself, or what the assistant's messages say."""
    if isinstance(completion, str):
        return completion
    return "".join(message["content"] or "" for message in completion)
