"""From a request that has been read to its answer: texts that run, and OpenAI's forms for them, streamed or not."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.responses import Response

from ...errors import HoEError
from ...preference import FloatArray
from .engine import Engine, EngineStoppedError, QueueFullError
from .requests import RequestError, Wanted
from .sequences import Progress, TextRequest
from .text_stream import TextStream


class Completion:
    """How completions are written down."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, objectives: list[str]) -> None:
        self.model, self.objectives = model, objectives
        self.identity = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def choice(self, index: int, text: str, reason: str | None, preference: FloatArray) -> dict[str, Any]:
        """One text as a whole."""
        return self._choice(index, reason, preference, text=text)

    def chunk(self, index: int, progress: Progress, preference: FloatArray, first: bool) -> dict[str, Any]:
        """A part of one text."""
        return self._choice(index, progress.reason, preference, text=progress.text)

    def _choice(self, index: int, reason: str | None, preference: FloatArray, **content: Any) -> dict[str, Any]:
        weights = dict(zip(self.objectives, preference.tolist(), strict=True))
        return {"index": index, **content, "logprobs": None, "finish_reason": reason, "preference": weights}


class Chat(Completion):
    """How chats are written down."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, text: str, reason: str | None, preference: FloatArray) -> dict[str, Any]:
        """One answer as a whole."""
        return self._choice(index, reason, preference, message={"role": "assistant", "content": text})

    def chunk(self, index: int, progress: Progress, preference: FloatArray, first: bool) -> dict[str, Any]:
        """A part of one answer."""
        delta: dict[str, Any] = {"role": "assistant"} if first else {}
        if progress.text or first:
            delta["content"] = progress.text
        return self._choice(index, progress.reason, preference, delta=delta)


class Texts:
    """The texts of one request under way, and what is heard of them in this event loop."""

    def __init__(self, engine: Engine, wanted: Wanted) -> None:
        self.heard: asyncio.Queue[tuple[int, Progress]] = asyncio.Queue()
        self.wanted = wanted
        loop = asyncio.get_running_loop()
        stops = engine.stop_tokens
        self.all = [
            TextRequest(
                prompt=wanted.prompts[number // wanted.choices],
                preference=wanted.preferences[number // wanted.choices],
                max_new_tokens=wanted.max_new_tokens[number // wanted.choices],
                sampling=wanted.sampling.of_choice(number % wanted.choices),
                stop_tokens=stops,
                stream=TextStream(engine.tokenizer, wanted.stop_strings),
                listener=_listener(loop, self.heard, number),
            )
            for number in range(len(wanted.prompts) * wanted.choices)
        ]
        engine.submit(self.all)

    def cancel(self) -> None:
        """Nobody waits for them any more."""
        for text in self.all:
            text.cancelled = True

    async def progress(self) -> AsyncIterator[tuple[int, Progress]]:
        """Everything that is heard, until all texts are over.

        Raises:
            Exception: what a text failed with.
        """
        left = len(self.all)
        while left:
            number, progress = await self.heard.get()
            if progress.error is not None:
                raise progress.error
            left -= progress.is_last
            yield number, progress

    @property
    def usage(self) -> dict[str, int]:
        """Numbers of tokens."""
        prompt, written = sum(map(len, self.wanted.prompts)), sum(len(text.stream.ids) for text in self.all)
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def _listener(
    loop: asyncio.AbstractEventLoop, heard: asyncio.Queue[tuple[int, Progress]], number: int
) -> Callable[[Progress], Any]:
    return lambda progress: loop.call_soon_threadsafe(heard.put_nowait, (number, progress))


async def answer(engine: Engine, request: Request, wanted: Wanted, form: Completion) -> Response:
    """Run a request.

    Args:
        engine: writes the texts.
        request: who asks; when the client is gone, the texts are dropped.
        wanted: what was read.
        form: how it is written down.

    Raises:
        HoEError: there is no room, or the engine is stopping.
    """
    texts = Texts(engine, wanted)
    if wanted.stream:
        return StreamingResponse(_events(texts, form), media_type="text/event-stream")
    reasons: dict[int, str | None] = {}
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        collecting = asyncio.ensure_future(_collect(texts, reasons))
        await asyncio.wait({gone, collecting}, return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            collecting.cancel()
            return Response(status_code=499)
        collecting.result()
    except HoEError:
        raise
    except Exception as error:  # of the model, in the engine's thread
        return error_answer(error)
    finally:
        gone.cancel()
        texts.cancel()
    choices = [
        form.choice(number, text.stream.text, reasons[number], text.preference) for number, text in enumerate(texts.all)
    ]
    return JSONResponse({**form.identity, "object": form.kind, "choices": choices, "usage": texts.usage})


async def _collect(texts: Texts, reasons: dict[int, str | None]) -> None:
    async for number, progress in texts.progress():
        if progress.is_last:
            reasons[number] = progress.reason


async def _events(texts: Texts, form: Completion) -> AsyncIterator[str]:
    """Server-sent events: a chunk for every piece of text; the end is `[DONE]`."""
    begun: set[int] = set()
    try:
        async for number, progress in texts.progress():
            choice = form.chunk(number, progress, texts.all[number].preference, number not in begun)
            begun.add(number)
            yield _event({**form.identity, "object": form.chunk_kind, "choices": [choice]})
        if texts.wanted.usage:
            yield _event({**form.identity, "object": form.chunk_kind, "choices": [], "usage": texts.usage})
        yield "data: [DONE]\n\n"
    except Exception as error:  # the status is sent already: the stream says it
        yield _event(_error_content(error))
    finally:
        texts.cancel()


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def _disconnected(request: Request) -> None:
    """Returns when the client is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def error_answer(error: Exception) -> JSONResponse:
    """An error with the status that says whose fault it is."""
    status = 429 if isinstance(error, QueueFullError) else 503 if isinstance(error, EngineStoppedError) else 500
    status = getattr(error, "status", status)
    headers = {"Retry-After": "1"} if status in (429, 503) else None
    return JSONResponse(_error_content(error), status_code=status, headers=headers)


def _error_content(error: Exception) -> dict[str, Any]:
    """OpenAI's form of an error. What failed inside is in the log, not in the answer."""
    known = isinstance(error, HoEError)
    return {
        "error": {
            "message": str(error) if known else f"the model failed ({type(error).__name__})",
            "type": "invalid_request_error" if isinstance(error, RequestError) else "server_error",
            "param": getattr(error, "argument", None),
            "code": None,
        }
    }
