"""`reproduce.json`: how far an experiment is, and with which settings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ..errors import HoEError
from ..evaluation.sweeps.result import installed_versions
from ..files import write_json
from .plan import Plan

FILE = "reproduce.json"
_FORMAT = "peft-hoe reproduce"
_WRITTEN = (
    "adapter",
    "trained",
    "trained-seed*",
    "placed",
    "baselines",
    "sweeps",
    "report.html",
    "front.png",
    "metrics.json",
    "summary.txt",
    FILE,
)


class Progress:
    """The file; `Progress(plan)` reads it and compares the settings, and writes nothing.

    Args:
        plan: the settings.
        restart: delete the experiment that the folder holds, and nothing else that is there.

    Attributes:
        finished: `{stage: what it says of itself}`.

    Raises:
        HoEError: the folder holds something else, or an experiment with other settings.
    """

    def __init__(self, plan: Plan, *, restart: bool = False) -> None:
        self.path = plan.folder / FILE
        self._settings = json.loads(json.dumps(plan.settings()))
        self.finished: dict[str, Any] = {}
        state = _read(plan.folder)
        if restart and state is not None:
            _clear(plan.folder)
        if restart or state is None:
            return
        there = state["settings"]
        names = [name for name in {**there, **self._settings} if not _agree(name, there, self._settings)]
        if names:
            changes = "; ".join(f"{name} was {there.get(name)!r}, is {self._settings.get(name)!r}" for name in names)
            raise HoEError(
                f"{plan.folder} holds an experiment with other settings: {changes}. Give the settings as they were, another "
                "folder, or start over (--restart), which deletes it",
                argument=names[0], value=self._settings.get(names[0]), allowed=there.get(names[0]),
            )  # fmt: skip
        self.finished = state["finished"]

    def finish(self, stage: str, note: Any = None) -> None:
        """Say that a stage is finished."""
        self.finished[stage] = note
        self._write()

    def forget(self, stages: list[str]) -> None:
        """Say that stages are no longer finished, since what they build on is made anew."""
        self.finished = {name: note for name, note in self.finished.items() if name not in stages}
        self._write()

    def _write(self) -> None:
        state = {
            "format": _FORMAT, "settings": self._settings, "finished": self.finished, "versions": installed_versions(),
        }  # fmt: skip
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, state)


def _read(folder: Path) -> dict[str, Any] | None:
    """What the file says; None where there is none and the folder is free.

    Raises:
        HoEError: the folder holds something else, or the file is damaged.
    """
    path = folder / FILE
    if not path.exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise HoEError(
                f"{folder} is not an empty folder, and holds no {FILE}; give another output",
                argument="output_dir", value=str(folder),
            )  # fmt: skip
        return None
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if (
            state["format"] != _FORMAT
            or not isinstance(state["settings"], dict)
            or not isinstance(state["finished"], dict)
        ):
            raise KeyError("format")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HoEError(
            f"{path} is damaged ({type(error).__name__}: {error}); give another output", value=str(path)
        ) from None
    return state


def _agree(name: str, there: dict[str, Any], here: dict[str, Any]) -> bool:
    """Whether a setting is as it was; after the first seed of training, whose sweep has the scale, there may be others."""
    if name == "seeds":
        return list(there.get(name) or [])[:1] == list(here.get(name) or [])[:1]
    return bool(there.get(name) == here.get(name))


def _clear(folder: Path) -> None:
    for name in _WRITTEN:  # this file last, so that an interruption leaves an experiment
        for path in list(folder.glob(name)):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
