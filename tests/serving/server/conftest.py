from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@pytest.fixture
def engine(steerable: Any, tokenizer: Any) -> Iterator[Callable[..., Any]]:
    """Makes engines on the toy, with a router that votes by the input; stops them in the end."""
    pytest.importorskip("fastapi")
    from peft_hoe.serving.server.engine import Engine

    made = []

    def make(model: Any = None, *, start: bool = True, **options: Any) -> Any:
        model = model or steerable(trained=("r0",), interpolation="norm")
        engine = Engine(model, tokenizer, **options)
        if start:
            engine.start()
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.stop(0)


class Listener:
    """Hears of one text, and waits for its end."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.reason: str | None = None
        self.error: Exception | None = None
        self._over = threading.Event()

    def __call__(self, progress: Any) -> None:
        self.parts.append(progress.text)
        self.reason, self.error = progress.reason, progress.error
        if progress.is_last:
            self._over.set()

    def wait(self) -> str:
        assert self._over.wait(60)
        return "".join(self.parts)


@pytest.fixture
def ask(tokenizer: Any) -> Callable[..., tuple[Any, Listener]]:
    """Makes a text request for an engine, and its listener."""
    import numpy as np

    from peft_hoe.serving.server.sampling import Sampling
    from peft_hoe.serving.server.sequences import TextRequest
    from peft_hoe.serving.server.text_stream import TextStream

    def make(prompt: str, preference: Any, length: int = 8, **sampling: Any) -> tuple[Any, Listener]:
        listener = Listener()
        stops = sampling.pop("stop_tokens", (2,))
        settings = Sampling(**{"temperature": 0.0, **sampling})
        ids = tokenizer(prompt)["input_ids"]
        return TextRequest(
            ids, np.asarray(preference), length, settings, stops, TextStream(tokenizer), listener
        ), listener

    return make


@contextmanager
def _serving(app: Any, **options: Any) -> Iterator[str]:
    """A server on a free port of this machine, while the block lasts."""
    import uvicorn

    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", timeout_graceful_shutdown=5, **options)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 30
        while not server.started:
            assert time.monotonic() < deadline
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive()


@pytest.fixture
def serving() -> Any:
    pytest.importorskip("uvicorn")
    return _serving
