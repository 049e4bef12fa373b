"""The stage that places experts and routers by measurement; goes on where it was interrupted.

`placed/place.json` says what was tried and which folder holds the adapter and the sweep as they are then, so that both always
belong together: a new folder is filled first, then named.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation.sweeps.run import sweep
from ..evaluation.sweeps.sweep import Sweep
from ..files import write_json
from ..inputs import load_adapter
from ..placing import Budget, Placement, Trial, place
from ..placing.additions import parameters_of
from ..tuner.functional import adapter_of
from .inputs import Prompts
from .plan import Plan
from .training import arguments

FOLDER, STORY = "placed", "story.txt"
_STATE = "place.json"


class PlacingState:
    """What was tried so far, on disk.

    Args:
        folder: `placed`.

    Attributes:
        trials: in their order.
        seconds: that they took.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._path = folder, folder / _STATE
        self.trials: list[Trial] = []
        self.seconds = 0.0
        self._current: str | None = None
        if self._path.is_file():
            state = json.loads(self._path.read_text(encoding="utf-8"))
            self.trials = [Trial.of(trial) for trial in state["trials"]]
            self.seconds, self._current = state["seconds"], state["current"]

    @property
    def current(self) -> Path | None:
        """The folder with `adapter` and `sweep` as they are; None where nothing was done yet."""
        return None if self._current is None else self.folder / self._current

    def keep(self, model: Any, front: Sweep) -> None:
        """Write the adapter and its sweep as they are now."""
        name = f"after-{len(self.trials)}"
        shutil.rmtree(self.folder / name, ignore_errors=True)
        model.save_pretrained(str(self.folder / name / "adapter"))
        front.save(self.folder / name / "sweep")
        before, self._current = self.current, name
        self.write()
        if before is not None and before.name != name:
            shutil.rmtree(before, ignore_errors=True)

    def write(self) -> None:
        """Say how far it is."""
        state = {
            "trials": [trial.to_dict() for trial in self.trials], "seconds": self.seconds, "current": self._current,
        }  # fmt: skip
        write_json(self._path, state)


def placed(plan: Plan, before: Path, prompts: Prompts, rewards: Any, device: str, *, progress: bool) -> Placement:
    """Place experts and routers where the front is weak on the validation prompts.

    Args:
        plan: the settings.
        before: the adapter's folder.
        prompts: of the experiment.
        rewards: likewise.
        device: of the sweeps.
        progress: whether the story is printed.
    """
    state, started = PlacingState(plan.folder / FOLDER), time.monotonic()
    used = state.seconds
    model, tokenizer = load_adapter(str(before if state.current is None else state.current / "adapter"), plan.base)
    model = model.eval().to(device)
    shared = {"tokenizer": tokenizer, "rewards": rewards, "batch_size": plan.sweep_batch_size}
    if state.current is None:
        front = _front(plan, model, prompts.validation, shared, progress)
        state.folder.mkdir(parents=True, exist_ok=True)
        state.keep(model, front)
    else:
        front = Sweep.load(state.current / "sweep")

    def after(trial: Trial, now: Sweep) -> None:
        state.trials.append(trial)
        state.seconds = used + time.monotonic() - started
        if trial.kept:
            state.keep(model, now)
        else:
            state.write()

    trains = plan.updates != 0
    gained = sum(trial.parameters for trial in state.trials if trial.kept)
    found = place(
        model, front, budget=_budget(plan, model, gained, used), prompts=prompts.validation, source=plan.folder / "adapter",
        base=plan.base, args=arguments(plan, progress, state.folder / "training", resumes=False) if trains else None,
        trainer=plan.trainer, train_dataset=prompts.train if trains else None, trials=list(state.trials), after=after,
        say=print if progress else None, **shared,
    )  # fmt: skip
    (state.folder / STORY).write_text(found.story() + "\n", encoding="utf-8")
    return found


def placed_adapter(folder: Path) -> Path:
    """The adapter that the stage left in an experiment's folder."""
    current = PlacingState(folder / FOLDER).current
    return folder / FOLDER if current is None else current / "adapter"


def _front(plan: Plan, model: Any, rows: Any, shared: dict[str, Any], progress: bool) -> Sweep:
    """Of the validation prompts, on the scale of its own corners where it has them all."""
    points = np.asarray(plan.preferences)
    corners = [bool((np.abs(points - corner).max(axis=1) < 1e-9).any()) for corner in np.eye(points.shape[1])]
    return sweep(
        model, prompts=rows, preferences=plan.preferences, decoding=plan.decoding, texts=plan.texts, seed=plan.seed,
        payoff=None if all(corners) else rows, name="HoE, validation", progress=progress, **shared,
    )  # fmt: skip


def _budget(plan: Plan, model: Any, gained: int, used: float) -> Budget:
    """The plan's, less the time that is used; as many parameters as the adapter was built with where it says nothing."""
    if isinstance(plan.auto, Budget):
        left = None if plan.auto.seconds is None else max(plan.auto.seconds - used, 1e-9)
        return Budget(parameters=plan.auto.parameters, seconds=left)
    return Budget(parameters=parameters_of(model, adapter_of(model).name) - gained)
