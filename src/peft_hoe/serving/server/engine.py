"""The engine: one thread that owns the model, texts that wait, and one running batch that they join as places become free.

What comes from other threads goes through `submit`, `TextRequest.cancelled` and `stop` alone.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from ...errors import HoEError, RowsError
from ...generation.decoding import stop_tokens
from ...generation.vocabulary import vocabulary_size
from ...preference import FloatArray
from ...tuner.functional import check_in_effect
from ...tuner.steering import Steering
from .batch import RunningBatch
from .sampling import Sampling
from .sequences import Progress, TextRequest
from .text_stream import TextStream

T = TypeVar("T")
log = logging.getLogger(__name__)

_PREFILL = 8192  # tokens of prompts that are read at once, padding included
_SAME = 1e-2  # largest difference of a logit with and without neighbours that rounding explains


class QueueFullError(HoEError):
    """More texts wait than are allowed; try again later."""


class EngineStoppedError(HoEError):
    """The engine takes no more texts."""


@dataclass(frozen=True)
class EngineState:
    """What the engine is doing.

    Attributes:
        running: texts in the batch.
        waiting: texts that wait for a place.
        alive: whether the thread lives and takes texts.
    """

    running: int
    waiting: int
    alive: bool


class Engine:
    """Writes texts of different preferences together.

    Args:
        model: decoder-only, with one active HoE adapter, in evaluation mode.
        tokenizer: the model's.
        max_batch: texts at once.
        max_waiting: texts that may wait.
        max_length: tokens of a prompt and its text together; default what the model's positions allow.

    Attributes:
        objectives: names of the N objectives.
        vocabulary: how many tokens prompts may hold: the tokenizer's, as far as the model has an embedding for them.
        stop_tokens: at which texts end: the tokenizer's, and those of the model's own settings.
        mixed: whether texts of different preferences run together; False where a module cannot tell rows apart.
        batches: whether texts run together at all; False where a model's cache cannot be joined.

    Raises:
        PreferenceError: the model has no active HoE adapter, or it is disabled or merged.
        HoEError: a limit is out of range, or the model cannot be served.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        max_batch: int = 16,
        max_waiting: int = 256,
        max_length: int | None = None,
    ) -> None:
        if max_batch < 1 or max_waiting < 1:
            name, value = ("max_batch", max_batch) if max_batch < 1 else ("max_waiting", max_waiting)
            raise HoEError(
                f"max_batch is {max_batch} and max_waiting {max_waiting}; both must be at least 1",
                argument=name, value=value, allowed="at least 1",
            )  # fmt: skip
        self.model, self.tokenizer = model, tokenizer
        check_in_effect(model, unmerged=True)
        steering = Steering.of(model)
        self.objectives = list(steering.adapters[steering.active_adapter()].objectives)
        self.max_batch, self.max_waiting = max_batch, max_waiting
        self.max_length = _max_length(model, max_length)
        self.vocabulary = min(len(tokenizer), vocabulary_size(model) or len(tokenizer))
        self.stop_tokens = stop_tokens(model, tokenizer)
        self.mixed, self.batches = self._probe()
        self._waiting: deque[TextRequest] = deque()
        self._jobs: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._batch = RunningBatch(model, joins=self.batches)
        self._thread = threading.Thread(target=self._run, name="peft-hoe engine", daemon=True)

    # -- from other threads ---

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def submit(self, texts: Sequence[TextRequest]) -> None:
        """Let texts wait for a place, all of them or none.

        Raises:
            QueueFullError: there is no room for them.
            EngineStoppedError: the engine is stopping.
        """
        with self._changed:
            if self._stopping or not self._thread.is_alive():
                raise EngineStoppedError("the server is stopping; try another one")
            if len(self._waiting) + len(texts) > self.max_waiting:
                raise QueueFullError(
                    f"{len(self._waiting)} texts wait, and {self.max_waiting} may; try again later",
                    value=len(self._waiting) + len(texts),
                    allowed=f"at most {self.max_waiting}",
                )
            self._waiting.extend(texts)
            self._changed.notify()

    def alone(self, job: Callable[[], T]) -> Future[T]:
        """Let the engine's thread call a function when no text is under way; those that wait are written afterwards.

        Raises:
            EngineStoppedError: the engine is stopping.
        """
        future: Future[T] = Future()
        with self._changed:
            if self._stopping or not self._thread.is_alive():
                raise EngineStoppedError("the server is stopping; try another one")
            self._jobs.append((job, future))
            self._changed.notify()
        return future

    def stop(self, timeout: float | None = None) -> None:
        """Take no more texts, and wait until those under way are written, or fail them after `timeout` seconds."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if not self._thread.is_alive():
            return
        self._thread.join(timeout)
        if self._thread.is_alive():
            for text in [*self._waiting, *self._batch.rows]:
                text.cancelled = True
            self._thread.join()

    @property
    def state(self) -> EngineState:
        """What the engine is doing now."""
        return EngineState(len(self._batch.rows), len(self._waiting), self._thread.is_alive() and not self._stopping)

    # -- the engine's thread ---

    def _run(self) -> None:
        while (texts := self._next()) is not None:
            if self._jobs and not texts and not self._batch.rows:
                self._call(*self._jobs.popleft())
            else:
                self._write(texts)

    @staticmethod
    def _call(job: Callable[[], Any], future: Future[Any]) -> None:
        try:
            future.set_result(job())
        except Exception as error:
            future.set_exception(error)

    def _write(self, texts: list[TextRequest]) -> None:
        """One more token of every text, those that join among them; a failure is told to all of them, and is over then."""
        try:
            if texts:
                self._batch.join(texts)
                self._batch.drop_finished()
            if self._batch.rows:
                self._batch.step()
                self._batch.drop_finished()
        except Exception as error:
            log.exception("a batch failed")
            for text in {id(text): text for text in (*texts, *self._batch.rows)}.values():
                if not text.over:
                    text.fail(error)
            self._batch.clear()

    def _next(self) -> list[TextRequest] | None:
        """Texts that join the batch now, perhaps none; None when there is nothing left to do."""
        with self._changed:
            while not self._waiting and not self._batch.rows and not self._jobs:
                if self._stopping:
                    return None
                self._changed.wait()
            if self._jobs:
                return []
            texts: list[TextRequest] = []
            places = (self.max_batch if self.batches else 1) - len(self._batch.rows)
            while self._waiting and len(texts) < places and self._fits(texts, self._waiting[0]):
                text = self._waiting.popleft()
                if not text.cancelled:
                    texts.append(text)
            return texts

    def _fits(self, texts: list[TextRequest], text: TextRequest) -> bool:
        others = [*self._batch.rows, *texts]
        if not self.mixed and others and not (others[0].preference == text.preference).all():
            return False
        width = max(len(other.prompt) for other in (*texts, text))
        return not texts or (len(texts) + 1) * width <= _PREFILL

    # -- what the model allows ---

    def _probe(self) -> tuple[bool, bool]:
        """Whether rows may differ in preference, and whether they may run together: tried on a few tokens."""
        corners = np.eye(len(self.objectives))
        points = [corners[0], corners[-1]]
        prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
        try:
            alone = [self._logits([prompt], [point]) for prompt, point in zip(prompts, points, strict=True)]
            try:
                together, mixed = self._logits(prompts, points), True
            except RowsError as error:
                log.warning("texts of one preference at a time: %s", error)
                alone[1] = self._logits(prompts[1:], points[:1])
                together, mixed = self._logits(prompts, [points[0]] * 2), False
        except (AttributeError, TypeError, ValueError, IndexError) as error:
            log.warning("one text at a time: the model's cache cannot be joined (%s)", error)
            return False, False
        difference = float((together - torch.cat(alone)).abs().max())
        if difference > _SAME:
            log.warning("one text at a time: a neighbour changes logits by %.3g", difference)
        return mixed, difference <= _SAME

    def _logits(self, prompts: list[list[int]], points: list[FloatArray]) -> torch.Tensor:
        """Logits `(B, V)` of the second token after each prompt, as rows of one batch that join one after the other."""
        batch = RunningBatch(self.model)
        for prompt, point in zip(prompts, points, strict=True):
            batch.join([_silent(prompt, point, self.tokenizer)])
        return batch.logits()


def _silent(prompt: list[int], preference: FloatArray, tokenizer: Any) -> TextRequest:
    return TextRequest(prompt, preference, 8, Sampling(0), (), TextStream(tokenizer), _ignore)


def _ignore(progress: Progress) -> None:
    pass


def _max_length(model: Any, wanted: int | None) -> int:
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    allowed: Any = getattr(config, "max_position_embeddings", None)
    if wanted is not None and wanted < 2:
        raise HoEError(
            f"max_length is {wanted}; a prompt and a text need at least 2 tokens",
            argument="max_length", value=wanted, allowed="at least 2",
        )  # fmt: skip
    if wanted is not None and allowed is not None and wanted > allowed:
        raise HoEError(
            f"max_length is {wanted}, but the model has {allowed} positions",
            argument="max_length", value=wanted, allowed=f"at most {allowed}",
        )  # fmt: skip
    if wanted is None and allowed is None:
        raise HoEError(
            "the model's config does not say how many positions it has; give max_length (--max-length)",
            argument="max_length", allowed="at least 2",
        )  # fmt: skip
    return int(allowed if wanted is None else wanted)
