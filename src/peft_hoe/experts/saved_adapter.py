"""The files of a HoE adapter, opened, and written as they are after changes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import HoEConfig
from ..files import ADAPTER_WEIGHTS, hoe_settings, read_json
from ..growth import Change
from ..output_directory import CARD
from ..tuner.rearranging import rearranged
from .checkpoints import PEFT_PREFIX, Checkpoint, PathOrHubId, fetch
from .report import REPORT_FILE
from .weight_writer import WeightWriter

_PARTS = (
    "hoe_A.weight", "hoe_B.weight", "hoe_router.weight", "hoe_router.bias", "hoe_length.gram", "hoe_norm.weight",
    "hoe_norm.bias",
)  # fmt: skip
Weights = Mapping[str, Sequence[Tensor]]  # of one expert by module: A and B, or the deltas of a norm


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter's files, opened.

    Attributes:
        given: directory or Hub id.
        directory: where the files are.
        config: resolved.
        weights: by name in the file.
        report: of its build; empty where there is none.
    """

    given: PathOrHubId
    directory: Path
    config: HoEConfig
    weights: Checkpoint
    report: dict[str, Any]

    @property
    def modules(self) -> dict[str, dict[str, str]]:
        """`{module: {part: name in the file}}`, in the order of the file."""
        found: dict[str, dict[str, str]] = {}
        for name in self.weights.names:
            part = next((part for part in _PARTS if name.endswith(f".{part}")), None)
            if part is not None:
                found.setdefault(name.removeprefix(PEFT_PREFIX).removesuffix(f".{part}"), {})[part] = name
        return found

    @property
    def low_rank(self) -> list[str]:
        """The modules whose experts are A and B."""
        return [module for module, parts in self.modules.items() if "hoe_A.weight" in parts]

    @property
    def dtype(self) -> torch.dtype:
        """What the experts are stored in."""
        return self.weights.dtype(self.modules[self.low_rank[0]]["hoe_A.weight"])

    def tensors(self, module: str) -> dict[str, Tensor]:
        """The tensors of one module by their parts."""
        return {part: self.weights.tensor(name) for part, name in self.modules[module].items()}


def open_adapter(adapter: PathOrHubId) -> SavedAdapter:
    """Open an adapter's files; nothing is read but names and shapes.

    Raises:
        CheckpointError: it is no HoE adapter, or cannot be fetched or read.
    """
    directory = fetch(adapter, weights=True)
    label = f"adapter {os.fspath(adapter)!r}"
    hoe_settings(directory, label)
    report = read_json(directory / REPORT_FILE) if (directory / REPORT_FILE).is_file() else {}
    return SavedAdapter(adapter, directory, HoEConfig.from_pretrained(directory), Checkpoint(directory, label), report)


def expert_weights(saved: SavedAdapter, module: str, index: int) -> tuple[Tensor, ...]:
    """One expert's A and B, or its deltas of a norm; nothing where it has no weights."""
    tensors = saved.tensors(module)
    if "hoe_norm.weight" in tensors:
        return tuple(tensor[index] for tensor in tensors.values())
    ranks = saved.config.ranks(module)
    rows = slice(sum(ranks[:index]), sum(ranks[: index + 1]))
    return (tensors["hoe_A.weight"][rows], tensors["hoe_B.weight"][:, rows]) if ranks[index] else ()


def write_adapter_changes(
    saved: SavedAdapter, changes: Sequence[Change], added: Weights, report: Mapping[str, Any], directory: Path
) -> None:
    """Write the adapter as it is after the changes.

    Args:
        saved: the adapter.
        changes: one after the other.
        added: the weights of the expert that is new.
        report: of its build; none is written if empty.
        directory: where its files go.

    Raises:
        OSError: there is no room.
    """
    if (saved.directory / CARD).is_file() and not (directory / CARD).is_file():
        shutil.copyfile(saved.directory / CARD, directory / CARD)
    _write_weights(saved, changes, added, directory / ADAPTER_WEIGHTS)
    changes[-1].after.save_pretrained(str(directory))
    if report:
        text = json.dumps(report, indent=2, allow_nan=False) + "\n"
        (directory / REPORT_FILE).write_text(text, encoding="utf-8")


def _write_weights(saved: SavedAdapter, changes: Sequence[Change], added: Weights, path: Path) -> None:
    """One module after the other, so that the adapter is never in memory as a whole."""
    experts = max(len(change.after.expert_names) for change in changes)
    others = [name for name in saved.weights.names if saved.weights.dtype(name) != saved.dtype]
    kept = sum(saved.weights.tensor(name).nbytes for name in others)  # small: lengths, or a head in another dtype
    ours = {name for parts in saved.modules.values() for name in parts.values()}
    whole = [name for name in saved.weights.names if name not in ours]
    names = [f"{PEFT_PREFIX}{module}.{part}" for module in saved.modules for part in _PARTS]
    slots = sum(len(members) for members in changes[-1].after.votes())
    widths = sum(saved.weights.shape(f"{PEFT_PREFIX}{module}.hoe_A.weight")[1] + 1 for module in saved.low_rank)
    room = 2 * kept + 8 * len(saved.modules) * experts**2 + 8 * slots * widths
    with WeightWriter(path, saved.dtype, [*names, *whole], room) as writer:
        for module in saved.modules:
            tensors = saved.tensors(module)
            for change in changes:
                tensors = rearranged(tensors, change, module, added.get(module))
            for part, tensor in tensors.items():
                writer.add(f"{PEFT_PREFIX}{module}.{part}", tensor.contiguous())
        for name in whole:
            writer.add(name, saved.weights.tensor(name))
        writer.finish()
