"""Texts of different preferences in one batch, which they join and leave at any step.

Rows are aligned at the right: a new row's keys and values are padded on the left to the others' length, and masked there.
A row's logits do not depend on its neighbours, but for rounding.
Shapes: B rows, S positions so far, V tokens of the vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from ...tuner.cache_owner import cache_name, returned_cache
from .sequences import TextRequest


class RunningBatch:
    """The rows under way.

    Args:
        model: decoder-only, carries HoE layers.
        joins: whether rows may join others; off, the model keeps whatever cache it likes for its only row.

    Attributes:
        rows: B texts.
    """

    def __init__(self, model: nn.Module, *, joins: bool = True) -> None:
        self.rows: list[TextRequest] = []
        self._model, self._joins = model, joins
        self._device = next(model.parameters()).device
        names = inspect.signature(_innermost(model).forward).parameters
        self._takes_positions, self._keeps_logits = "position_ids" in names, "logits_to_keep" in names
        self._cache_name = cache_name(names)
        self._cache: Any = None
        self._mask = torch.zeros(0, 0, dtype=torch.long, device=self._device)  # (B, S)
        self._last: list[int] = []

    @torch.inference_mode()
    def join(self, rows: Sequence[TextRequest]) -> None:
        """Read the prompts of new rows, write the first token of each, and take in those that go on."""
        width = max(len(row.prompt) for row in rows)
        ids = torch.tensor([[0] * (width - len(row.prompt)) + list(row.prompt) for row in rows], device=self._device)
        mask = torch.tensor(
            [[0] * (width - len(row.prompt)) + [1] * len(row.prompt) for row in rows], device=self._device
        )
        logits, cache = self._forward(rows, ids, mask, DynamicCache() if self._joins else None)
        tokens = _accept(rows, logits)
        staying = [number for number, row in enumerate(rows) if not row.over]
        if not staying:
            return
        if self._joins:
            self._merge(_selected(cache, staying), mask[staying])
        else:
            self._cache, self._mask = cache, mask
        self.rows += [rows[number] for number in staying]
        self._last += [tokens[number] for number in staying]

    @torch.inference_mode()
    def step(self) -> None:
        """Write one more token of every row."""
        self._last = _accept(self.rows, self.logits())

    @torch.inference_mode()
    def logits(self) -> Tensor:
        """Read the last token of every row: logits `(B, V)` of the next ones."""
        self._mask = F.pad(self._mask, (0, 1), value=1)
        ids = torch.tensor(self._last, device=self._device)[:, None]
        logits, self._cache = self._forward(self.rows, ids, self._mask, self._cache)
        return logits

    def drop_finished(self) -> None:
        """Let go of rows that are over or no longer wanted, and of positions that nobody has any more."""
        staying = [number for number, row in enumerate(self.rows) if not (row.over or row.cancelled)]
        if len(staying) == len(self.rows):
            return
        if not staying:
            self.clear()
            return
        self.rows = [self.rows[number] for number in staying]
        self._last = [self._last[number] for number in staying]
        self._mask = self._mask[staying]
        first = int(self._mask.any(0).nonzero()[0])
        self._mask = self._mask[:, first:]
        self._cache = DynamicCache([(k[:, :, first:], v[:, :, first:]) for k, v in _selected(self._cache, staying)])

    def clear(self) -> None:
        """Forget all rows."""
        self.rows, self._last, self._cache = [], [], None
        self._mask = self._mask.new_zeros(0, 0)

    def _forward(self, rows: Sequence[TextRequest], ids: Tensor, mask: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Logits `(B, V)` of what follows `ids` `(B, T)`, and the cache with their keys and values."""
        more: dict[str, Any] = {"logits_to_keep": 1} if self._keeps_logits else {}
        if self._takes_positions:
            positions = (mask.cumsum(-1) - 1).clamp_min(0)
            more["position_ids"] = positions[:, -ids.shape[1] :]
        output = self._model(
            input_ids=ids,
            attention_mask=mask,
            use_cache=True,
            preference=shared_or_rows([row.preference for row in rows]),
            **{self._cache_name: cache},
            **more,
        )
        return output.logits[:, -1], returned_cache(output)

    def _merge(self, cache: list[tuple[Tensor, Tensor]], mask: Tensor) -> None:
        """Take in the keys and values `(b, H, s, D)` of new rows with their mask `(b, s)`."""
        if self._cache is None:
            self._cache, self._mask = DynamicCache(cache), mask
            return
        length = max(self._mask.shape[1], mask.shape[1])
        old = [(layer.keys, layer.values) for layer in self._cache.layers]
        joined = [
            (
                torch.cat([_filled(k, length), _filled(new_k, length)]),
                torch.cat([_filled(v, length), _filled(new_v, length)]),
            )
            for (k, v), (new_k, new_v) in zip(old, cache, strict=True)
        ]
        self._cache = DynamicCache(joined)
        missing = [length - self._mask.shape[1], length - mask.shape[1]]
        self._mask = torch.cat([F.pad(self._mask, (missing[0], 0)), F.pad(mask, (missing[1], 0))])


def shared_or_rows(preferences: Sequence[Any]) -> Any:
    """One preference where all rows have the same, which costs less, else one for each row."""
    points = np.stack(preferences)
    return (points[0] if (points == points[0]).all() else points).tolist()


def _accept(rows: Sequence[TextRequest], logits: Tensor) -> list[int]:
    """The next token of every row; greedy ones are found at once."""
    likeliest = logits.argmax(-1).tolist()
    tokens = [
        likeliest[number] if row.sampling.temperature == 0 else row.choose(logits[number])
        for number, row in enumerate(rows)
    ]
    for row, token in zip(rows, tokens, strict=True):
        if not row.cancelled:
            row.accept(token)
    return tokens


def _selected(cache: Any, rows: list[int]) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys[rows], layer.values[rows]) for layer in cache.layers]


def _filled(states: Tensor, length: int) -> Tensor:
    """`(B, H, S, D)` filled up on the left to S = length."""
    return F.pad(states, (0, 0, length - states.shape[2], 0))


def _innermost(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
