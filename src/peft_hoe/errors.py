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

    >>> import peft_hoe
    >>> try:
    ...     peft_hoe.parse_preference([0.5, 0.9], ["helpful", "harmless"])
    ... except peft_hoe.HoEError as error:
    ...     print(error.value)
    [0.5, 0.9]
    """

    def __init__(self, message: str, *, argument: str | None = None, value: Any = None, allowed: Any = None) -> None:
        super().__init__(message)
        self.argument, self.value, self.allowed = argument, value, allowed


class PreferenceError(HoEError):
    """A preference is not a point of the simplex, has the wrong shape or names an unknown objective.

    Attributes: those of HoEError; `allowed` is the list of objectives where a name is unknown.

    >>> from peft_hoe import PreferenceError, parse_preference
    >>> try:
    ...     parse_preference({"helpful": 0.5, "funny": 0.5}, ["helpful", "harmless"])
    ... except PreferenceError as error:
    ...     print(error.allowed)
    ['helpful', 'harmless']
    """


class RowsError(PreferenceError):
    """Rows have different preferences, but a module cannot tell which of its inputs belongs to which row.

    What it is raised for works with one preference for the whole batch.

    Attributes, besides HoEError's:

        module: name of the module.
        shape: of the input that it was given.

    >>> from peft_hoe import RowsError
    >>> error = RowsError("rows differ", module="model.layers.0.mlp.experts.3", shape=(5, 64))
    >>> error.module, error.shape
    ('model.layers.0.mlp.experts.3', (5, 64))
    """

    def __init__(self, message: str, *, module: str | None = None, shape: Sequence[int] | None = None, **data: Any):
        super().__init__(message, **data)
        self.module = module
        self.shape = None if shape is None else tuple(shape)


class ExpertError(HoEError):
    """The experts or routers of a configuration contradict each other or the objectives.

    >>> from peft_hoe import ExpertError, HoEConfig
    >>> try:
    ...     HoEConfig(objectives=["helpful", "harmless"], r=0)
    ... except ExpertError as error:
    ...     print(error)
    r is 0; a rank is a whole number of at least 1
    """


class ModuleError(HoEError):
    """A module of the base model cannot be adapted.

    Attributes, besides HoEError's:

        module: its name.
    """

    def __init__(self, message: str, *, module: str | None = None, **data: Any) -> None:
        super().__init__(message, **data)
        self.module = module


class CheckpointError(HoEError):
    """A checkpoint or adapter file is unreadable, incomplete, of the wrong shape or not finite.

    Attributes, besides HoEError's:

        path: of the file, where it is known.
        tensor: key of the tensor.

    >>> from pathlib import Path
    >>> from peft import PeftModel
    >>> from peft_hoe import CheckpointError, demo
    >>> report = demo.build_demo_adapter("adapter")
    >>> weights = Path("adapter/adapter_model.safetensors")
    >>> _ = weights.write_bytes(weights.read_bytes()[:1000])
    >>> try:
    ...     _ = PeftModel.from_pretrained(demo.load_base(), "adapter")
    ... except CheckpointError as error:
    ...     print(Path(error.path).name)
    adapter_model.safetensors
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

    >>> from peft_hoe import StaticMergeError, demo
    >>> model = demo.load_demo_adapter(routers=[[0.75, 0.25]])
    >>> model.mark_trained("r0")
    >>> try:
    ...     model.set_preference([0.75, 0.25])
    ...     model.merge_adapter()
    ... except StaticMergeError as error:
    ...     print(error.routers)
    ['r0']
    """

    def __init__(self, message: str, *, module: str | None = None, routers: Sequence[str] = (), **data: Any) -> None:
        super().__init__(message, **data)
        self.module, self.routers = module, list(routers)


class RewardError(HoEError):
    """A reward is missing, matches no objective, hangs, or did not return one number for each sample.

    >>> from peft_hoe import RewardError
    >>> from peft_hoe.rewards import Rewards
    >>> rewards = Rewards({"short": lambda prompts, completions: ["yes"]}, ["short"])
    >>> try:
    ...     rewards(["Say no."], ["No."])
    ... except RewardError as error:
    ...     print("short" in str(error))
    True
    """


class MetricError(HoEError):
    """Points, preferences or a reference point cannot be measured: empty, NaN, infinite, or of the wrong shape.

    >>> from peft_hoe import MetricError
    >>> from peft_hoe.metrics import hypervolume
    >>> try:
    ...     hypervolume([[1.0, float("nan")]], reference_point=0.0)
    ... except MetricError as error:
    ...     print("NaN" in str(error))
    True
    """


class HoEWarning(UserWarning):
    """Something works, but perhaps not as its user expects.

    >>> import warnings
    >>> from peft_hoe import HoEConfig, HoEWarning
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     _ = HoEConfig(objectives=["helpful", "harmless"], experts=[[1, 0], [0.5, 0.5]])
    >>> issubclass(caught[0].category, HoEWarning)
    True
    """


def check_choice(argument: str, value: Any, allowed: Sequence[Any], error: type[HoEError] = HoEError) -> None:
    """See that a value is one of its choices.

    Raises:
        HoEError: it is not; or the given subclass of it.
    """
    if value not in allowed:
        choices = ", ".join(map(repr, allowed))
        raise error(f"{argument} is {value!r}; use one of {choices}", argument=argument, value=value, allowed=allowed)
