"""All routers of an adapter in turn, by any of the trainers."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import ExpertError, HoEError
from ..tuner.steering import Steering
from .first_process import on_first_process
from .normalization import RewardNormalizer
from .router_runs import begin_run, last_checkpoint, take_finished, write_finished
from .trl_versions import missing

# Name: the trainer's class and its configuration's, where `peft_hoe.training` exports them.
TRAINERS = {
    "ppo": ("HoERouterTrainer", "HoERouterConfig"),
    "grpo": ("HoEGRPOTrainer", "HoEGRPOConfig"),
    "distill": ("HoEDistillationTrainer", "HoEDistillationConfig"),
    "dpo": ("HoEDPOTrainer", "HoEDPOConfig"),
}


def train_routers(
    model: Any,
    args: Any,
    *,
    trainer: str = "ppo",
    train_dataset: Any,
    routers: Sequence[str] | None = None,
    normalizer: RewardNormalizer | None = None,
    resume_from_checkpoint: bool = False,
    **others: Any,
) -> RewardNormalizer | None:
    """Train routers one after the other, each for its own preference; those with rewards share one payoff table.

    A router moves nothing but itself, so the order does not matter beyond the random numbers.

    Args:
        model: a PeftModel with a HoE adapter; its routers are trained in place.
        args: the trainer's configuration; `router` is ignored, and checkpoints go to `<output_dir>/<router>`.
        trainer: "ppo" (rewards, a critic), "grpo" (rewards), "distill" (text or prompts alone) or "dpo" (pairs of answers).
        train_dataset: what the trainer takes.
        routers: names; default all of them.
        normalizer: the scale of the rewards, for trainers with rewards; default measured once.
        resume_from_checkpoint: go on with the run that `args.output_dir` holds: finished routers are taken from there, the one
            under way continues from its last checkpoint, if it has one, and later ones start anew. The routers afterwards are
            those of an uninterrupted run.
        others: more arguments of the trainer's constructor, such as `processing_class` and `reward_model`.

    Returns:
        the payoff table in use; None where the trainer has no rewards. The adapter is saved in `args.output_dir`.

    Raises:
        HoEError: there is no such trainer, or `args` is another one's configuration.
        ImportError: the trainer needs another TRL.
        ExpertError: there are no routers, or unknown ones; before any of them trains.
        CheckpointError: there is no run to resume, or its settings were others.
    """
    make = _trainer_class(trainer, args)
    steering = Steering.of(model)
    config = steering.adapters[args.model_adapter_name or steering.active_adapter()].config
    names = config.router_names if routers is None else list(routers)
    unknown = [name for name in names if name not in config.router_names]
    if unknown or not names:
        raise ExpertError(f"routers {unknown or names} are to be trained; the adapter has {config.router_names}")
    has_rewards = "normalizer" in inspect.signature(make).parameters
    run: str | None = None
    for name in names:
        scale = {"normalizer": normalizer} if has_rewards else {}
        one = make(model=model, args=_for_router(args, name), train_dataset=train_dataset, **scale, **others)
        if run is None:
            run = on_first_process(one.accelerator, partial(begin_run, str(args.output_dir), resume_from_checkpoint))
        one.run = run
        if not (resume_from_checkpoint and take_finished(one)):
            _train(one, resume_from_checkpoint)
        normalizer = one.normalizer
        one.save_model(str(args.output_dir))  # a later router that fails must not cost this one
        if one.interrupted:
            break
    return normalizer


def _trainer_class(name: str, args: Any) -> Any:
    if name not in TRAINERS:
        raise HoEError(f"trainer is {name!r}; use one of {', '.join(TRAINERS)}")
    reason = missing(TRAINERS[name][0])
    if reason:
        raise ImportError(reason)
    training = import_module("peft_hoe.training")
    kind, configuration = (getattr(training, item) for item in TRAINERS[name])
    if not isinstance(args, configuration):
        raise HoEError(f"args is a {type(args).__name__}, but trainer={name!r} takes a {configuration.__name__}")
    return kind


def _train(trainer: Any, resume: bool) -> None:
    """Train a router, or what is left of it."""
    trainer.train(resume_from_checkpoint=last_checkpoint(trainer) if resume else None)
    if not trainer.interrupted or trainer.state.global_step >= trainer.state.max_steps:
        write_finished(trainer)


def _for_router(args: Any, name: str) -> Any:
    """The arguments of one router's run; a trainer counts things out in its own copy."""
    own = copy.copy(args)
    own.router, own.output_dir = name, str(Path(str(args.output_dir)) / name)
    return own
