"""Rows that hold prompts: what people hand over, whether each can be read, and which of them an update uses.

A row is a mapping with `prompt` (text or chat messages) or `input_ids`; its other entries are columns, which rewards read.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset

from ..errors import HoEError, HoEWarning

Columns = dict[str, list[Any]]


def split_rows(given: Any, what: str = "prompts") -> tuple[list[Any], Columns]:
    """Prompts, and the columns beside them.

    Args:
        given: P texts, lists of chat messages, or rows with `prompt` and perhaps other columns, in any iterable, such as a
            datasets.Dataset; a single text is one prompt.
        what: what errors call them.

    Returns:
        P prompts, and `{column: P values}`.

    Raises:
        HoEError: it is no iterable, a prompt is neither text nor chat messages, or a row lacks a column that others have.
    """
    if isinstance(given, Mapping) or not isinstance(given, Iterable):
        raise HoEError(
            f"the {what} are {_shown(given)}; give a list of texts, of chats, or of rows with `prompt`",
            argument=what, value=given,
        )  # fmt: skip
    rows = [
        row if isinstance(row, Mapping) else {"prompt": row} for row in ([given] if isinstance(given, str) else given)
    ]
    names = list(dict.fromkeys(name for row in rows for name in row if name != "prompt"))
    for number, row in enumerate(rows):
        if not isinstance(row.get("prompt"), str) and not _is_chat(row.get("prompt")):
            raise HoEError(
                f"number {number} of the {what} is {_shown(row.get('prompt', row))}; give text, chat messages "
                '[{"role": "user", "content": "..."}], or a row with `prompt`',
                argument=what, value=row.get("prompt"),
            )  # fmt: skip
        absent = [name for name in names if name not in row]
        if absent:
            raise HoEError(
                f"number {number} of the {what} has no column {absent[0]!r}, which others have; give it there, as None where "
                "it is unknown",
                argument=absent[0],
            )
    return [row["prompt"] for row in rows], {name: [row[name] for row in rows] for name in names}


def check_prompt(row: Mapping[str, Any], label: str) -> None:
    """See that a row holds a prompt that `PromptCollator` can read; its tokens are not counted.

    Args:
        row: of a dataset.
        label: what errors call it.

    Raises:
        HoEError: it holds none, or one of the wrong type.
    """
    if not isinstance(row, Mapping):
        raise HoEError(
            f"{label} is {_shown(row)}; rows are mappings from column names to values", argument=label, value=row
        )
    ids, prompt = row.get("input_ids"), row.get("prompt")
    if ids is None and prompt is None:
        raise HoEError(
            f"{label} holds no prompts: its columns are {sorted(row)}, and neither `prompt` (text or chat messages) nor "
            "`input_ids` has a value",
            argument="prompt",
            value=sorted(row),
        )
    if ids is not None and not _is_tokens(ids):
        raise HoEError(
            f"{label} has the `input_ids` {_shown(ids)}; give the numbers of one prompt's tokens",
            argument="input_ids",
            value=ids,
        )
    if ids is None and not isinstance(prompt, str) and not _is_chat(prompt):
        raise HoEError(
            f"{label} has the `prompt` {_shown(prompt)}; give text, or chat messages "
            '[{"role": "user", "content": ...}]',
            argument="prompt",
            value=prompt,
        )


def _is_tokens(ids: Any) -> bool:
    try:
        operator.index(ids[0])
    except (TypeError, IndexError, KeyError, ValueError):
        return False
    return True


def _is_chat(prompt: Any) -> bool:
    return bool(prompt) and is_chat(prompt) and all("role" in turn for turn in prompt)


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 100 else text[:100] + '...'} ({type(value).__name__})"


def check_rows(dataset: Any, what: str = "training dataset") -> None:
    """See that a dataset has rows that can be read by number.

    Raises:
        HoEError: it is a stream, or empty.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__") or isinstance(dataset, Mapping):
        raise HoEError(
            f"the {what} is a {type(dataset).__name__}, whose rows cannot be read by number; give a list of rows, or a "
            "datasets.Dataset (of a stream: Dataset.from_list(list(stream.take(1000))))",
            argument=what.replace("training ", "train_").replace(" ", "_"),
            value=dataset,
        )
    if len(dataset) == 0:
        raise HoEError(f"the {what} is empty; give it at least one row", argument=what)


def check_evaluation_rows(dataset: Any) -> None:
    """See that an evaluation dataset, or each of several by name, has rows; of a stream nothing is known, and None is none.

    Raises:
        HoEError: one is empty.
    """
    named = dataset if isinstance(dataset, Mapping) else {"": dataset}
    empty = [name for name, rows in named.items() if rows is not None and hasattr(rows, "__len__") and len(rows) == 0]
    if empty or not named:
        which = f"the evaluation dataset {empty[0]!r}" if empty and empty[0] else "eval_dataset"
        raise HoEError(
            f"{which} is empty; give it at least one row, or leave it out", argument="eval_dataset", value=dataset
        )


def check_prompts(dataset: Any, processing_class: Any) -> None:
    """See that the rows of a dataset hold prompts: all of them where that needs no tokens and no user's code, else the first.

    Raises:
        HoEError: a row holds none, or the dataset is empty.
    """
    check_rows(dataset)
    for number in _doubtful_rows(dataset):
        check_prompt(dataset[number], f"row {number} of the training dataset")
    row = dataset[0]
    template = getattr(getattr(processing_class, "tokenizer", processing_class), "chat_template", None)
    if template is not None and row.get("input_ids") is None and isinstance(row["prompt"], str):
        warnings.warn(
            "the tokenizer has a chat template, but prompts are plain strings and are tokenised as they are; give chat "
            'messages [{"role": "user", "content": ...}] if the model expects them',
            HoEWarning,
            stacklevel=3,
        )


def _doubtful_rows(dataset: Any) -> Iterable[int]:
    """The rows to look at: of a list all; of a datasets.Dataset the first and those that Arrow knows to be empty."""
    if isinstance(dataset, (list, tuple)):
        return range(len(dataset))
    import datasets

    # A transform makes its columns when rows are read.
    if not isinstance(dataset, datasets.Dataset) or dataset.format["type"] == "custom":
        return [0]
    names = [name for name in ("input_ids", "prompt") if name in dataset.column_names]
    if not names:
        return [0]
    columns = dataset.select_columns(names).with_format("arrow")[:]
    empty = np.logical_and.reduce([_is_empty(columns[name]) for name in names])
    return [0, *np.flatnonzero(empty).tolist()]


def _is_empty(column: Any) -> Any:
    """Which values of an Arrow column are null or lists without elements."""
    parts = []
    for chunk in column.chunks:
        absent = chunk.is_null().to_numpy(zero_copy_only=False)
        if hasattr(chunk, "value_lengths"):
            absent = absent | (chunk.value_lengths().fill_null(0).to_numpy(zero_copy_only=False) == 0)
        parts.append(absent)
    return np.concatenate(parts)


def prompt_rows(size: int, start: int, count: int, seed: int) -> list[int]:
    """Rows `start` to `start + count` of an endless stream that shuffles a dataset of `size` rows anew in every epoch.

    A function of the position alone, so that a resumed run, or another number of processes, sees the same prompts.
    """
    rows: list[int] = []
    while len(rows) < count:
        epoch, offset = divmod(start + len(rows), size)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        shuffled = torch.randperm(size, generator=generator).tolist()
        rows += shuffled[offset : offset + count - len(rows)]
    return rows


def drawn_rows(size: int, count: int, seed: int) -> list[int]:
    """Which `count` rows of a dataset of `size` to measure on: drawn, in their order; all where there are no more.

    Datasets are often sorted, so that the first rows are unlike the others.
    """
    return sorted(prompt_rows(size, 0, min(size, count), seed))


def rows_of_all(source: Any) -> Any:
    """A dataset itself, or the rows of several by name, one after the other: each may be of a task of its own."""
    return ConcatDataset(list(source.values())) if isinstance(source, Mapping) else source


def is_chat(prompt: Any) -> bool:
    """Whether a prompt is a list of chat messages rather than text."""
    return (
        not isinstance(prompt, str) and isinstance(prompt, Sequence) and all(isinstance(turn, dict) for turn in prompt)
    )
