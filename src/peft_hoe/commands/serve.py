"""`peft-hoe serve`: an adapter as an OpenAI server with a preference in every request."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import HoEError

_PORT = 8000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add = parser.add_argument
    add("adapter", metavar="ADAPTER", help="directory or Hub id of a HoE adapter")
    add("--base", help="directory or Hub id of its base model; default what the adapter names")
    add("--name", help="of the model in requests; default the last part of ADAPTER")
    add("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine alone)")
    add("--port", type=int, default=_PORT, help=f"default {_PORT}; 0 takes a free one")
    add("--max-batch", type=int, default=16, help="texts that are written at once (default 16)")
    add("--max-queue", type=int, default=256, help="texts that may wait; more are answered with 429 (default 256)")
    add("--max-length", type=int, help="tokens of a prompt and its text together (default the model's positions)")
    add("--max-body", type=int, default=1 << 20, help="bytes of a request (default 1 MiB)")
    add("--grace", type=int, default=30, help="seconds for texts under way when the server stops (default 30)")
    add("--page", action="store_true", help="also serve a page, /page, on which the preference is dragged")
    add("--sweep", metavar="DIR", help="a saved sweep whose front the page shows")
    add("--cpu", action="store_true", help="use no accelerator")
    add("--quiet", action="store_true", help="log warnings and errors only")


def run(arguments: argparse.Namespace) -> int:
    """Serve until stopped.

    Raises:
        HoEError: an argument cannot be used, a package is missing, or the model cannot be served.
    """
    try:
        import uvicorn

        from ..serving.server.app import create_app
        from ..serving.server.engine import Engine
    except ImportError as error:
        raise HoEError(
            f'the server needs packages that are not installed ({error}): pip install "peft-hoe[serve]"'
        ) from None
    import torch

    from ..inputs import load_adapter

    if arguments.sweep and not arguments.page:
        raise HoEError("--sweep is for the page; give --page too", argument="--sweep", value=arguments.sweep)

    model, tokenizer = load_adapter(arguments.adapter, arguments.base)
    model = model.eval().to("cuda" if torch.cuda.is_available() and not arguments.cpu else "cpu")
    engine = Engine(
        model,
        tokenizer,
        max_batch=arguments.max_batch,
        max_waiting=arguments.max_queue,
        max_length=arguments.max_length,
    )
    name = arguments.name or Path(arguments.adapter).name
    app = create_app(engine, name, max_body=arguments.max_body)
    if arguments.page:
        app = _with_page(app, engine, name, arguments.sweep)
        print(f"page: http://{arguments.host}:{arguments.port}/page")
    print(f"model {name!r}: preferences among {', '.join(engine.objectives)}, up to {engine.max_length} tokens")
    uvicorn.run(
        app,
        host=arguments.host,
        port=arguments.port,
        log_level="warning" if arguments.quiet else "info",
        timeout_graceful_shutdown=arguments.grace,
    )
    return 0


def _with_page(app: Any, engine: Any, name: str, sweep: str | None) -> Any:
    try:
        from ..serving.page.page import make_page, mount
    except ImportError as error:
        raise HoEError(
            f'the page needs a package that is not installed ({error}): pip install "peft-hoe[page]"', argument="--page"
        ) from None
    from ..evaluation import Sweep

    found = None if sweep is None else Sweep.load(sweep)
    if found is not None and list(found.objectives) != engine.objectives:
        raise HoEError(
            f"the sweep {sweep} has objectives {list(found.objectives)}, the adapter {engine.objectives}",
            argument="--sweep", value=list(found.objectives), allowed=engine.objectives,
        )  # fmt: skip
    return mount(app, make_page(engine, name, sweep=found), "/page")
