"""What every trainer of a router does alike: choose, steer, freeze, optimise, average, save and resume."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from ...errors import CheckpointError, ExpertError, HoEError
from ...objectives.payoff import RewardNormalizer
from ...objectives.weights import ObjectiveWeights
from ...tuner.functional import mark_trained
from ...tuner.steering import Steering
from .checkpoints import resume_folder
from .model_settings import RunSettings
from .optimizer import parameter_groups, take_over
from .processes import over_processes
from .steered_policy import checkpointed, steerable, steered
from .trained_router import RunningMean, TrainedRouter


class RouterRun:
    """A mixin before a Trainer; the other one's constructor runs between `_choose_router` and `train`.

    Attributes:
        policy: the PeftModel whose router trains.
        router: its Parameters.
        objectives: N names.
        weights: of the objectives, where the trainer has rewards.
        normalizer: the scale of these rewards.
        average: the mean of the router over the updates, if asked for.
        interrupted: whether SIGINT has stopped the run.
        model_settings: what the trainer below writes into the model.
        run: of `train_routers`: which one its checkpoints belong to.
    """

    args: Any
    accelerator: Any
    state: Any
    control: Any
    optimizer: Any
    policy: Any
    model_settings: RunSettings
    router: TrainedRouter
    objectives: list[str]
    average: RunningMean | None
    weights: ObjectiveWeights | None = None
    normalizer: RewardNormalizer | None = None
    interrupted = False
    run: str | None = None

    _experts: list[str]
    _has_run = False
    _interrupt: Interrupt
    _same: tuple[str, ...] = ("seed", "average_routers")  # settings without which a resumed run would be another

    def _choose_router(self, model: Any, args: Any, peft_config: Any = None) -> Any:
        """Take the policy and the router that `args` name; the policy.

        Raises:
            HoEError, ExpertError, PreferenceError: model, adapter or router cannot be trained.
        """
        self.policy = steerable(model, peft_config)
        self.model_settings = RunSettings(self.policy)
        self.router = TrainedRouter(self.policy, args.router, args.model_adapter_name)
        steering, adapter = Steering.of(self.policy), self.router.adapter
        if adapter not in steering.active:
            raise ExpertError(
                f"adapter {adapter!r} is not active, so its router would not vote; call model.set_adapter({adapter!r}) first"
            )
        self.objectives = steering.adapters[adapter].objectives
        self._experts = steering.adapters[adapter].config.expert_names
        self.average = RunningMean() if args.average_routers else None
        return self.policy

    def _objective_weights(self, args: Any, beta: float) -> ObjectiveWeights:
        """The weights of the objectives as `ObjectiveArguments` say, at the router's preference; β by its own name."""
        return ObjectiveWeights(
            self.router.preference,
            mu=args.mu,
            beta=beta,
            step=args.step,
            reference_point=args.reference_point,
            weighting=args.weighting,
            objectives=self.objectives,
        )

    # -- training ---

    def train(self, resume_from_checkpoint: str | os.PathLike[str] | bool | None = None, **others: Any) -> Any:
        """Train until the schedule ends, a callback stops, or SIGINT.

        Args:
            resume_from_checkpoint: a folder `checkpoint-<update>`, or True for the last in `args.output_dir`. The parameters
                afterwards are those of an uninterrupted run.
            others: what the trainer below takes.

        Raises:
            HoEError: a reward fails, the checkpoint does not fit, or this trainer has run before. The model keeps what was
                trained so far.
        """
        if self._has_run:
            raise HoEError(
                "this trainer has run: its schedule is used up. Make a new one to train on, or resume from a checkpoint with it"
            )
        folder = resume_folder(resume_from_checkpoint, self.args.output_dir) if resume_from_checkpoint else None
        weights = None if self.weights is None else self.weights.state_dict()
        try:
            with (
                self.model_settings.applied(),
                steered(self.policy, self.router),
                checkpointed(self.policy, self.args),
                Interrupt(enabled=self.args.save_on_interrupt) as self._interrupt,
            ):
                self.router.read()
                return self._train(folder, **others)
        finally:
            if self.state.global_step > 0:  # also after an exception: what was trained so far is the router
                self._has_run = True
                self.put_router()
            elif self.weights is not None and weights is not None:  # it may be tried again, from where it began
                self.weights.load_state_dict(weights)

    def _train(self, folder: Path | None, **others: Any) -> Any:
        """The loop, from a checkpoint's folder where there is one; the policy is steered."""
        raise NotImplementedError

    def _parameter_groups(self) -> list[dict[str, Any]]:
        return parameter_groups(self.router, self.args.weight_decay)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """An optimizer that holds what trains and nothing else."""
        groups = self._parameter_groups()
        if self.optimizer is None:
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args)  # type: ignore[attr-defined]
            self.optimizer = kind(groups, **settings)
        else:
            take_over(self.optimizer, [parameter for group in groups for parameter in group["params"]])
        optimizer: torch.optim.Optimizer = self.optimizer
        return optimizer

    def _step_ended(self) -> None:
        """After every step of the optimizer, on all processes."""
        if self.average is not None:
            self.average.add(self.router.state_dict())
        if over_processes(self.accelerator, float(self._interrupt.requested)) > 0:
            self.interrupted = True
            self.control.should_save = self.control.should_training_stop = True

    # -- saving and resuming ---

    def put_router(self) -> None:
        """Write the trained router, or its mean over the updates, into its place in the model, and mark it."""
        averaged = self.average is not None and self.average.count > 0
        self.router.write(self.average.values if averaged and self.average is not None else None)
        mark_trained(self.policy, self.router.router, adapter_name=self.router.adapter)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter, its router trained, to `output_dir` (default `args.output_dir`)."""
        if self.state.global_step > 0:
            self.put_router()
        super().save_model(output_dir, _internal_call)  # type: ignore[misc]

    def _settings(self) -> dict[str, Any]:
        """What a resumed run must have in common with the run that wrote the checkpoint."""
        settings = {name: getattr(self.args, name) for name in self._same}
        return {"router": self.router.router, "processes": self.accelerator.num_processes, **settings}

    def _run_state(self) -> dict[str, Any]:
        """Plain types and tensors, for `write_state`."""
        return {
            "run": self.run,
            "settings": self._settings(),
            "router": self.router.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "weights": None if self.weights is None else self.weights.state_dict(),
            "normalizer": None if self.normalizer is None else self.normalizer.state_dict(),
        }

    def _load_run_state(self, saved: dict[str, Any], folder: Path) -> None:
        """Continue from `_run_state`.

        Raises:
            CheckpointError: it belongs to a run with other settings.
            HoEError: it belongs to other settings of the objectives' weights.
        """
        here, there = self._settings(), saved["settings"]
        if here != there:
            raise CheckpointError(f"{folder} was written by a run with {there}, but this one has {here}")
        if self.weights is not None:
            self.weights.load_state_dict(saved["weights"])
        self.router.load_state_dict(saved["router"])
        if saved["normalizer"] is not None:
            self.normalizer = RewardNormalizer.from_state_dict(saved["normalizer"])
        if self.average is not None and saved["average"] is not None:
            self.average.load_state_dict(saved["average"], self.accelerator.device)


class Interrupt:
    """While the block lasts, the first SIGINT only sets `requested`; the second one acts as before the block.

    Does nothing outside the main thread, where Python does not let handlers be set.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        self.requested = False
        self._enabled = enabled and threading.current_thread() is threading.main_thread()
        self._previous: Any = None

    def __enter__(self) -> Interrupt:
        if self._enabled:
            self._previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *unused: Any) -> None:
        if self._enabled:
            signal.signal(signal.SIGINT, self._previous)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, self._previous)
