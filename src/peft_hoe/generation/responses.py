"""Responses of a policy to prompts.

Shapes: B prompts, P prompt positions, T response positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteriaList

from .decoding import Decoding
from .prompts import PromptBatch
from .settings import generating
from .stop_strings import StopAtStrings, before_stop_string, holds, stop_string_lengths
from .vocabulary import check_tokens, tokenizer_of


@dataclass
class Responses:
    """Generated tokens.

    Attributes:
        ids: `(B, T)`, after the end `padding_token`.
        mask: `(B, T)`, True up to and including the stop token, or the token that completes a stop string.
        ended: `(B,)`, whether there is one.
        texts: B responses as text, without special tokens, a stop string and what comes after it.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    ended: torch.Tensor
    texts: list[str]

    def select(self, rows: Sequence[int]) -> Responses:
        """Those rows, in that order."""
        place = torch.as_tensor(rows, device=self.ids.device)
        return Responses(self.ids[place], self.mask[place], self.ended[place], [self.texts[row] for row in rows])

    @classmethod
    def joined(cls, parts: Sequence[Responses]) -> Responses:
        """All rows of several, of one T."""
        ids, mask, ended = (torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "mask", "ended"))
        return cls(ids, mask, ended, [text for part in parts for text in part.texts])


@torch.no_grad()
def generate_responses(
    policy: Any, prompts: PromptBatch, processing_class: Any, decoding: Decoding, chunk: int, **others: Any
) -> Responses:
    """A response to each prompt, `chunk` prompts at a time, T = `max_new_tokens`.

    Args:
        policy: a model that generates; nothing is filled in from its own settings, which are as before afterwards.
        prompts: padded on the left.
        processing_class: its tokenizer, with a padding token.
        decoding: how.
        chunk: rows of one call.
        others: more arguments of `generate`.

    Raises:
        HoEError: a prompt holds a token that the policy has no embedding for.
    """
    tokenizer = tokenizer_of(processing_class)
    check_tokens(prompts.ids * prompts.mask, policy, tokenizer, "prompts")
    settings = decoding.resolve(policy, tokenizer)
    # An encoder-decoder returns what it decoded, others the prompt too.
    width = 1 if getattr(policy.config, "is_encoder_decoder", False) else prompts.ids.shape[1]
    if decoding.stop_strings:
        watch = StopAtStrings(tokenizer, decoding.stop_strings, width)
        others["stopping_criteria"] = StoppingCriteriaList([watch])
    parts = []
    with generating(policy, settings):
        for first in range(0, len(prompts.ids), chunk):
            rows = slice(first, first + chunk)
            output = policy.generate(
                input_ids=prompts.ids[rows] * prompts.mask[rows],  # as in `sequence_inputs`
                attention_mask=prompts.mask[rows].long(),
                generation_config=settings,
                **others,
            )
            missing = width + decoding.max_new_tokens - output.shape[1]
            parts.append(torch.nn.functional.pad(output[:, width:], (0, missing), value=settings.pad_token_id))
    return _ended(torch.cat(parts), tokenizer, decoding.stop_strings, settings)


def _ended(ids: torch.Tensor, tokenizer: Any, strings: Sequence[str], settings: GenerationConfig) -> Responses:
    """Responses from what was generated `(B, T)`, cut where each of them ends."""
    mask, ended = response_mask(ids, settings.eos_token_id)
    texts = _texts(ids, mask, tokenizer)
    if strings:
        cut = torch.tensor([holds(text, strings) for text in texts], device=ids.device)
        lengths = stop_string_lengths(ids.masked_fill(~mask, tokenizer.pad_token_id), tokenizer, strings)
        mask &= torch.arange(ids.shape[1], device=ids.device) < lengths.unsqueeze(1)
        ended |= cut
        texts = [before_stop_string(text, strings) for text in texts]
    return Responses(ids.masked_fill(~mask, settings.pad_token_id), mask, ended, texts)


def _texts(ids: torch.Tensor, mask: torch.Tensor, tokenizer: Any) -> list[str]:
    kept = [row[valid] for row, valid in zip(ids, mask, strict=True)]
    return list(tokenizer.batch_decode(kept, skip_special_tokens=True))


def response_mask(ids: torch.Tensor, stop: int | Sequence[int] | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens `(B, T)` belong to the response, a stop token included, and which rows `(B,)` have one."""
    if stop is None:
        return torch.ones_like(ids, dtype=torch.bool), torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    stops = torch.isin(ids, torch.as_tensor(stop, device=ids.device))
    return (stops.cumsum(1) - stops.long()) == 0, stops.any(1)
