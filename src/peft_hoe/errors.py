"""The exceptions and warnings of peft_hoe. All errors that a user's input can cause are `ValueError`s.

An error's text is for people: the value, what is allowed, the remedy. Programs read the same from its attributes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any


class HoEError(ValueError):
    """Base class of every error that peft_hoe raises about its input.

    Attributes, each None where an error has nothing to say about it:

        argument: name of the argument, option, field or column at fault, as its user writes it.
        value: what it was given.
        allowed: what it may be: a sequence of choices, or a phrase such as "at least 1".
    """

    def __init__(self, message: str, *, argument: str | None = None, value: Any = None, allowed: Any = None) -> None:
        super().__init__(message)
        self.argument, self.value, self.allowed = argument, value, allowed


class PreferenceError(HoEError):
    """A preference is not a point of the simplex, has the wrong shape or names an unknown objective.

    Attributes: those of HoEError; `allowed` is the list of objectives where a name is unknown.
    """


class RowsError(PreferenceError):
    """Rows have different preferences, but a module cannot tell which of its inputs belongs to which row.

    What it is raised for works with one preference for the whole batch.

    Attributes, besides HoEError's:

        module: name of the module.
        shape: of the input that it was given.
    """

    def __init__(self, message: str, *, module: str | None = None, shape: Sequence[int] | None = None, **data: Any):
        super().__init__(message, **data)
        self.module = module
        self.shape = None if shape is None else tuple(shape)


class ExpertError(HoEError):
    """The experts or routers of a configuration contradict each other or the objectives."""


class CheckpointError(HoEError):
    """A checkpoint or adapter file is unreadable, incomplete, of the wrong shape or not finite.

    Attributes, besides HoEError's:

        path: of the file, where it is known.
        tensor: key of the tensor.
    """

    def __init__(
        self, message: str, *, path: str | os.PathLike[str] | None = None, tensor: str | None = None, **data: Any
    ) -> None:
        super().__init__(message, **data)
        self.path = None if path is None else os.fspath(path)
        self.tensor = tensor


class StaticMergeError(HoEError):
    """Weights cannot be merged because a vote depends on the input, the rows differ or the base is quantised.

    Attributes, besides HoEError's:

        module: name of the module that cannot be merged, where it is one module's fault.
        routers: names of the trained routers that vote there.
    """

    def __init__(self, message: str, *, module: str | None = None, routers: Sequence[str] = (), **data: Any) -> None:
        super().__init__(message, **data)
        self.module, self.routers = module, list(routers)


class RewardError(HoEError):
    """A reward is missing, matches no objective, hangs, or did not return one number for each sample."""


class MetricError(HoEError):
    """Points, preferences or a reference point cannot be measured: empty, NaN, infinite, or of the wrong shape."""


class HoEWarning(UserWarning):
    """Something works, but perhaps not as its user expects."""


def check_choice(argument: str, value: Any, allowed: Sequence[Any], error: type[HoEError] = HoEError) -> None:
    """See that a value is one of its choices.

    Raises:
        HoEError: it is not; or the given subclass of it.
    """
    if value not in allowed:
        choices = ", ".join(map(repr, allowed))
        raise error(f"{argument} is {value!r}; use one of {choices}", argument=argument, value=value, allowed=allowed)
