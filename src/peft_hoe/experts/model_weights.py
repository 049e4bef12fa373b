"""A full set of weights, the base's or a fine-tune's, by the names of the model's parameters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..files import read_json
from .architecture import Architecture
from .checkpoints import FLOATING, Checkpoint
from .weight_files import WeightFile, open_file


class ModelWeights:
    """The base's weights or a fine-tune's, checked to fit the base and read one parameter at a time.

    Args:
        directory: a checkpoint.
        label: how errors call it.
        architecture: of the base.
        allow_pickle: as in `Checkpoint`, and so is the rest.
        open_shard: see there.

    Raises:
        CheckpointError: a weight in scope is missing or has another shape; the message shows both shapes.
    """

    def __init__(
        self,
        directory: Path,
        label: str,
        architecture: Architecture,
        *,
        allow_pickle: bool = False,
        open_shard: Callable[[Path], WeightFile] = open_file,
    ) -> None:
        self.label = label
        self.checkpoint = Checkpoint(directory, label, allow_pickle=allow_pickle, open_shard=open_shard)
        self.located = architecture.names.locate(self.checkpoint.names)
        config = directory / "config.json"
        own_type = read_json(config).get("model_type") if config.is_file() else architecture.model_type
        self._check_fit(architecture, own_type)
        self.dtype = self.checkpoint.dtype(self.located[architecture.targets[0].weight])

    def _check_fit(self, architecture: Architecture, own_type: str | None) -> None:
        kinds = "" if own_type == architecture.model_type else f" (its config says {own_type!r})"
        for target in architecture.targets:
            expected = (
                f"{target.weight!r} of shape {target.shape} of the base's architecture {architecture.model_type!r}"
            )
            if target.weight not in self.located:
                raise CheckpointError(
                    f"{self.label} has no tensor for {expected}{kinds}; its tensors are such as "
                    f"{self._example()}. Pass a checkpoint of the base's architecture, or exclude the module",
                    path=self.checkpoint.directory, tensor=target.weight, allowed=target.shape,
                )  # fmt: skip
            name = self.located[target.weight]
            shape, dtype = self.checkpoint.shape(name), self.checkpoint.dtype(name)
            if shape != target.shape:
                raise CheckpointError(
                    f"{self.label}: tensor {name!r} has shape {shape}, but {expected} was expected{kinds}; policies "
                    "must be fine-tunes of the base",
                    path=self.checkpoint.directory, tensor=name, value=shape, allowed=target.shape,
                )  # fmt: skip
            if dtype not in FLOATING:
                raise CheckpointError(
                    f"{self.label}: tensor {name!r} is stored as {dtype}, which means nothing without its quantiser; "
                    "pass the weights in float32, bfloat16 or float16",
                    path=self.checkpoint.directory, tensor=name, value=dtype, allowed=FLOATING,
                )  # fmt: skip
        if kinds:
            raise CheckpointError(
                f"{self.label} is a {own_type!r}, but the base is a {architecture.model_type!r}; policies must be "
                "fine-tunes of the base",
                path=self.checkpoint.directory, argument="model_type", value=own_type, allowed=[architecture.model_type],
            )  # fmt: skip

    def _example(self) -> str:
        return ", ".join(f"{name!r} {self.checkpoint.shape(name)}" for name in self.checkpoint.names[:2]) or "none"

    def shape(self, parameter: str) -> tuple[int, ...]:
        """The shape of one parameter as it is stored."""
        return self.checkpoint.shape(self.located[parameter])

    def stored_dtype(self, parameter: str) -> torch.dtype:
        """The dtype of one parameter as it is stored."""
        return self.checkpoint.dtype(self.located[parameter])

    def rows(self, parameter: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of one parameter, in the dtype of the file."""
        return self.checkpoint.rows(self.located[parameter], start, stop)

    def expect(self, parameter: str) -> None:
        """Say that one parameter will be read soon."""
        self.checkpoint.expect(self.located[parameter])

    def shard(self, parameter: str) -> str | None:
        """The file of one parameter, where it is fetched to be read."""
        return self.checkpoint.shard(self.located[parameter])

    def peek(self, parameter: str, start: int, stop: int) -> Tensor | None:
        """As `rows`, without fetching more than that; None where it cannot be done."""
        return self.checkpoint.peek(self.located[parameter], start, stop)

    def here(self, parameter: str) -> bool:
        """Whether one parameter can be read without fetching."""
        return self.checkpoint.here(self.located[parameter])

    def bring(self, parameter: str) -> None:
        """Have the file of one parameter on this disk."""
        self.checkpoint.bring(self.located[parameter])

    def stored(self, parameter: str) -> Tensor:
        """One parameter as it is stored."""
        return self.checkpoint.tensor(self.located[parameter])
