"""Prompts as a `datasets.Dataset`, which TRL's GRPOTrainer takes; needs the package datasets."""

from __future__ import annotations

import itertools
from typing import Any

from datasets import Dataset

from ..errors import HoEError
from .prompt_rows import check_prompts


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
            "messages; `input_ids` alone cannot be given to rewards",
            argument="prompt",
            value=sorted(first[0]),
        )
    return as_dataset(rows)
