"""What was measured so far, kept in a folder, so that a benchmark that was stopped goes on."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from measured_process import Usage


class Records:
    """What was measured so far, by name, in a folder.

    Args:
        folder: where they lie.
        again: whether those that are there are dropped.
    """

    def __init__(self, folder: Path, again: bool) -> None:
        self._folder = folder
        if again:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)

    def __contains__(self, name: str) -> bool:
        return (self._folder / f"{name}.json").is_file()

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """What `measure` returns, in JSON types; from the record where there is one."""
        path = self._folder / f"{name}.json"
        if name not in self:
            print(f"{name} ...", file=sys.stderr, flush=True)
            fresh = path.with_suffix(".new")
            fresh.write_text(json.dumps(measure()) + "\n")
            fresh.rename(path)
        return json.loads(path.read_text())

    def usage(self, name: str, measure: Callable[[], Usage]) -> Usage:
        """The same of a process."""
        return Usage(**self.get(name, lambda: asdict(measure())))
