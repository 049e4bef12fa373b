"""Prompts: which rows of a dataset an update uses, and how they become a batch.

Shapes: B prompts, P positions, padded on the left.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

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


class PromptCollator:
    """The default collator: pads `input_ids` on the left, and passes other columns on as lists.

    Rows without `input_ids` have a `prompt`: text, or chat messages, which go through the tokenizer's chat template.
    """

    def __init__(self, processing_class: Any) -> None:
        self.tokenizer = getattr(processing_class, "tokenizer", processing_class)
        if self.tokenizer.pad_token_id is None:
            raise HoEError("the tokenizer has no padding token; set tokenizer.pad_token, for example to its eos_token")

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """`input_ids` and `attention_mask` `(B, P)`, other columns as lists."""
        sequences = [list(self.ids(row)) for row in rows]
        width = max(map(len, sequences))
        pad = self.tokenizer.pad_token_id
        batch: dict[str, Any] = {
            "input_ids": torch.tensor([[pad] * (width - len(ids)) + ids for ids in sequences]),
            "attention_mask": torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in sequences]),
        }
        for name in rows[0]:
            if name not in batch:
                batch[name] = [row[name] for row in rows]
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


def check_prompts(dataset: Any, processing_class: Any) -> None:
    """See that the first row of a dataset holds a prompt that `PromptCollator` can read.

    Raises:
        HoEError: it holds none, or the dataset is empty.
    """
    if len(dataset) == 0:
        raise HoEError("the training dataset is empty; give it at least one prompt")
    row = dataset[0]
    if row.get("input_ids") is None and row.get("prompt") is None:
        raise HoEError(
            f"the training dataset holds no prompts: its columns are {sorted(row)}. It needs `prompt` (text or chat messages) "
            "or `input_ids`"
        )
    template = getattr(getattr(processing_class, "tokenizer", processing_class), "chat_template", None)
    if template is not None and row.get("input_ids") is None and isinstance(row["prompt"], str):
        warnings.warn(
            "the tokenizer has a chat template, but prompts are plain strings and are tokenised as they are; give chat "
            'messages [{"role": "user", "content": ...}] if the model expects them',
            HoEWarning,
            stacklevel=3,
        )


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
    prompts = batch.get("prompt")
    if prompts is None:
        prompts = tokenizer.batch_decode(
            [row[keep] for row, keep in zip(ids, mask, strict=True)], skip_special_tokens=True
        )
    columns = {name: list(values) for name, values in batch.items() if name not in _NOT_COLUMNS}
    return PromptBatch(ids, mask, list(prompts), columns)
