"""Completions by preference and prompt as JSON lines: what a sweep writes, resumes from, and takes from anybody else.

    {"format": "peft-hoe generations", "objectives": ["a", "b"], "prompts": ["Once", ...], ...}       optional header
    {"preference": [0.3, 0.7], "prompt_id": 0, "completion": " upon a time"}                          one for each text

`preference` is a list or `{objective: weight}`; `prompt_id` an index or any other name; `prompt` may stand in a row in place of
a list of prompts. Rows that repeat a preference and prompt are further texts for it, unless `text` numbers them. `run` numbers
runs of training; without it all rows are one run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import HoEError
from ...preference import FloatArray, parse_preference, written

FORMAT = "peft-hoe generations"
Row = dict[str, Any]
# Preference (rounded), prompt id, text, run.
Key = tuple[tuple[float, ...], Any, int, int]


def preference_key(preference: Sequence[float] | FloatArray) -> tuple[float, ...]:
    """A preference as a key: 0.3 and 3 · 0.1 are the same."""
    return tuple(round(float(weight), 9) + 0.0 for weight in preference)


def row_key(row: Row) -> Key:
    """What tells a parsed row from the others."""
    return (preference_key(row["preference"]), row["prompt_id"], row["text"], row["run"])


def read_generations(source: Any) -> tuple[Row, list[Row]]:
    """Header (empty where there is none) and rows of a file, or of rows in memory.

    Args:
        source: a path, or rows: mappings as above or triples (preference, prompt id, completion).

    Raises:
        HoEError: the file cannot be read, or a row is none.
    """
    if isinstance(source, (str, os.PathLike)):
        try:
            lines = (
                Path(source).read_text(encoding="utf-8").split("\n")
            )  # splitlines splits at U+2028 inside of texts too
        except (OSError, ValueError) as error:
            raise HoEError(
                f"cannot read the generations {str(source)!r}: {error}", argument="source", value=str(source)
            ) from None
        where = [f"{source}, line {i}" for i in range(1, len(lines) + 1)]
        items: list[Any] = [_parsed(line, place) for line, place in zip(lines, where, strict=True) if line.strip()]
        where = [place for line, place in zip(lines, where, strict=True) if line.strip()]
    else:
        items = [_as_mapping(item) for item in source]
        where = [f"row {i} of the generations" for i in range(len(items))]
    header: Row = {}
    if items and isinstance(items[0], Mapping) and items[0].get("format") == FORMAT:
        header, items, where = dict(items[0]), items[1:], where[1:]
    for item, place in zip(items, where, strict=True):
        _check_row(item, place)
    return header, [dict(item) for item in items]


def number_texts(rows: Iterable[Row], objectives: Sequence[str]) -> list[Row]:
    """Rows with parsed preferences, and `text` and `run` filled in.

    Raises:
        PreferenceError: a preference is none.
        HoEError: two rows have the same number.
    """
    counts: dict[Any, int] = {}
    parsed: dict[Key, Row] = {}
    for row in rows:
        point = parse_preference(row["preference"], objectives).tolist()
        run = int(row.get("run", 0))
        place = (preference_key(point), row["prompt_id"], run)
        text = int(row["text"]) if "text" in row else counts.get(place, 0)
        counts[place] = counts.get(place, 0) + 1
        full = {**row, "preference": point, "text": text, "run": run}
        if row_key(full) in parsed:
            raise HoEError(
                f"the generations hold text {text} of prompt {row['prompt_id']!r} at preference [{written(point)}] twice; "
                "number texts from 0 with `text`, or leave it out",
                argument="text", value=text,
            )  # fmt: skip
        parsed[row_key(full)] = full
    return list(parsed.values())


def _as_mapping(item: Any) -> Any:
    if isinstance(item, Sequence) and not isinstance(item, str) and len(item) == 3:
        return {"preference": item[0], "prompt_id": item[1], "completion": item[2]}
    return item


def _parsed(line: str, place: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise HoEError(f"{place} is not JSON: {error}", value=line, allowed="JSON") from None


def _check_row(item: Any, place: str) -> None:
    missing = [
        name for name in ("preference", "prompt_id", "completion") if not isinstance(item, Mapping) or name not in item
    ]
    if missing:
        raise HoEError(
            f'{place} lacks {missing}; a row is {{"preference": [0.3, 0.7], "prompt_id": 0, "completion": "..."}}',
            argument=missing[0], value=item,
        )  # fmt: skip
    if not isinstance(item["completion"], str) or not isinstance(item["prompt_id"], (str, int)):
        wrong = "prompt_id" if isinstance(item["completion"], str) else "completion"
        raise HoEError(
            f"{place}: completion must be text and prompt_id a text or integer, but they are {item['completion']!r} and "
            f"{item['prompt_id']!r}",
            argument=wrong, value=item[wrong], allowed="a text" if wrong == "completion" else "a text or integer",
        )  # fmt: skip


class GenerationLog:
    """A file that grows by a batch at a time, so that an interrupted sweep loses at most the batch under way.

    Args:
        path: made where it is missing.
        header: what the texts depend on, plain JSON. A file that was begun with another one is refused.
        overwrite: begin anew in any case.

    Raises:
        HoEError: the file belongs to another sweep, or is none of ours.
    """

    def __init__(self, path: Path, header: Row, *, overwrite: bool = False) -> None:
        self.path, self.header = path, {"format": FORMAT, **header}
        self.done: dict[Key, str] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = b"" if overwrite or not path.exists() else path.read_bytes()
        kept = kept[: kept.rfind(b"\n") + 1]  # a process that was killed may leave half a line
        if kept:
            self._continue(kept)
            with path.open("r+b") as file:
                file.truncate(len(kept))
        else:
            path.write_text(json.dumps(self.header) + "\n", encoding="utf-8")

    def _continue(self, kept: bytes) -> None:
        lines = kept.decode().split("\n")[:-1]
        found, rows = read_generations([_parsed(line, f"{self.path}, line {i}") for i, line in enumerate(lines, 1)])
        before, now = _flat(found), _flat(json.loads(json.dumps(self.header)))
        differing = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
        if differing:
            shown = "; ".join(
                f"{name}: {_short(before.get(name))} there, {_short(now.get(name))} now" for name in differing
            )
            raise HoEError(
                f"{self.path} was begun by another sweep ({shown}); use another output directory, or "
                "overwrite=True (--overwrite)",
                argument=differing[0], value=now.get(differing[0]), allowed=before.get(differing[0]),
            )  # fmt: skip
        self.done = {row_key(row): row["completion"] for row in number_texts(rows, self.header["objectives"])}

    def append(self, rows: Sequence[Row]) -> None:
        """Write the rows of a batch."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
        self.done |= {row_key(row): row["completion"] for row in rows}


def _flat(header: Row) -> Row:
    """Entries of a header and of the mappings in it; what a method is called may change."""
    flat: Row = {}
    for name, value in header.items():
        flat |= {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, Mapping) else {name: value}
    return {name: value for name, value in flat.items() if name != "name"}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
