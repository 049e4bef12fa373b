"""`peft-hoe serve`: an adapter as an OpenAI server with a preference in every request."""

from __future__ import annotations

import argparse
import os
import socket
from pathlib import Path
from typing import Any

from ..errors import HoEError

_PORT = 8000
_PORTS = 65535


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

    _check(arguments)
    name = arguments.name or Path(arguments.adapter.partition("@")[0]).name
    # The port is held while the model is loaded, which may take minutes, and nobody is answered yet.
    with _bound(arguments.host, arguments.port) as place:
        port = place.getsockname()[1]
        model, tokenizer = load_adapter(arguments.adapter, arguments.base)
        model = model.eval().to("cuda" if torch.cuda.is_available() and not arguments.cpu else "cpu")
        engine = Engine(
            model,
            tokenizer,
            max_batch=arguments.max_batch,
            max_waiting=arguments.max_queue,
            max_length=arguments.max_length,
        )
    app = create_app(engine, name, max_body=arguments.max_body)
    if arguments.page:
        app = _with_page(app, engine, name, arguments.sweep)
        print(f"page: http://{arguments.host}:{port}/page")
    print(f"model {name!r}: preferences among {', '.join(engine.objectives)}, up to {engine.max_length} tokens")
    uvicorn.run(
        app,
        host=arguments.host,
        port=port,
        log_level="warning" if arguments.quiet else "info",
        timeout_graceful_shutdown=arguments.grace,
    )
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Refuse options that cannot be used."""
    if arguments.sweep and not arguments.page:
        raise HoEError("--sweep is for the page; give --page too", argument="--sweep", value=arguments.sweep)
    if arguments.name is not None and (not arguments.name or "@" in arguments.name):
        raise HoEError(
            f"--name is {arguments.name!r}; a name is not empty and has no @, after which requests write a preference",
            argument="--name", value=arguments.name, allowed="a name without @",
        )  # fmt: skip
    if not 0 <= arguments.port <= _PORTS:  # the system would take it modulo 65536
        raise HoEError(
            f"--port is {arguments.port}; it must be from 0, for a free one, to {_PORTS}",
            argument="--port", value=arguments.port, allowed=f"0 to {_PORTS}",
        )  # fmt: skip
    for option, value, least in (("--max-body", arguments.max_body, 1), ("--grace", arguments.grace, 0)):
        if value < least:
            raise HoEError(
                f"{option} is {value}; it must be at least {least}",
                argument=option, value=value, allowed=f"at least {least}",
            )  # fmt: skip


def _bound(host: str, port: int) -> socket.socket:
    """A socket with its address, which does not listen yet.

    Raises:
        HoEError: the address is not there, or somebody else has the port.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            if os.name == "posix":  # as asyncio does it; elsewhere it lets two servers have one port
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:
        raise HoEError(
            f"cannot listen on {host}, port {port}: {error}; give another --port (0 takes a free one) or --host",
            argument="--port", value=port, allowed="a free port",
        ) from None  # fmt: skip
    return listener


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
