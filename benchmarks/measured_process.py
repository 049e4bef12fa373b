"""A command in a process of its own: CPU seconds, and memory with and without mapped files (Linux)."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

INTERVAL = 0.01  # seconds between two looks at the memory


@dataclass(frozen=True)
class Usage:
    """What a process used.

    Attributes:
        cpu: user and system seconds, of all threads.
        wall: seconds.
        anonymous: most bytes of memory that no file backs, at any look.
        resident: most bytes of memory, mapped files included.
        read: bytes that were read by system calls (mapped files do not count).
    """

    cpu: float
    wall: float
    anonymous: int
    resident: int
    read: int


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Usage:
    """Run a command to its end.

    Raises:
        SystemExit: it failed; shows what it said.
    """
    started = time.monotonic()
    log = Path(f"/tmp/measured-{os.getpid()}.log")
    with log.open("wb") as stream:
        process = subprocess.Popen(command, env={**os.environ, **(environment or {})}, stdout=stream, stderr=stream)
        seen = {"anonymous": 0, "resident": 0, "read": 0}
        watcher = threading.Thread(target=_watch, args=(process.pid, seen), daemon=True)
        watcher.start()
        _, status, used = os.wait4(process.pid, 0)
    watcher.join(timeout=1)
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text(errors='replace')[-3000:]}")
    log.unlink()
    return Usage(
        cpu=used.ru_utime + used.ru_stime, wall=time.monotonic() - started, anonymous=seen["anonymous"],
        resident=seen["resident"], read=seen["read"],
    )  # fmt: skip


def _watch(pid: int, seen: dict[str, int]) -> None:
    while True:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            seen["read"] = int(_field(Path(f"/proc/{pid}/io").read_text(), "rchar:"))
            seen["resident"] = 1024 * int(_field(status, "VmHWM:"))  # not ru_maxrss, which starts at the parent's
            seen["anonymous"] = max(seen["anonymous"], 1024 * int(_field(status, "RssAnon:")))
        except (OSError, StopIteration):  # it has ended, or is about to
            return
        time.sleep(INTERVAL)


def _field(text: str, name: str) -> str:
    return next(line.split()[1] for line in text.splitlines() if line.startswith(name))
