"""Prompts of a published dataset, from the Hub or from local files in the published schema."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import HoEError
from .templates import PromptTemplate

Row = Mapping[str, Any]
_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class Files:
    """Where the rows of a split, or a part of them, are.

    Attributes:
        split: the split's name on the Hub.
        config: the configuration's name on the Hub.
        word: what the path of a local file holds, as a word of its own; several parts of a split are told apart by it.
        url: instead of a Hub split, files that `datasets` can open.
        columns: further columns, the same for all rows.
    """

    split: str
    config: str | None = None
    word: str | None = None
    url: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DatasetRecipe:
    """A dataset of prompts.

    Attributes:
        id: on the Hub, or the address of the file.
        columns: that a row must have.
        read: from a published row, the columns of the result; `content` is the template's. None drops the row.
        template: of the policy's prompt.
        splits: `{name: parts}`.
        folds: whether the Hub's only split is shared between "train" and "test": every tenth distinct prompt is a test prompt.
        choices: what `read` does beyond renaming, in words.

    >>> from peft_hoe import recipes
    >>> [dataset.id for dataset in recipes.get("helpful-assistant").datasets]
    ['Anthropic/hh-rlhf']
    """

    id: str
    columns: tuple[str, ...]
    read: Callable[[Row], dict[str, Any] | None]
    template: PromptTemplate
    splits: Mapping[str, tuple[Files, ...]]
    folds: bool = False
    choices: str = ""

    def load(self, split: str, source: str | Path | None, limit: int | None, seed: int | None) -> Any:
        """A `datasets.Dataset` with `prompt` and the other columns of `read`; each prompt once, in the published order.

        Args:
            split: a name of `splits`.
            source: a local file, or a folder with files; None: the Hub.
            limit: prompts at most; parts give equal numbers.
            seed: shuffles before the limit.

        Raises:
            HoEError: no file of the split, a file of another schema, or no prompt.
        """
        if limit is not None and limit < 1:
            raise HoEError(
                f"limit is {limit}; give a number of prompts of at least 1, or None for all",
                argument="limit", value=limit, allowed="at least 1, or None",
            )  # fmt: skip
        parts = self.splits[split]
        rows: list[dict[str, Any]] = []
        seen: set[str] = set()
        for index, files in enumerate(parts):
            part = [row for row in self._rows(files, source, split) if _is_new(row["prompt"], seen)]
            if self.folds:
                part = [row for position, row in enumerate(part) if (position % 10 == 0) == (split == "test")]
            if seed is not None:
                random.Random(seed).shuffle(part)
            if limit is not None:
                part = part[: limit * (index + 1) // len(parts) - limit * index // len(parts)]
            rows += part
        if not rows:
            raise HoEError(
                f"{source or self.id} holds no prompt for the split {split!r} ({self.choices or 'it is empty'})",
                argument="source", value=source or self.id,
            )  # fmt: skip
        return _datasets().Dataset.from_list(rows)

    def _rows(self, files: Files, source: str | Path | None, split: str) -> Iterator[dict[str, Any]]:
        published, shown = self._published(files, source, split)
        missing = [name for name in self.columns if name not in published.column_names]
        if missing:
            raise HoEError(
                f"{shown} has no column {', '.join(map(repr, missing))}, only {published.column_names}; it must have the "
                f"schema of {self.id}: {list(self.columns)}",
                argument=missing[0], value=published.column_names, allowed=list(self.columns),
            )  # fmt: skip
        for number, row in enumerate(published):
            try:
                columns = self.read({**row, **files.columns})
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise HoEError(
                    f"row {number} of {shown} is not as {self.id} has it ({type(error).__name__}: {error})",
                    argument="source", value=row,
                ) from None  # fmt: skip
            if columns is not None:
                content = columns.pop("content")
                yield {"prompt": self.template.fill(content), **columns}

    def _published(self, files: Files, source: str | Path | None, split: str) -> tuple[Any, str]:
        datasets = _datasets()
        if source is not None:
            paths = self._local(files, Path(source), split)
            data = {"path": _format(paths[0]), "data_files": [str(path) for path in paths], "split": "train"}
            shown = ", ".join(map(str, paths))
        elif files.url is not None:
            kind = _format(Path(files.url.split("::")[0]))
            data, shown = {"path": kind, "data_files": files.url, "split": "train"}, files.url
        else:
            data, shown = {"path": self.id, "name": files.config, "split": files.split}, self.id
        try:
            return datasets.load_dataset(**data), shown
        except Exception as error:  # whatever the Hub, the network and the parsers of files raise
            raise HoEError(
                f"cannot load {shown} ({type(error).__name__}: {error})"
                + ("" if source else "; without network, give source=, a local file or folder in the published schema"),
                argument="source", value=shown,
            ) from error  # fmt: skip

    def _local(self, files: Files, source: Path, split: str) -> list[Path]:
        """The data files of a part, of one format."""
        if not source.exists():
            raise HoEError(
                f"there is no file or folder {source}; give one in the schema of {self.id}, or None for the Hub",
                argument="source", value=str(source),
            )  # fmt: skip
        if source.is_file():
            words = {source: _words(source.name)}
        else:
            paths = sorted(path for path in source.rglob("*") if _format(path))
            words = {path: _words(str(path.relative_to(source))) for path in paths}
        chosen = self._choose(files, split, words, named=source.is_file())
        formats = {_format(path) for path in chosen}
        if not chosen or len(formats) > 1 or None in formats:
            word = files.word or files.split
            raise HoEError(
                f"{source} has {[str(path) for path in chosen or words]}; looked for were files with {word!r} in their names, "
                f"of one of the formats {sorted(_FORMATS)} (.gz too). Give the file itself, or a folder with such files",
                argument="source", value=str(source), allowed=f"files with {word!r} in their names, of one format",
            )  # fmt: skip
        return chosen

    def _choose(self, files: Files, split: str, words: Mapping[Path, list[str]], named: bool) -> list[Path]:
        """The files whose names hold the part's word; `named`: the user gave a file, not a folder."""
        chosen = [path for path in words if (files.word or files.split) in words[path]]
        # A copy of a repository with several configurations has a folder for each.
        chosen = [path for path in chosen if files.config in words[path]] or chosen
        others = {other.word or other.split for parts in self.splits.values() for other in parts}
        unclear = len(words) == 1 and (named or not others.intersection(*words.values()))
        # A name that tells nothing will do where nothing else needs to be told apart by it.
        return list(words) if not chosen and unclear and len(self.splits[split]) == 1 else chosen


def _is_new(prompt: str, seen: set[str]) -> bool:
    new = prompt not in seen
    seen.add(prompt)
    return new


def _format(path: Path) -> str | None:
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    return _FORMATS.get(suffixes[-1]) if suffixes else None


def _words(path: str) -> list[str]:
    return re.split(r"[^a-z0-9]+", path.lower())


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise HoEError('prompts of recipes need the package datasets: pip install "peft-hoe[eval]"') from error
    return datasets
