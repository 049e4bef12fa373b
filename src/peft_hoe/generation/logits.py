"""The logits behind a response.

Shapes: B rows, S = P + T positions of prompt and response, T response positions, V vocabulary.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel


def sequence_inputs(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a model is called with: positions count from the first token that is no padding.

    Padding is token 0, whatever it was: tokenizers have padding tokens that the model's embedding has no row for.
    """
    mask = attention_mask.long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": input_ids * mask, "attention_mask": mask, "position_ids": positions}


def response_logits(
    model: Any, inputs: dict[str, torch.Tensor], response_length: int, *, hidden: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits `(B, T, V)` of the positions that predict the response, and the last hidden states there, if asked for."""
    parameters = inspect.signature(_base_model(model).forward).parameters
    inputs = {name: value for name, value in inputs.items() if name != "position_ids" or name in parameters}
    wanted = slice(-response_length - 1, -1)
    if "logits_to_keep" in parameters:
        # The prompt's logits are of no use. Positions, not a number: a stretch of the hidden states would reach the head as it
        # lies in memory, and torch would multiply row by row of the batch, three times as slow.
        length = inputs["input_ids"].shape[1]
        inputs["logits_to_keep"] = torch.arange(length, device=inputs["input_ids"].device)[wanted]
    output = model(**inputs, return_dict=True, use_cache=False, output_hidden_states=hidden)
    last = output.hidden_states[-1][:, wanted] if hidden else None
    return output.logits if "logits_to_keep" in parameters else output.logits[:, wanted], last


def _base_model(model: Any) -> Any:
    model = extract_model_from_parallel(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model
