"""What a run over several routers leaves behind, so that it can go on: which run it is, and which routers are finished.

Every run has an identity of its own, which its checkpoints hold too. So what an earlier run left in the same folder is never
taken for a part of this one.
"""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from .checkpoints import checkpoints, read_state
from .normalization import RewardNormalizer

RUN_FILE = "routers_run.json"
FINISHED_FILE = "router_finished.pt"
# Beside the settings that a checkpoint compares: a finished router is not trained again with others.
_SCHEDULE = ("max_steps", "num_train_epochs", "num_total_batches")


def begin_run(output_dir: str | os.PathLike[str], resume: bool) -> str:
    """The identity of a new run, or of the one that is to go on.

    Raises:
        CheckpointError: there is none to go on.
    """
    path = Path(output_dir) / RUN_FILE
    if resume:
        try:
            run: str = json.loads(path.read_text(encoding="utf-8"))["run"]
        except (OSError, ValueError, KeyError, TypeError):
            raise CheckpointError(
                f"there is no run of several routers in {os.fspath(output_dir)} to resume; train without resuming first"
            ) from None
        return run
    run = uuid.uuid4().hex
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"run": run}) + "\n", encoding="utf-8")
    return run


def finished_routers(output_dir: str | os.PathLike[str]) -> list[str]:
    """The names of the routers that the run in `output_dir` has finished.

    Raises:
        CheckpointError: there is no run, or a file cannot be read.
    """
    run = begin_run(output_dir, resume=True)
    states = sorted(Path(output_dir).glob(f"*/{FINISHED_FILE}"))
    return [path.parent.name for path in states if read_state(path.parent, path.name)["run"] == run]


def last_checkpoint(trainer: Any) -> Path | None:
    """The last checkpoint that the trainer's run wrote for its router."""
    for folder in reversed(checkpoints(trainer.args.output_dir)):
        if read_state(folder).get("run") == trainer.run:
            return folder
    return None


def write_finished(trainer: Any) -> None:
    """Say that a trainer's router is finished, and keep what it became: whole, or not at all."""
    if trainer.accelerator.is_main_process:
        averaged = trainer.average is not None and trainer.average.count > 0
        state = {
            "run": trainer.run,
            "router": trainer.average.values if averaged else trainer.router.state_dict(),
            # The next router starts from a user's value model as this one left it; heads are made anew.
            "critic": None if _critic(trainer) is None else _critic(trainer).state_dict(),
            "normalizer": None if trainer.normalizer is None else trainer.normalizer.state_dict(),
            "settings": _settings(trainer),
        }
        path = Path(trainer.args.output_dir) / FINISHED_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, path.with_suffix(".unfinished"))
        os.replace(path.with_suffix(".unfinished"), path)
    trainer.accelerator.wait_for_everyone()


def take_finished(trainer: Any) -> bool:
    """Put a router that the run has finished into the model; whether it has.

    Raises:
        CheckpointError: it was trained with other settings, or cannot be read.
    """
    path = Path(trainer.args.output_dir) / FINISHED_FILE
    if not path.is_file():
        return False
    state = read_state(path.parent, path.name)
    if state["run"] != trainer.run:
        return False
    here, there = _settings(trainer), state["settings"]
    if here != there:
        raise CheckpointError(f"{path} was written by a run with {there}, but this one has {here}")
    trainer.router.load_state_dict(state["router"])
    trainer.put_router()
    if state["critic"] is not None and _critic(trainer) is not None:
        _critic(trainer).load_state_dict(state["critic"])
    if state["normalizer"] is not None:
        trainer.normalizer = RewardNormalizer.from_state_dict(state["normalizer"])
    return True


def _critic(trainer: Any) -> Any:
    """A user's value model, where the trainer has one."""
    return getattr(trainer, "value_model", None)


def _settings(trainer: Any) -> dict[str, Any]:
    settings: dict[str, Any] = trainer._settings()
    weights = None if trainer.weights is None else trainer.weights.state_dict()["settings"]
    return settings | {name: getattr(trainer.args, name, None) for name in _SCHEDULE} | {"weights": weights}
