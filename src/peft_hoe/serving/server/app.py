"""HTTP: OpenAI's completions and chat, streamed or not, on an `Engine`."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from ...errors import HoEError
from ...tuner.functional import get_preference
from .answers import Chat, Completion, answer, error_answer
from .engine import Engine
from .requests import RequestError, RequestReader

DEFAULT_MAX_BODY = 1 << 20  # bytes
_STARTED = int(time.time())


def create_app(engine: Engine, name: str, *, max_body: int = DEFAULT_MAX_BODY) -> FastAPI:
    """The application of one served model.

    Args:
        engine: not started yet; the application starts it, and stops it when it ends.
        name: of the model.
        max_body: bytes of a request.
    """
    reader = RequestReader(
        name, engine.tokenizer, engine.objectives, get_preference(engine.model), engine.max_length, engine.vocabulary
    )

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.stop, 0)  # connections have had their time

    async def refuse(request: Request, error: Exception) -> JSONResponse:
        return error_answer(error)

    async def completions(request: Request) -> Response:
        wanted = reader.completion(await _json(request, max_body))
        return await answer(engine, request, wanted, Completion(name, engine.objectives))

    async def chat(request: Request) -> Response:
        wanted = reader.chat(await _json(request, max_body))
        return await answer(engine, request, wanted, Chat(name, engine.objectives))

    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [_model(engine, reader)]})

    async def health() -> JSONResponse:
        state = engine.state
        content = {"status": "ok" if state.alive else "stopping", "running": state.running, "waiting": state.waiting}
        return JSONResponse(content, status_code=200 if state.alive else 503)

    app = FastAPI(title="peft-hoe", lifespan=life, openapi_url=None)
    app.add_exception_handler(HoEError, refuse)
    app.add_api_route("/v1/completions", completions, methods=["POST"], response_model=None)
    app.add_api_route("/v1/chat/completions", chat, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", models, response_model=None)
    app.add_api_route("/health", health, response_model=None)
    return app


def _model(engine: Engine, reader: RequestReader) -> dict[str, Any]:
    return {
        "id": reader.name,
        "object": "model",
        "created": _STARTED,
        "owned_by": "peft-hoe",
        "objectives": engine.objectives,
        "default_preference": reader.default,
        "max_model_len": engine.max_length,
    }


async def _json(request: Request, limit: int) -> Any:
    """The body, read no further than the limit.

    Raises:
        RequestError: it is larger, or not JSON.
    """
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise RequestError(f"the body is larger than {limit} bytes", status=413, allowed=f"at most {limit} bytes")
        parts.append(part)
    try:
        return json.loads(b"".join(parts))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON: {error}", status=400, allowed="JSON") from None
