"""TRL's GRPOTrainer with stop strings; everything else is TRL's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from trl import GRPOTrainer  # type: ignore[attr-defined]

from ...generation.vocabulary import check_tokens, tokenizer_of
from ..run.steered_policy import check_padding
from .stop_strings import cut_texts, cut_tokens, stopping_at


class StoppingTrainer(GRPOTrainer):  # type: ignore[misc]
    """Completions end at stop strings: they are trained on up to the token that completes one, and scored without it.

    Args:
        stop_strings: none for completions as GRPOTrainer writes them.
        others: GRPOTrainer's arguments.

    Raises:
        HoEError: the model has no embedding for the padding token.
    """

    def __init__(self, *, stop_strings: Sequence[str] = (), **others: Any) -> None:
        self.stop_strings = tuple(stop_strings)
        super().__init__(**others)
        check_padding(self.model, self.processing_class, "GRPOTrainer")

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **others: Any) -> Any:
        """Token ids of completions, and their log-probabilities where the engine says them, which TRL's own does not."""
        tokenizer = tokenizer_of(self.processing_class)
        model = self.accelerator.unwrap_model(self.model)
        check_tokens(torch.tensor([token for row in prompt_ids for token in row]), model, tokenizer, "prompts")
        with stopping_at(model, tokenizer, self.stop_strings):
            ids, logprobs = super()._generate_single_turn(prompt_ids, *args, **others)
        return (cut_tokens(ids, tokenizer, self.stop_strings) if self.stop_strings else ids), logprobs

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> torch.Tensor:
        """The rewards of texts before their stop strings."""
        completions = cut_texts(completions, self.stop_strings)
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
