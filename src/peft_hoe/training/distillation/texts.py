"""Texts to imitate on: rows of a dataset as prompts and completions.

Shapes: B rows, P prompt positions padded on the left, T completion positions padded on the right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...errors import HoEError
from ...generation.prompt_rows import check_rows
from ...generation.prompts import PromptCollator

_WHOLE = ("text", "messages", "input_ids")


def has_completions(row: Mapping[str, Any]) -> bool:
    """Whether a row holds more than a prompt."""
    return row.get("completion") is not None or any(row.get(name) is not None for name in _WHOLE)


def check_texts(dataset: Any) -> None:
    """See that the first row of a dataset is one that `TextCollator` can read.

    Raises:
        HoEError: it is not, or the dataset is empty.
    """
    check_rows(dataset, "dataset")
    row = dataset[0]
    if row.get("prompt") is None and not has_completions(row):
        raise HoEError(
            f"the dataset holds no text: its columns are {sorted(row)}. It needs `text`, `messages`, `input_ids`, or `prompt` "
            "with or without `completion`",
            argument="train_dataset",
            value=sorted(row),
        )


class TextCollator:
    """Prompts padded on the left, completions on the right.

    A row with `text`, `messages` or `input_ids` is completion from its second token on. A completion of a prompt ends with the
    end-of-text token, if the tokenizer has one and it is not cut at `max_length`.

    Args:
        processing_class: the tokenizer.
        max_length: tokens of a row that are used, from its start; None for all.
        chat_template_kwargs: arguments of the tokenizer's chat template.
    """

    def __init__(
        self,
        processing_class: Any,
        max_length: int | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.prompts = PromptCollator(processing_class, chat_template_kwargs)
        self.tokenizer = self.prompts.tokenizer
        self.max_length = max_length

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """`prompt_ids`, `prompt_mask` `(B, P)`, `completion_ids`, `completion_mask` `(B, T)`."""
        pairs = [self._pair(row) for row in rows]
        prompts = self.prompts([{"input_ids": prompt} for prompt, _ in pairs])
        width, pad = max(len(completion) for _, completion in pairs), self.tokenizer.pad_token_id
        completions = [[*ids, *[pad] * (width - len(ids))] for _, ids in pairs]
        mask = [[1] * len(ids) + [0] * (width - len(ids)) for _, ids in pairs]
        return {
            "prompt_ids": prompts["input_ids"],
            "prompt_mask": prompts["attention_mask"],
            "completion_ids": torch.tensor(completions, dtype=torch.long).reshape(len(rows), width),
            "completion_mask": torch.tensor(mask, dtype=torch.long).reshape(len(rows), width),
        }

    def _pair(self, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """Ids of prompt and completion, at least one of the prompt."""
        if row.get("prompt") is not None:
            prompt = list(self.prompts.ids(row))
            completion = [] if row.get("completion") is None else self._completion(row)
        else:
            ids = self._whole(row)
            prompt, completion = ids[:1], ids[1:]
        if not prompt:
            raise HoEError(
                f"a row of the dataset is empty: {dict(row)!r}; leave it out", argument="train_dataset", value=dict(row)
            )
        if self.max_length is not None:
            prompt = prompt[: self.max_length]
            completion = completion[: self.max_length - len(prompt)]
        return prompt, completion

    def _whole(self, row: Mapping[str, Any]) -> list[int]:
        if row.get("input_ids") is not None:
            return list(row["input_ids"])
        if row.get("messages") is not None:
            return self._plain(self._rendered(row["messages"]))
        return list(self.tokenizer(row["text"])["input_ids"])

    def _completion(self, row: Mapping[str, Any]) -> list[int]:
        if isinstance(row["completion"], str):
            end = self.tokenizer.eos_token_id
            return [*self._plain(row["completion"]), *([] if end is None else [end])]
        whole = self._rendered([*row["prompt"], *row["completion"]])
        prompt = self._rendered(row["prompt"], add_generation_prompt=True)
        if not whole.startswith(prompt):
            raise HoEError(
                "the chat template does not put a completion after the prompt as it is; give `messages` or `input_ids` rows",
                argument="completion", value=row["completion"],
            )  # fmt: skip
        return self._plain(whole[len(prompt) :])

    def _rendered(self, messages: Any, **others: Any) -> str:
        return str(
            self.tokenizer.apply_chat_template(messages, tokenize=False, **others, **self.prompts.chat_template_kwargs)
        )

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
