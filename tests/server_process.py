"""A server as another process, until it answers and as long as it is needed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def started(
    command: Sequence[str], log: Path, *, seconds: float = 180, environment: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Start a server on a free port; gives its address once `/health` answers, and ends it with its children.

    Args:
        command: program and arguments; `--port` and a number are appended.
        log: where it prints, the end of which an assertion says where it does not start.
        seconds: until it must answer.
        environment: beside that of this process.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + seconds
    with log.open("w") as output:
        server = subprocess.Popen(
            [*command, "--port", str(port)], env={**os.environ, **(environment or {})}, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
    try:
        while not _answers(f"{address}/health"):
            assert server.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.3)
        yield address
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)  # the session that was started above
        server.wait(60)


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except OSError:
        return False
    return True
