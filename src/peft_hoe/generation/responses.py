"""Responses of a policy to prompts.

Shapes: B prompts, P prompt positions, T response positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from .prompts import PromptBatch


@dataclass
class Responses:
    """Generated tokens.

    Attributes:
        ids: `(B, T)`, padding after the end.
        mask: `(B, T)`, True up to and including the stop token.
        ended: `(B,)`, whether the stop token was generated.
        texts: B responses as text, special tokens left out.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    ended: torch.Tensor
    texts: list[str]


@torch.no_grad()
def generate_responses(
    policy: Any, prompts: PromptBatch, processing_class: Any, settings: GenerationConfig, chunk: int
) -> Responses:
    """Sample (or, with `settings.do_sample` off, choose) a response to each prompt, `chunk` prompts at a time."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    parts = []
    for start in range(0, len(prompts.ids), chunk):
        rows = slice(start, start + chunk)
        output = policy.generate(
            input_ids=prompts.ids[rows], attention_mask=prompts.mask[rows].long(), generation_config=settings
        )
        part = output[:, prompts.ids.shape[1] :]
        missing = settings.max_new_tokens - part.shape[1]
        parts.append(torch.nn.functional.pad(part, (0, missing), value=tokenizer.pad_token_id))
    ids = torch.cat(parts)
    mask, ended = response_mask(ids, settings.eos_token_id)
    ids = ids.masked_fill(~mask, tokenizer.pad_token_id)
    kept = [row[valid] for row, valid in zip(ids, mask, strict=True)]
    return Responses(ids, mask, ended, tokenizer.batch_decode(kept, skip_special_tokens=True))


def response_mask(ids: torch.Tensor, stop: int | list[int] | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens `(B, T)` belong to the response, a stop token included, and which rows `(B,)` have one."""
    if stop is None:
        return torch.ones_like(ids, dtype=torch.bool), torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    stops = torch.isin(ids, torch.as_tensor(stop, device=ids.device))
    return (stops.cumsum(1) - stops.long()) == 0, stops.any(1)
