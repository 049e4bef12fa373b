"""Rewards of texts without a reward function: how much likelier each objective's expert makes them than the base does.

Shapes: T texts, N objectives, S positions, of which the last L hold the texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import HoEError
from ..generation.fusion import steered_logits
from ..generation.logits import response_logits, sequence_inputs
from ..generation.prompts import PromptCollator
from ..generation.settings import evaluating
from ..generation.vocabulary import check_tokens, tokenizer_of
from ..preference import FloatArray
from ..tuner.functional import adapter_of, check_in_effect


@torch.no_grad()
def implicit_rewards(model: Any, tokenizer: Any, prompt: Any, texts: Sequence[str]) -> FloatArray:
    """Log π_i(text | prompt) − log π_base(text | prompt) of each text for each objective, π_i the model steered to i alone.

    The implicit rewards of DPO (Rafailov et al. 2023, eq. 5, at β = 1), in nats. Their scale is not that of normalised rewards:
    a `PreferenceEstimate` that takes them learns the sharpness.

    Args:
        model: a PeftModel with a HoE adapter; its first active one is steered.
        tokenizer: the policy's.
        prompt: text, or chat messages, which go through the chat template.
        texts: T answers to it.

    Returns:
        `(T, N)`, float64.

    Raises:
        HoEError: there are no texts, one is empty, or one holds a token that the model does not know.

    >>> from peft_hoe import demo
    >>> from peft_hoe.person import implicit_rewards
    >>> model, tokenizer = demo.load_demo_adapter(), demo.load_tokenizer()
    >>> implicit_rewards(model, tokenizer, demo.load_prompts()[0], [" a happy day", " a red house"]).shape
    (2, 2)
    """
    check_in_effect(model)
    adapter = adapter_of(model)
    pieces = [_ids(tokenizer, text) for text in texts]
    if not pieces or not all(pieces):
        raise HoEError(
            f"texts is {list(texts)!r}; give at least one answer, none of them empty",
            argument="texts",
            value=list(texts),
        )
    device = next(model.parameters()).device
    batch = PromptCollator(tokenizer)([{"prompt": prompt}])
    ids, mask = _padded(batch["input_ids"], pieces)
    check_tokens(ids, model, tokenizer, "texts")
    inputs = {name: value.to(device) for name, value in sequence_inputs(ids, mask).items()}
    length = max(map(len, pieces))
    corners = np.eye(len(adapter.objectives))
    with evaluating(model):
        with model.disable_adapter():
            base = _logprobs(response_logits(model, inputs, length)[0], inputs, length)
        steered = [
            _logprobs(
                steered_logits(model, adapter.name, corner[None].repeat(len(ids), 0), inputs, length), inputs, length
            )
            for corner in corners
        ]
    found: FloatArray = torch.stack([one - base for one in steered], dim=1).cpu().numpy()
    return found


def _ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer_of(tokenizer)(text, add_special_tokens=False)["input_ids"]
    return found


def _padded(prompt: Tensor, pieces: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Tokens and mask `(T, S)` of one prompt `(1, P)` with each of T texts, padded on the right."""
    length = max(map(len, pieces))
    ids = torch.zeros(len(pieces), prompt.shape[1] + length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, piece in enumerate(pieces):
        end = prompt.shape[1] + len(piece)
        ids[row, :end] = torch.cat([prompt[0], torch.tensor(piece)])
        mask[row, :end] = 1
    return ids, mask


def _logprobs(logits: Tensor, inputs: dict[str, Tensor], length: int) -> Tensor:
    """Log-probabilities of the texts `(T,)`."""
    chosen = inputs["input_ids"][:, -length:].unsqueeze(-1)
    tokens = logits.double().log_softmax(-1).gather(-1, chosen).squeeze(-1)
    return (tokens * inputs["attention_mask"][:, -length:]).sum(1)
