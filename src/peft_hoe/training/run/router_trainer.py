"""What every trainer of a router does alike: choose, steer, freeze, optimise, average, save and resume."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

from ...errors import CheckpointError, HoEError
from ...objectives.normalizer import RewardNormalizer
from ...objectives.weights import ObjectiveWeights
from ...router_recipe import learning_rate
from .checkpoints import resume_folder
from .interrupt import Interrupt
from .model_settings import ModelSettings
from .optimizer import parameter_groups, take_over
from .plateau import Plateau
from .processes import over_processes
from .steered_policy import hidden_size, steerable
from .trained_router import RunningMean, TrainedRouter
from .training_state import RouterTrainingState
from .verdict import HeldOut, Verdict, check_volumes, compare

logger = logging.getLogger(__name__)


class RouterTrainer(Trainer):
    """A Trainer of one router; a trainer of TRL may stand between it and transformers' (`class Ours(RouterTrainer, Theirs)`).

    A constructor calls `_choose_router`, then the other trainer's constructor.

    Attributes:
        training_state: the router, its objectives' weights, and all else that a checkpoint carries.
        interrupted: whether SIGINT has stopped the run.
        verdict: whether the router helped, where there are rewards and held-out prompts to tell.
    """

    args: Any  # the configuration of the class that is made, over RouterArguments
    optimizer: Any
    training_state: RouterTrainingState
    interrupted = False
    verdict: Verdict | None = None

    same_settings: ClassVar[tuple[str, ...]] = ("seed", "average_routers")  # else a resumed run would be another
    _has_run = False
    _interrupt: Interrupt
    _plateau_schedule: LambdaLR | None = None

    def _choose_router(self, model: Any, args: Any, peft_config: Any = None, *others: nn.Module) -> Any:
        """Take the policy and the router that `args` name; the policy.

        Raises:
            HoEError, ExpertError, PreferenceError: model, adapter or router cannot be trained.
        """
        policy = steerable(model, peft_config)
        self.training_state = RouterTrainingState(
            policy, args.router, args.model_adapter_name, average=args.average_routers, others=others,
            auto_stop=getattr(args, "auto_stop", False),
        )  # fmt: skip
        return policy

    def _weigh_objectives(self, args: Any, beta: float) -> None:
        """Make the weights of the objectives as `ObjectiveArguments` say, at the router's preference; β by its own name."""
        self.training_state.weights = ObjectiveWeights(
            self.router.preference,
            mu=args.mu,
            beta=beta,
            step=args.step,
            reference_point=args.reference_point,
            weighting=args.weighting,
            objectives=self.objectives,
        )

    # -- what there is in the state ---

    @property
    def policy(self) -> Any:
        """The PeftModel whose router trains."""
        return self.training_state.policy

    @property
    def router(self) -> TrainedRouter:
        """The Parameters of the router."""
        return self.training_state.router

    @property
    def objectives(self) -> list[str]:
        """N names."""
        return self.training_state.objectives

    @property
    def average(self) -> RunningMean | None:
        """The mean of the router over the updates, if asked for."""
        return self.training_state.average

    @property
    def weights(self) -> ObjectiveWeights | None:
        """The weights of the objectives, where the trainer has rewards."""
        return self.training_state.weights

    @property
    def normalizer(self) -> RewardNormalizer | None:
        """The scale of the rewards, where the trainer has some and once it is known."""
        return self.training_state.normalizer

    @normalizer.setter
    def normalizer(self, normalizer: RewardNormalizer | None) -> None:
        self.training_state.normalizer = normalizer

    @property
    def plateau(self) -> Plateau | None:
        """How the worst gap went, with `auto_stop`."""
        return self.training_state.plateau

    @property
    def model_settings(self) -> ModelSettings:
        """What the trainer below writes into the model."""
        return self.training_state.model_settings

    # -- training ---

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | os.PathLike[str] | bool | None = None, **others: Any
    ) -> Any:
        """Train until the schedule ends, a callback stops, or SIGINT.

        Args:
            resume_from_checkpoint: a folder `checkpoint-<update>`, or True for the last in `args.output_dir`. The parameters
                afterwards are those of an uninterrupted run.
            others: what the trainer below takes.

        Raises:
            HoEError: a reward fails, the checkpoint does not fit, this trainer has run before, or there is to be a verdict and
                moocore is missing. The model keeps what was trained so far.
        """
        if self._has_run:
            raise HoEError(
                "this trainer has run: its schedule is used up. Make a new one to train on, or resume from a checkpoint with it"
            )
        if self.weights is not None and self.eval_dataset is not None:  # type: ignore[has-type]
            check_volumes(getattr(self.args, "verdict_texts", 0))
        folder = resume_folder(resume_from_checkpoint, self.args.output_dir) if resume_from_checkpoint else None
        weights = None if self.weights is None else self.weights.state_dict()
        try:
            with (
                self.training_state.training(self.args),
                Interrupt(enabled=self.args.save_on_interrupt) as self._interrupt,
            ):
                result = self._train(folder, **others)
        finally:
            if self.state.global_step > 0:  # also after an exception: what was trained so far is the router
                self._has_run = True
                self.training_state.put_router()
            elif self.weights is not None and weights is not None:  # it may be tried again, from where it began
                self.weights.load_state_dict(weights)

        if self.plateau is not None:
            logger.info("router %r: %s", self.router.router, self.plateau)
        self._judge()
        return result

    def _train(self, folder: Path | None, **others: Any) -> Any:
        """The loop, from a checkpoint's folder where there is one; the policy is steered."""
        raise NotImplementedError

    def _held_out(self) -> HeldOut | None:
        """What the verdict is measured with; None where the trainer has no rewards, or no evaluation prompts."""
        return None

    def _computed(self, compute: Callable[[], Verdict]) -> Verdict:
        """What `compute` returns, the same on all processes."""
        return compute()

    def _judge(self) -> None:
        """Compare the router with its untrained self; one that did not help is left untrained."""
        texts = getattr(self.args, "verdict_texts", 0)
        if not texts or self.interrupted or self.state.global_step == 0:
            return
        held, normalizer = self._held_out(), self.normalizer
        if held is None or normalizer is None:
            return
        with self.model_settings.applied():
            self.verdict = self._computed(lambda: compare(held, self.policy, self.router, texts, normalizer))
        self.training_state.helps = self.verdict.helps
        self.training_state.put_router()
        logger.log(logging.INFO if self.verdict.helps else logging.WARNING, "%s", self.verdict)

    def _parameter_groups(self) -> list[dict[str, Any]]:
        return parameter_groups(self.router, self.args.weight_decay)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """An optimizer that holds what trains and nothing else."""
        groups = self._parameter_groups()
        if self.optimizer is None:
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args)
            if self.args.learning_rate is None:  # the arguments stay as they are: another router may train with them
                settings["lr"] = learning_rate(self.router.kind, hidden_size(self.policy))
            self.optimizer = kind(groups, **settings)
        else:
            take_over(self.optimizer, [parameter for group in groups for parameter in group["params"]])
        optimizer: torch.optim.Optimizer = self.optimizer
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The rate of a run that finds its own end follows that; else the schedule that the arguments say."""
        plateau = self.plateau
        if plateau is None:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler not in (None, self._plateau_schedule):
            raise HoEError(
                "a schedule is given in optimizers, but auto_stop=True has its own; leave one of them out",
                argument="optimizers",
            )
        plateau.most = num_training_steps
        schedule = LambdaLR(self.optimizer if optimizer is None else optimizer, lambda step: plateau.rate(step))
        self.lr_scheduler = self._plateau_schedule = schedule
        return schedule

    def follow_plateau(self) -> None:
        """End where the plateau says, if it is known."""
        if self.plateau is not None and self.plateau.last is not None:
            self.state.max_steps = self.plateau.last

    def update_ended(self) -> None:
        """Average, and stop where SIGINT has asked for it; after every step of the optimizer, on all processes."""
        if self.average is not None:
            self.average.add(self.router.state_dict())
        if self.plateau is not None and self.weights is not None and self.weights.updates > len(self.plateau.gaps):
            self.plateau.note(self.weights.worst_gap, self.state.global_step)
            self.follow_plateau()
        if over_processes(self.accelerator, float(self._interrupt.requested)) > 0:
            self.interrupted = True
            self.control.should_save = self.control.should_training_stop = True

    # -- saving and resuming ---

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter, its router trained, to `output_dir` (default `args.output_dir`)."""
        if self.state.global_step > 0:
            self.training_state.put_router()
        super().save_model(output_dir, _internal_call)

    def settings_to_resume(self) -> dict[str, Any]:
        """What a resumed run must have in common with the run that wrote the checkpoint."""
        settings = {name: getattr(self.args, name) for name in self.same_settings}
        if self.plateau is not None:
            settings["auto_stop"] = True
        return {"router": self.router.router, "processes": self.accelerator.num_processes, **settings}

    def _run_state(self) -> dict[str, Any]:
        """Plain types and tensors, for `write_state`."""
        return self.training_state.state_dict() | {"settings": self.settings_to_resume()}

    def _check_settings(self, saved: dict[str, Any], folder: Path) -> None:
        """See that a `_run_state` is this run's.

        Raises:
            CheckpointError: it belongs to a run with other settings.
        """
        here, there = self.settings_to_resume(), saved["settings"]
        if here != there:
            raise CheckpointError(
                f"{folder} was written by a run with {there}, but this one has {here}",
                path=folder,
                value=here,
                allowed=there,
            )
