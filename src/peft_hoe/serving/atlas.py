"""An atlas: one LoRA for every preference of a grid, for engines that know nothing but files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import HoEError
from ..files import ADAPTER_CONFIG
from ..output_directory import check_output, complete_directory
from .export_report import ExportReport, size
from .lora import open_front, open_source, refuse_unread
from .lora_exporter import LoraExporter
from .preference_grid import PreferenceGrid

INDEX_FILE = "atlas.json"


@dataclass(frozen=True)
class AtlasPlan:
    """What an atlas will hold, before it is written.

    Attributes:
        names: folders, one for each preference; the spelling of `PreferenceGrid`.
        bytes: size of all weights.
    """

    names: list[str]
    bytes: int

    def __str__(self) -> str:
        return (
            f"{len(self.names)} LoRAs, {size(self.bytes / len(self.names))} each on average, {size(self.bytes)} in all"
        )


def export_atlas(
    source: nn.Module | str | os.PathLike[str],
    step: float,
    output: str | os.PathLike[str],
    *,
    rank: int | None = None,
    dtype: torch.dtype | str | None = None,
    even: bool = False,
    routers: str = "keep",
    prompts: Sequence[Any] | None = None,
    tokenizer: Any = None,
    adapter_name: str | None = None,
    base: str | os.PathLike[str] | None = None,
    sweep: Any = None,
    rewards: Any = None,
    dry_run: bool = False,
    tell: Callable[[str], Any] = lambda line: None,
) -> list[ExportReport]:
    """Write the LoRA of every preference of a grid into a folder of its own, and `atlas.json` that lists them.

    Args:
        source: as for `export_lora`, and so are the options below.
        step: between neighbouring weights, such as 0.1.
        output: directory for the folders.
        rank: as for `export_lora`.
        dtype: as for `export_lora`.
        even: as for `export_lora`.
        routers: as for `export_lora`.
        prompts: as for `export_lora`.
        tokenizer: as for `export_lora`.
        adapter_name: as for `export_lora`.
        base: as for `export_lora`.
        sweep: as for `export_lora`; measured once, and told in every report.
        rewards: as for `export_lora`.
        dry_run: only tell the size.
        tell: is told the number and size of the LoRAs before the first is written.

    Raises:
        HoEError: the disk has no room for it, or what `export_lora` raises.
    """
    directory = Path(output)
    adapter, calibration = open_source(source, prompts, tokenizer, adapter_name, base)
    refuse_unread(adapter, base)
    check_output(directory, overwrite=None)
    front = open_front(source, tokenizer, sweep, rewards)
    exporter = LoraExporter(
        adapter, rank=rank, dtype=dtype, even=even, routers=routers, calibration=calibration, front=front
    )
    grid = PreferenceGrid(adapter.objectives, step)
    plan = AtlasPlan([grid.spell(point) for point in grid.points], sum(map(exporter.bytes, grid.points)))
    tell(str(plan))
    if dry_run:
        return []
    for point in grid.points:  # a folder that was begun would have to be removed by hand
        exporter.check(point)
    _check_room(directory, plan)
    reports = []
    for name, point in zip(plan.names, grid.points, strict=True):
        with complete_directory(directory / name) as building:
            reports.append(exporter.write(point, building, shown_as=directory / name))
    index = {
        "objectives": adapter.objectives,
        "step": step,
        "adapters": {
            name: {"preference": report.preference, "config": f"{name}/{ADAPTER_CONFIG}", "rank": report.rank}
            for name, report in zip(plan.names, reports, strict=True)
        },
    }
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return reports


def _check_room(directory: Path, plan: AtlasPlan) -> None:
    there = next(folder for folder in (directory, *directory.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    if plan.bytes > free:
        raise HoEError(
            f"the atlas is {plan}, but {there} has {size(free)} left; take a larger step, --rank or --dtype",
            argument="output", value=plan.bytes, allowed=f"at most {free} bytes",
        )  # fmt: skip
