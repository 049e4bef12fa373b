"""Stop strings for TRL's GRPOTrainer, whose generation has no place for them: they end rows early, and the rest is cut."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import StoppingCriteriaList

from ...generation.stop_strings import StopAtStrings, before_stop_string, stop_string_lengths


@contextlib.contextmanager
def stopping_at(policy: Any, tokenizer: Any, strings: Sequence[str]) -> Iterator[None]:
    """Inside, `policy.generate` ends rows at stop strings; TRL's call of it takes no stopping criteria.

    Args:
        policy: what TRL calls `generate` of.
        tokenizer: its tokenizer.
        strings: the stop strings; without any, nothing changes.
    """
    if not strings:
        yield
        return
    generate = policy.generate

    def with_criteria(**inputs: Any) -> Any:
        watch = StopAtStrings(tokenizer, strings, inputs["input_ids"].shape[1])
        return generate(**inputs, stopping_criteria=StoppingCriteriaList([watch]))

    policy.generate = with_criteria
    try:
        yield
    finally:
        del policy.generate


def cut_tokens(completions: Sequence[list[int]], tokenizer: Any, strings: Sequence[str]) -> list[list[int]]:
    """Completions up to and including the token that completes a stop string; what has none stays whole."""
    return [
        ids[: int(stop_string_lengths(torch.tensor([ids]), tokenizer, strings))] if ids else ids for ids in completions
    ]


def cut_texts(completions: Sequence[Any], strings: Sequence[str]) -> list[Any]:
    """Completions before a stop string: texts, or lists with the assistant's message."""

    def cut(message: Any) -> Any:
        content = message.get("content")
        return {**message, "content": before_stop_string(content, strings)} if isinstance(content, str) else message

    return [
        before_stop_string(completion, strings) if isinstance(completion, str) else list(map(cut, completion))
        for completion in completions
    ]
