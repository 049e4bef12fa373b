"""Checkpoints of a training run: everything that the next update depends on.

A checkpoint is a folder `checkpoint-<update>` with the adapter, ready to be loaded, and `router_training.pt`. It is
written under another name and renamed when it is whole, so that an interruption leaves the one before as the last.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import CheckpointError

STATE_FILE = "router_training.pt"
_FOLDER = re.compile(r"checkpoint-(\d+)")


def rng_state() -> dict[str, Any]:
    """The state of every global random generator of this process."""
    numpy_state: Any = np.random.get_state()  # noqa: NPY002 - users' rewards may draw from it
    state = {
        "python": random.getstate(),
        "numpy": (numpy_state[0], torch.from_numpy(numpy_state[1].astype(np.int64)), *numpy_state[2:]),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Continue the generators where `rng_state` saw them."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    folder = Path(output_dir)
    found = [path for path in folder.iterdir() if _FOLDER.fullmatch(path.name)] if folder.is_dir() else []
    return sorted((path for path in found if (path / STATE_FILE).is_file()), key=_update)


def _update(path: Path) -> int:
    return int(path.name.rsplit("-", 1)[1])


def finish_checkpoint(unfinished: Path, folder: Path, limit: int | None, best: str | None = None) -> None:
    """Give a folder that is whole its name, in place of one that may have it, and delete the oldest ones over the limit.

    Never deleted are the folder itself, as a longer run before may have left checkpoints of higher numbers, and the best one.
    """
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(unfinished, folder)
    if limit is not None and limit > 0:
        kept = {folder, Path(best)} if best is not None else {folder}
        others = [path for path in checkpoints(folder.parent) if path not in kept]
        for path in others[: max(0, len(others) + len(kept) - limit)]:
            shutil.rmtree(path)


def resume_folder(resume: str | os.PathLike[str] | bool, output_dir: str | os.PathLike[str]) -> Path:
    """The checkpoint that a run continues from: the one named, or with True the last.

    Raises:
        CheckpointError: there is none.
    """
    if resume is True:
        found = checkpoints(output_dir)
        if not found:
            raise CheckpointError(
                f"there is no checkpoint in {os.fspath(output_dir)} to resume from",
                argument="resume_from_checkpoint",
                value=resume,
                path=output_dir,
            )
        return found[-1]
    folder = Path(resume)  # type: ignore[arg-type]
    if not (folder / STATE_FILE).is_file():
        raise CheckpointError(
            f"{folder} holds no {STATE_FILE}; resume from a folder checkpoint-<update> of a router's run",
            argument="resume_from_checkpoint",
            value=resume,
            path=folder,
        )
    return folder


def read_state(folder: Path, name: str = STATE_FILE) -> dict[str, Any]:
    """What `write_state` wrote, or another state in such a folder.

    Raises:
        CheckpointError: the file cannot be read.
    """
    # Plain types and tensors only: such a file runs no code when it is opened.
    try:
        state: dict[str, Any] = torch.load(folder / name, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{folder / name} cannot be read ({error}); resume from another checkpoint", path=folder / name
        ) from error
    return state


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Write the training state beside the adapter."""
    torch.save(state, folder / STATE_FILE)
