"""Completing prompts: from texts or chat messages to texts, in one decoding; by a model as it stands, or steered row by row.

Shapes: K rows, P prompt positions, N objectives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..preference import FloatArray
from ..tuner.functional import check_in_effect, use_preference
from .by_preference import by_preference
from .decoding import Decoding
from .prompts import PromptBatch, PromptCollator, as_prompt_batch
from .responses import Responses, generate_responses


class Completer:
    """A tokenizer, and a decoding whose stop tokens are known.

    Args:
        model: whose stop tokens count where the decoding names none; nothing else of its own settings does.
        tokenizer: the policy's, or a processor that holds it.
        decoding: what `Decoding.of` takes.

    Raises:
        HoEError: the decoding is none, or the tokenizer has no padding token.
    """

    def __init__(self, model: Any, tokenizer: Any, decoding: Any = None) -> None:
        decoding = Decoding.of(decoding)
        self.collate = PromptCollator(tokenizer, decoding.chat_template_kwargs)
        self.tokenizer = self.collate.tokenizer
        self.decoding = decoding.resolved(model, self.tokenizer)

    def batch(self, model: Any, prompts: Sequence[Any]) -> PromptBatch:
        """K prompts, or rows with `prompt` and columns, padded on the left, on the model's device."""
        collated = self.collate([row if isinstance(row, Mapping) else {"prompt": row} for row in prompts])
        return as_prompt_batch(collated, self.tokenizer, next(model.parameters()).device)

    def complete(self, model: Any, prompts: Sequence[Any]) -> list[str]:
        """Complete K prompts with a model as it stands; its own generation settings are as before afterwards."""
        batch = self.batch(model, prompts)
        return generate_responses(model, batch, self.tokenizer, self.decoding, len(batch.ids)).texts

    def complete_at(
        self, model: Any, adapter: str, prompts: Sequence[Any], preferences: FloatArray, **how: Any
    ) -> tuple[list[str], bool]:
        """As `steered_responses` of K prompts in one batch: texts, and whether rows of different preferences ran together."""
        batch = self.batch(model, prompts)
        found, mixed = steered_responses(
            model, adapter, batch, preferences, self.tokenizer, self.decoding, len(batch.ids), **how
        )
        return found.texts, mixed


def steered_responses(
    model: Any,
    adapter: str,
    prompts: PromptBatch,
    preferences: FloatArray,
    processing_class: Any,
    decoding: Decoding,
    batch_size: int,
    *,
    mixed: bool = True,
    routers: str = "keep",
) -> tuple[Responses, bool]:
    """Responses to K prompts, row k at `preferences[k]`.

    Args:
        model: carries HoE layers.
        adapter: its HoE adapter.
        prompts: K of them.
        preferences: `(K, N)`.
        processing_class: the policy's tokenizer.
        decoding: how.
        batch_size: rows at once.
        mixed: whether to try rows of different preferences in one batch.
        routers: as in `use_preference`.

    Returns:
        the responses, and whether such rows ran together: a layer that cannot tell rows apart refuses it.

    Raises:
        PreferenceError: the adapter is disabled.
    """
    check_in_effect(model, adapter)

    def respond(rows: Any, wanted: FloatArray) -> Responses:
        parts = []
        for first in range(0, len(rows), batch_size):
            some = slice(first, first + batch_size)
            here = wanted if wanted.ndim == 1 else wanted[some]
            batch = prompts.select(rows[some].tolist())
            with use_preference(model, {adapter: here.tolist()}, routers=routers):
                parts.append(generate_responses(model, batch, processing_class, decoding, len(batch.ids)))
        return Responses.joined(parts)

    def join(parts: list[Responses], places: Any) -> Responses:
        return Responses.joined(parts).select(places.tolist())

    return by_preference(respond, preferences, join, mixed=mixed)
