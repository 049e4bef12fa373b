"""Prompts: which rows of a dataset an update uses, and how they become a batch.

Shapes: B prompts, P positions, padded on the left.
"""

from __future__ import annotations

import itertools
import operator
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from ..errors import HoEError, HoEWarning

_NOT_COLUMNS = ("prompt", "input_ids", "attention_mask")


@dataclass
class PromptBatch:
    """Prompts as the policy and the rewards see them.

    Attributes:
        ids: `(B, P)`.
        mask: `(B, P)`, False on padding.
        texts: B prompts as the rewards see them: the dataset's own, text or chat messages, else decoded.
        columns: the dataset's other columns, B values each.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    texts: list[Any]
    columns: dict[str, list[Any]]

    def select(self, rows: Sequence[int]) -> PromptBatch:
        """Those rows, in that order, with repetitions where they repeat."""
        place = torch.as_tensor(rows, device=self.ids.device)
        columns = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        return PromptBatch(self.ids[place], self.mask[place], [self.texts[row] for row in rows], columns)


class PromptCollator:
    """The default collator: pads `input_ids` on the left, and passes other columns on as lists.

    Rows without `input_ids` have a `prompt`: text, or chat messages, which go through the tokenizer's chat template.
    """

    def __init__(self, processing_class: Any) -> None:
        self.tokenizer = getattr(processing_class, "tokenizer", processing_class)
        if self.tokenizer.pad_token_id is None:
            raise HoEError("the tokenizer has no padding token; set tokenizer.pad_token, for example to its eos_token")

    def __call__(self, rows: Sequence[Mapping[str, Any]], numbers: Sequence[int] | None = None) -> dict[str, Any]:
        """`input_ids` and `attention_mask` `(B, P)`, other columns as lists.

        Args:
            rows: B rows of a dataset.
            numbers: their numbers in the dataset, for errors; default their places in the batch.

        Raises:
            HoEError: a row holds no prompt, or lacks a column that another one has.
        """
        labels = [f"row {i} of the batch" for i in range(len(rows))]
        if numbers is not None:
            labels = [f"row {number} of the dataset" for number in numbers]
        for row, label in zip(rows, labels, strict=True):
            check_prompt(row, label)
        sequences = [list(self.ids(row)) for row in rows]
        for ids, label in zip(sequences, labels, strict=True):
            if not ids:
                raise HoEError(f"{label} has a `prompt` without a single token; leave the row out")
        width = max(map(len, sequences))
        pad = self.tokenizer.pad_token_id
        batch: dict[str, Any] = {
            "input_ids": torch.tensor([[pad] * (width - len(ids)) + ids for ids in sequences]),
            "attention_mask": torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in sequences]),
        }
        for name in dict.fromkeys(name for row in rows for name in row):
            if name not in batch:
                batch[name] = _column(name, rows, labels)
        return batch

    def ids(self, row: Mapping[str, Any]) -> Sequence[int]:
        """The tokens of a row's prompt."""
        if row.get("input_ids") is not None:
            ids: Sequence[int] = row["input_ids"]
            return ids
        prompt = row["prompt"]
        if isinstance(prompt, str):
            encoded: Sequence[int] = self.tokenizer(prompt)["input_ids"]
            return encoded
        text = self.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        rendered: Sequence[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return rendered


def _column(name: str, rows: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> list[Any]:
    """A column's values; rows with `input_ids` need no `prompt`."""
    for row, label in zip(rows, labels, strict=True):
        if name not in row and name != "prompt":
            raise HoEError(
                f"{label} has no column {name!r}, which others have; give it there, as None where it is unknown"
            )
    return [row.get(name) for row in rows]


def check_prompt(row: Mapping[str, Any], label: str) -> None:
    """See that a row holds a prompt that `PromptCollator` can read; its tokens are not counted.

    Args:
        row: of a dataset.
        label: what errors call it.

    Raises:
        HoEError: it holds none, or one of the wrong type.
    """
    if not isinstance(row, Mapping):
        raise HoEError(f"{label} is {_shown(row)}; rows are mappings from column names to values")
    ids, prompt = row.get("input_ids"), row.get("prompt")
    if ids is None and prompt is None:
        raise HoEError(
            f"{label} holds no prompts: its columns are {sorted(row)}, and neither `prompt` (text or chat messages) nor "
            "`input_ids` has a value"
        )
    if ids is not None and not _is_tokens(ids):
        raise HoEError(f"{label} has the `input_ids` {_shown(ids)}; give the numbers of one prompt's tokens")
    if ids is None and not isinstance(prompt, str) and not _is_chat(prompt):
        raise HoEError(
            f"{label} has the `prompt` {_shown(prompt)}; give text, or chat messages "
            '[{"role": "user", "content": ...}]'
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


def check_prompts(dataset: Any, processing_class: Any) -> None:
    """See that the rows of a dataset hold prompts: all of them where that needs no tokens and no user's code, else the first.

    Raises:
        HoEError: a row holds none, or the dataset is empty.
    """
    if len(dataset) == 0:
        raise HoEError("the training dataset is empty; give it at least one prompt")
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


def as_prompt_batch(batch: Mapping[str, Any], processing_class: Any, device: torch.device) -> PromptBatch:
    """What a collator returned, on the policy's device; prompts that have no `prompt` are decoded.

    Raises:
        HoEError: the collator returned no `input_ids`, or padded on the right.
    """
    if "input_ids" not in batch:
        raise HoEError(f"the data collator returned {sorted(batch)}; it must return `input_ids`")
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    ids = batch["input_ids"].to(device)
    mask = batch["attention_mask"].to(device).bool() if "attention_mask" in batch else ids != tokenizer.pad_token_id
    if not bool(mask[:, -1].all()):
        raise HoEError('the data collator pads on the right; prompts are continued, so set padding_side="left"')
    given = batch.get("prompt")
    prompts = [None] * len(ids) if given is None else list(given)
    for i, prompt in enumerate(prompts):
        if prompt is None:
            prompts[i] = tokenizer.decode(ids[i][mask[i]], skip_special_tokens=True)
    columns = {name: list(values) for name, values in batch.items() if name not in _NOT_COLUMNS}
    return PromptBatch(ids, mask, prompts, columns)


def as_dataset(rows: Any) -> Any:
    """A Dataset of a list of rows, also of each of several by name; anything else as it is."""
    if isinstance(rows, dict):
        return {name: as_dataset(each) for name, each in rows.items()}
    return Dataset.from_list(list(rows)) if isinstance(rows, (list, tuple)) else rows


def with_prompts(rows: Any, processing_class: Any) -> Any:
    """A dataset of the rows, whose first one has been looked at.

    Raises:
        HoEError: there are none, or none with a prompt.
    """
    first = list(itertools.islice(rows, 1))
    check_prompts(first, processing_class)
    if first[0].get("prompt") is None:
        raise HoEError(
            f"the training dataset holds no prompts: its columns are {sorted(first[0])}. GRPO needs `prompt`, as text or chat "
            "messages; `input_ids` alone cannot be given to rewards"
        )
    return as_dataset(rows)


def moved(batches: list[dict[str, Any]], device: Any) -> list[dict[str, Any]]:
    """Batches with their tensors on a device."""
    return [
        {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
        for batch in batches
    ]


def is_chat(prompt: Any) -> bool:
    """Whether a prompt is a list of chat messages rather than text."""
    return (
        not isinstance(prompt, str) and isinstance(prompt, Sequence) and all(isinstance(turn, dict) for turn in prompt)
    )
