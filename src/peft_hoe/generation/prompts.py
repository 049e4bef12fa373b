"""Prompts as a batch of tokens.

Shapes: B prompts, P positions, padded on the left.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import HoEError
from .prompt_rows import check_prompt
from .vocabulary import tokenizer_of

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

    @property
    def digest(self) -> str:
        """What tells these prompts, in this order, from others: of their tokens, however they are padded."""
        rows = [ids[mask].tolist() for ids, mask in zip(self.ids.cpu(), self.mask.cpu().bool(), strict=True)]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


class PromptCollator:
    """The default collator: pads `input_ids` on the left, and passes other columns on as lists.

    Rows without `input_ids` have a `prompt`: text, or chat messages, which go through the tokenizer's chat template.

    Args:
        processing_class: the tokenizer, with a padding token, or a processor that holds it.
        chat_template_kwargs: arguments of the chat template.
    """

    def __init__(self, processing_class: Any, chat_template_kwargs: Mapping[str, Any] | None = None) -> None:
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.tokenizer = tokenizer_of(processing_class)
        if self.tokenizer.pad_token_id is None:
            raise HoEError(
                "the tokenizer has no padding token; set tokenizer.pad_token, for example to its eos_token",
                argument="processing_class",
            )

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
                raise HoEError(f"{label} has a `prompt` without a single token; leave the row out", argument="prompt")
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
        text = self.tokenizer.apply_chat_template(
            prompt, tokenize=False, add_generation_prompt=True, **self.chat_template_kwargs
        )
        rendered: Sequence[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return rendered


def _column(name: str, rows: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> list[Any]:
    """A column's values; rows with `input_ids` need no `prompt`."""
    for row, label in zip(rows, labels, strict=True):
        if name not in row and name != "prompt":
            raise HoEError(
                f"{label} has no column {name!r}, which others have; give it there, as None where it is unknown",
                argument=name,
            )
    return [row.get(name) for row in rows]


def as_prompt_batch(batch: Mapping[str, Any], processing_class: Any, device: torch.device) -> PromptBatch:
    """What a collator returned, on the policy's device; prompts that have no `prompt` are decoded.

    Raises:
        HoEError: the collator returned no `input_ids`, or padded on the right.
    """
    if "input_ids" not in batch:
        raise HoEError(
            f"the data collator returned {sorted(batch)}; it must return `input_ids`",
            argument="data_collator",
            value=sorted(batch),
        )
    tokenizer = tokenizer_of(processing_class)
    ids = batch["input_ids"].to(device)
    mask = batch["attention_mask"].to(device).bool() if "attention_mask" in batch else ids != tokenizer.pad_token_id
    if not bool(mask[:, -1].all()):
        raise HoEError(
            'the data collator pads on the right; prompts are continued, so set padding_side="left"',
            argument="data_collator",
        )
    given = batch.get("prompt")
    prompts = [None] * len(ids) if given is None else list(given)
    for i, prompt in enumerate(prompts):
        if prompt is None:
            prompts[i] = tokenizer.decode(ids[i][mask[i]], skip_special_tokens=True)
    columns = {name: list(values) for name, values in batch.items() if name not in _NOT_COLUMNS}
    return PromptBatch(ids, mask, prompts, columns)
