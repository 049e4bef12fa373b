"""What an adapter's directory holds, told from its configuration, its file's header and its report; no model is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import HoEConfig
from ..contents import check_contents
from ..errors import CheckpointError
from ..files import ADAPTER_WEIGHTS, hoe_settings, read_header, read_json
from .report import REPORT_FILE, BuildReport, ModuleReport, PolicyReport

_WIDTH = 48  # characters between the corners of the picture
_HEIGHT = 12  # lines below its top


@dataclass(frozen=True)
class Inspection:
    """An adapter, by `inspect_adapter`.

    >>> from peft_hoe import demo
    >>> from peft_hoe.experts import inspect_adapter
    >>> report = demo.build_demo_adapter("adapter")
    >>> print(inspect_adapter("adapter").text().splitlines()[1])
    objectives  cheerful, vivid

    Attributes:
        directory: where it lies.
        config: its configuration.
        modules: how many modules have experts.
        numbers: how many numbers each part of the file holds: `experts`, `routers`, `lengths`, `others`.
        file_bytes: size of the file of weights.
        report: of the build, where there is one.
    """

    directory: Path
    config: HoEConfig
    modules: int
    numbers: dict[str, int]
    file_bytes: int
    report: BuildReport | None

    def text(self) -> str:
        """Objectives, experts, placement, routers, sizes and the report, for a terminal."""
        config, objectives = self.config, list(self.config.objectives or [])
        default = config.default_preference
        lines = [
            f"HoE adapter {self.directory} for {config.base_model_name_or_path or 'an unknown base'}",
            f"objectives  {', '.join(objectives)}",
            f"default     {_numbers(default) if default else 'uniform'}; interpolation {config.interpolation}",
            "",
            *_table(["", "expert", *objectives, "rank"], self._experts()),
        ]
        if config.routers:
            lines += ["", *_table(["", "router", *objectives, "votes for", "kind", "trained"], self._routers())]
        lines += ["", *placement(objectives, *self._points()), ""]
        parts = ", ".join(f"{name} {count:,}" for name, count in self.numbers.items() if count)
        lines += [f"{self.modules} modules, {self.file_bytes / 1e6:.1f} MB; numbers: {parts}"]
        return "\n".join(lines + (["", self.report.table()] if self.report else []))

    def _experts(self) -> list[list[str]]:
        pattern = self.config.rank_pattern or {}
        rows = []
        for place, spec in enumerate(self.config.experts or []):
            ranks = {ranks[place] if isinstance(ranks, Sequence) else ranks for ranks in pattern.values()} | {spec.r}
            if len(pattern) >= self.modules:  # no module has the rank that it states
                ranks -= {spec.r}
            shown = f"{min(ranks)} to {max(ranks)}" if len(ranks) > 1 else str(max(ranks, default=spec.r))
            rows.append([_letter(place, "A"), spec.name, *_cells(spec.preference), shown])
        return rows

    def _routers(self) -> list[list[str]]:
        return [
            [
                _letter(place, "a"), spec.name, *_cells(spec.preference), ", ".join(spec.votes_for), spec.kind,
                "yes" if spec.trained else "no",
            ]
            for place, spec in enumerate(self.config.routers or [])
        ]  # fmt: skip

    def _points(self) -> tuple[list[Sequence[float]], list[Sequence[float]]]:
        experts, routers = self.config.experts or [], self.config.routers or []
        return [spec.preference for spec in experts], [spec.preference for spec in routers]


def inspect_adapter(directory: str | os.PathLike[str]) -> Inspection:
    """Read what an adapter's directory says about itself.

    Args:
        directory: with adapter_config.json and adapter_model.safetensors.

    Raises:
        CheckpointError: it holds no HoE adapter, or one whose files contradict each other.

    >>> from peft_hoe import demo
    >>> from peft_hoe.experts import inspect_adapter
    >>> report = demo.build_demo_adapter("adapter")
    >>> found = inspect_adapter("adapter")
    >>> found.modules, [expert.name for expert in found.config.experts]
    (21, ['cheerful', 'vivid', 'centroid'])
    """
    folder = Path(directory)
    hoe_settings(folder, str(folder))
    config: Any = HoEConfig.from_pretrained(str(folder))
    weights = folder / ADAPTER_WEIGHTS
    header = read_header(weights)
    check_contents(config, header, weights)
    numbers = dict.fromkeys(("experts", "routers", "lengths", "others"), 0)
    modules = set()
    for key, tensor in header.items():
        module, _, part = key.rpartition(".hoe_")
        numbers[_PARTS.get(part.partition(".")[0] if module else "", "others")] += _count(tensor.shape)
        if part.startswith("A."):
            modules.add(module)
    report = _report(folder / REPORT_FILE)
    return Inspection(folder, config, len(modules), numbers, weights.stat().st_size, report)


_PARTS = {"A": "experts", "B": "experts", "router": "routers", "length": "lengths"}


def _count(shape: Sequence[int]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


def _report(path: Path) -> BuildReport | None:
    """The report of a build; None where there is none, or one of another version."""
    if not path.is_file():
        return None
    try:
        found: Mapping[str, Any] = read_json(path)
        policies = {name: PolicyReport(**row) for name, row in found["policies"].items()}
        modules = {
            module: {name: ModuleReport(**row) for name, row in rows.items()}
            for module, rows in found["modules"].items()
        }
        return BuildReport(**{**found, "policies": policies, "modules": modules})
    except (CheckpointError, KeyError, TypeError, AttributeError):
        return None


def placement(
    objectives: Sequence[str], experts: Sequence[Sequence[float]], routers: Sequence[Sequence[float]]
) -> list[str]:
    """The lines of a picture of the simplex: experts as capital letters, routers as small ones.

    >>> for line in placement(["kind", "brief"], [[1, 0], [0, 1], [0.5, 0.5]], [[0.75, 0.25]]):
    ...     print(line)
    kind A-----------a-----------C-----------------------B brief

    Args:
        objectives: N names; a picture is drawn of two and three.
        experts: preferences `(L, N)`.
        routers: preferences `(R, N)`.
    """
    marked = [(point, _letter(i, "A")) for i, point in enumerate(experts)]
    marked += [(point, _letter(i, "a")) for i, point in enumerate(routers)]
    if len(objectives) == 2:
        row = ["-"] * (_WIDTH + 1)
        for point, letter in marked:
            row[round(point[1] * _WIDTH)] = letter
        return [f"{objectives[0]} {''.join(row)} {objectives[1]}"]
    if len(objectives) == 3:
        return _triangle(objectives, marked)
    return [f"a placement among {len(objectives)} objectives has no picture"]


def _triangle(objectives: Sequence[str], marked: Sequence[tuple[Sequence[float], str]]) -> list[str]:
    """The first objective on top, the second on the left, the third on the right."""
    rows = [[" "] * (_WIDTH + 1) for _ in range(_HEIGHT + 1)]

    def put(point: Sequence[float], letter: str) -> None:
        rows[round((1 - point[0]) * _HEIGHT)][round((1 + point[2] - point[1]) / 2 * _WIDTH)] = letter

    for step in range(_WIDTH + 1):
        part = step / _WIDTH
        for edge in ((part, 1 - part, 0.0), (part, 0.0, 1 - part), (0.0, part, 1 - part)):
            put(edge, ".")
    for point, letter in marked:
        put(point, letter)
    left = objectives[1]
    top = " " * (len(left) + 1 + _WIDTH // 2 - len(objectives[0]) // 2) + objectives[0]
    lines = [" " * (len(left) + 1) + "".join(row).rstrip() for row in rows]
    return [top, *lines[:-1], f"{left} {''.join(rows[-1])} {objectives[2]}"]


def _letter(place: int, first: str) -> str:
    return chr(ord(first) + place) if place < 26 else "*"


def _cells(preference: Sequence[float]) -> list[str]:
    return [f"{weight:.3g}" for weight in preference]


def _numbers(preference: Sequence[float]) -> str:
    return "[" + ", ".join(_cells(preference)) + "]"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
    ]
