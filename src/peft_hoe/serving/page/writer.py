"""The texts of a page: one prompt at the chosen preference, at each objective alone, and by the base."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from typing import Any

import numpy as np
import torch

from ...generation.vocabulary import check_tokens
from ...preference import FloatArray
from ...tuner.trace import trace_routing
from ...tuner.trace_page import fragment
from ..server.batch import RunningBatch
from ..server.engine import Engine
from ..server.sampling import Sampling
from ..server.sequences import Progress, TextRequest
from ..server.text_stream import TextStream


class Voice(Enum):
    """Whose text, where it is not an objective's: no name of an objective equals one of these."""

    CHOSEN = "chosen"
    BASE = "base"


Speaker = str | Voice  # an objective by its name, or a voice


@dataclass
class PageTexts:
    """What has been written so far.

    Attributes:
        texts: by `Voice.CHOSEN`, each objective's name and `Voice.BASE`.
        coloured: the chosen one as HTML, its tokens on their experts' colours; "" until it is over.
        error: what failed, or "".
    """

    texts: dict[Speaker, str]
    coloured: str = ""
    error: str = ""
    over: set[Speaker] = field(default_factory=set)


class PageWriter:
    """Writes a page's texts on an engine, which other requests may use too.

    The base's text needs the adapter switched off, so it is written between the engine's batches, and kept for the next
    preference.

    Args:
        engine: running.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._base: tuple[Any, str] | None = None

    def write(self, prompt: str, preference: FloatArray, length: int, temperature: float) -> Iterator[PageTexts]:
        """Write all texts.

        Args:
            prompt: a text; goes through the chat template where there is one.
            preference: `(N,)`.
            length: tokens of a text.
            temperature: 0 takes the most likely token; otherwise all texts draw by the same random numbers.

        Raises:
            HoEError: the prompt holds tokens that the model does not know, or the engine takes no more texts.
        """
        engine = self.engine
        ids = self._tokens(prompt)
        sampling = Sampling(temperature, seed=0)
        heard: queue.Queue[tuple[Speaker, Progress]] = queue.Queue()
        points: dict[Speaker, FloatArray] = {
            Voice.CHOSEN: preference,
            **dict(zip(engine.objectives, np.eye(len(engine.objectives)), strict=True)),
        }
        requests = {name: self._request(name, ids, point, length, sampling, heard) for name, point in points.items()}
        key = (tuple(ids), length, temperature)
        known = self._base[1] if self._base is not None and self._base[0] == key else None
        page = PageTexts(dict.fromkeys([*points, Voice.BASE], ""))
        if known is None:
            requests[Voice.BASE] = self._request(Voice.BASE, ids, preference, length, sampling, heard)
        else:
            page.texts[Voice.BASE] = known
        try:
            engine.submit([request for name, request in requests.items() if name != Voice.BASE])
            if known is None:
                engine.alone(lambda: self._write_base(requests[Voice.BASE]))
            while page.over != requests.keys() and not page.error:
                name, progress = heard.get()
                self._take(page, name, progress)
                if Voice.BASE in page.over:
                    self._base = (key, page.texts[Voice.BASE])
                if Voice.CHOSEN in page.over and not page.coloured and not page.error:
                    colour = partial(self._colour, ids, requests[Voice.CHOSEN].stream.ids, preference)
                    page.coloured = engine.alone(colour).result()
                yield replace(page, texts=dict(page.texts))
        finally:
            for request in requests.values():
                request.cancelled = True

    @staticmethod
    def _take(page: PageTexts, name: Speaker, progress: Progress) -> None:
        page.texts[name] += progress.text
        if progress.is_last:
            page.over.add(name)
        if progress.error is not None:
            page.error = str(progress.error)

    def _request(
        self, name: Speaker, ids: list[int], preference: FloatArray, length: int, sampling: Sampling, heard: Any
    ) -> TextRequest:
        engine = self.engine
        room = max(1, min(length, engine.max_length - len(ids)))
        stream = TextStream(engine.tokenizer)
        return TextRequest(
            ids, preference, room, sampling, engine.stop_tokens, stream, lambda told: heard.put((name, told))
        )

    def _write_base(self, request: TextRequest) -> None:
        """In the engine's thread, with no batch under way."""
        model: Any = self.engine.model
        try:
            with model.disable_adapter():
                batch = RunningBatch(model, joins=self.engine.batches)
                batch.join([request])
                batch.drop_finished()
                while batch.rows and not request.cancelled:
                    batch.step()
                    batch.drop_finished()
        except Exception as error:
            request.fail(error)

    @torch.inference_mode()
    def _colour(self, prompt: list[int], written: list[int], preference: FloatArray) -> str:
        """In the engine's thread: the votes with which each written token was read."""
        model: Any = self.engine.model
        if not written:
            return ""
        device = next(model.parameters()).device
        with trace_routing(model) as trace:
            model(input_ids=torch.tensor([[*prompt, *written]], device=device), preference=preference.tolist())
        votes = trace.mean()[0, len(prompt) :].tolist()
        stream = TextStream(self.engine.tokenizer)
        texts = [stream.push(token) for token in written]
        texts[-1] += stream.finish()
        return fragment(texts, votes, trace.experts, "experts")

    def _tokens(self, prompt: str) -> list[int]:
        tokenizer = self.engine.tokenizer
        if getattr(tokenizer, "chat_template", None):
            chat = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = tokenizer(prompt)["input_ids"]
        check_tokens(
            torch.tensor(ids), self.engine.model, tokenizer, "prompt"
        )  # else it fails with all texts under way
        return ids[-(self.engine.max_length - 1) :]
