"""One call of one reward: with which arguments, for how long, and what came back.

Shapes: B samples, K objectives that the source covers.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import math
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import RewardError
from ..preference import FloatArray

Columns = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class RewardSource:
    """A function or model that gives rewards, and the objectives that it scores.

    Attributes:
        source: callable.
        names: of the K objectives.
        indices: their places among all N.
    """

    source: Any
    names: tuple[str, ...]
    indices: list[int]

    @property
    def label(self) -> str:
        """How errors call it."""
        return f"reward {self.names[0]!r}" if len(self.names) == 1 else f"reward {self.names!r}"


def bind(source: Callable[..., Any], label: str, prompts: Any, completions: Any, columns: Columns) -> Callable[[], Any]:
    """The call of a user's function: by the names that TRL uses where it has them, with the columns that it can take."""
    try:
        parameters = inspect.signature(source).parameters
    except (TypeError, ValueError):  # builtins
        return lambda: source(prompts, completions)
    takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    texts = {"prompts": prompts, "completions": completions}
    if "completions" not in parameters:
        positional: tuple[Any, ...] = (prompts, completions)
        given: dict[str, Any] = dict(columns)
    else:
        positional, given = (), {**columns, **texts}
    keywords = {name: value for name, value in given.items() if takes_all or name in parameters}
    try:
        bound = inspect.signature(source).bind(*positional, **keywords)
    except TypeError as error:
        raise RewardError(
            f"{label} cannot be called: {error}. It is given prompts, completions and the columns {list(columns)}; "
            "write it as def reward(prompts, completions, **columns)",
            argument=label,
            value=list(columns),
        ) from None
    return lambda: source(*bound.args, **bound.kwargs)


def run_call(call: Callable[[], Any], label: str, timeout: float | None) -> Any:
    """The call's result, without gradients; in a thread of its own where there is a timeout."""
    outcome: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            with torch.no_grad():
                outcome.put((settled(call()), None))
        except Exception as error:
            outcome.put((None, error))

    if timeout is None:
        work()
    else:
        threading.Thread(target=contextvars.copy_context().run, args=(work,), name=label, daemon=True).start()
    try:
        returned, error = outcome.get(timeout=timeout)
    except queue.Empty:
        raise took_too_long(label, timeout or 0.0) from None
    if isinstance(error, RewardError):
        raise RewardError(f"{label}: {error}", argument=label, value=error.value, allowed=error.allowed) from error
    if error is not None:
        raise RewardError(f"{label} raised {type(error).__name__}: {error}", argument=label) from error
    return returned


def settled(returned: Any) -> Any:
    """What a call of a user's function returned; of a coroutine function what it comes to, also where an event loop runs."""
    if not inspect.isawaitable(returned):
        return returned

    async def wait() -> Any:
        return await returned

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(wait())
    with ThreadPoolExecutor(1) as apart:  # a loop runs in this thread, as in a notebook
        return apart.submit(contextvars.copy_context().run, asyncio.run, wait()).result()


def took_too_long(label: str, timeout: float) -> RewardError:
    """The error of a call that is waited for no longer."""
    return RewardError(
        f"{label} did not return within {timeout:g} s; raise timeout=, or make it faster",
        argument=label,
        allowed=f"a result within {timeout:g} s",
    )


def read_rewards(returned: Any, reward: RewardSource, count: int) -> FloatArray:
    """What a source returned, as `(B, K)`."""
    expected = f"{count} numbers or None, one for each completion"
    if len(reward.names) > 1:
        expected = f"{count} rows of {len(reward.names)} numbers or None, one row for each completion"
    if hasattr(returned, "tolist"):
        returned = returned.tolist()
    if isinstance(returned, (str, bytes, Mapping)) or not isinstance(returned, Sequence):
        raise RewardError(
            f"{reward.label} returned {_shown(returned)}, a {type(returned).__name__}; expected {expected}",
            argument=reward.label,
            value=returned,
            allowed=expected,
        )
    if len(returned) != count:
        raise RewardError(
            f"{reward.label} returned {len(returned)} values for {count} completions; expected {expected}",
            argument=reward.label,
            value=len(returned),
            allowed=count,
        )
    table = np.full((count, len(reward.names)), np.nan)
    for row, value in enumerate(returned):
        numbers = value.tolist() if hasattr(value, "tolist") else value
        numbers = (
            list(numbers)
            if isinstance(numbers, (list, tuple))
            else [numbers] * (len(reward.names) if numbers is None else 1)
        )
        if len(numbers) != len(reward.names) or not all(_is_reward(number) for number in numbers):
            raise RewardError(
                f"{reward.label} returned {_shown(value)} for completion {row}; expected {expected}. "
                "Return None for a completion that has no reward",
                argument=reward.label,
                value=value,
                allowed=expected,
            )
        table[row] = [math.nan if number is None else float(number) for number in numbers]
    return table


def check_numbers(reward: RewardSource, known: Sequence[int], count: int) -> None:
    """See that each objective of a source has a number, so that its mean can be measured.

    Args:
        reward: the source.
        known: how many completions have a number, for each of its K objectives.
        count: of how many.

    Raises:
        RewardError: an objective has none.
    """
    empty = [name for name, numbers in zip(reward.names, known, strict=True) if not numbers]
    if empty:
        raise RewardError(
            f"{reward.label} returned no number for any of {count} completions (objectives {empty}), only None or NaN; "
            "without one there is no mean to measure",
            argument=reward.label,
            value=empty,
        )


def _is_reward(number: Any) -> bool:
    if number is None:
        return True
    return isinstance(number, (int, float, np.number)) and not math.isinf(float(number))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "..."
