"""All routers of an adapter in turn."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import ExpertError, HoEError
from ..tuner.steering import Steering
from .first_process import on_first_process
from .normalization import RewardNormalizer
from .rewards import Rewards
from .router_config import HoERouterConfig
from .router_runs import begin_run, last_checkpoint, take_finished, write_finished
from .router_trainer import HoERouterTrainer


def train_routers(
    model: Any,
    args: HoERouterConfig,
    *,
    processing_class: Any,
    reward_model: Any,
    train_dataset: Any,
    eval_dataset: Any = None,
    routers: Sequence[str] | None = None,
    normalizer: RewardNormalizer | None = None,
    resume_from_checkpoint: bool = False,
    **others: Any,
) -> RewardNormalizer:
    """Train routers one after the other, each for its own preference; all share one payoff table.

    A router moves nothing but itself, so the order does not matter beyond the random numbers.

    Args:
        model: a PeftModel with a HoE adapter; its routers are trained in place.
        args: as for one router; `router` is ignored, and checkpoints go to `<output_dir>/<router>`.
        processing_class: the policy's tokenizer.
        reward_model: rewards of all objectives.
        train_dataset: prompts.
        eval_dataset: prompts of the sample and payoff tables.
        routers: names; default all of them.
        normalizer: the scale of the rewards; default measured once.
        resume_from_checkpoint: go on with the run that `args.output_dir` holds: finished routers are taken from there, the one
            under way continues from its last checkpoint, if it has one, and later ones start anew. The routers afterwards are
            those of an uninterrupted run.
        others: more arguments of `HoERouterTrainer`.

    Returns:
        the payoff table in use. The adapter is saved in `args.output_dir`.

    Raises:
        ExpertError: there are no routers, or unknown ones; before any of them trains.
        CheckpointError: there is no run to resume, or its settings were others.
    """
    steering = Steering.of(model)
    config = steering.adapters[args.model_adapter_name or steering.active_adapter()].config
    names = config.router_names if routers is None else list(routers)
    unknown = [name for name in names if name not in config.router_names]
    if unknown or not names:
        raise ExpertError(f"routers {unknown or names} are to be trained; the adapter has {config.router_names}")
    rewards = Rewards.of(reward_model, list(config.objectives or []), timeout=args.reward_timeout)
    run: str | None = None
    for name in names:
        trainer = HoERouterTrainer(
            args=_for_router(args, name),
            processing_class=processing_class,
            model=model,
            reward_model=rewards,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            normalizer=normalizer,
            **others,
        )
        if run is None:
            run = on_first_process(
                trainer.accelerator, partial(begin_run, str(args.output_dir), resume_from_checkpoint)
            )
        trainer.run = run
        if not (resume_from_checkpoint and take_finished(trainer)):
            _train(trainer, resume_from_checkpoint)
        normalizer = trainer.normalizer
        trainer.save_model(str(args.output_dir))  # a later router that fails must not cost this one
        if trainer.interrupted:
            break
    if normalizer is None:  # every run has one
        raise HoEError("no router has been trained")
    return normalizer


def _train(trainer: HoERouterTrainer, resume: bool) -> None:
    """Train a router, or what is left of it."""
    trainer.train(resume_from_checkpoint=last_checkpoint(trainer) if resume else None)
    if not trainer.interrupted or trainer.state.global_step >= trainer.state.max_steps:
        write_finished(trainer)


def _for_router(args: HoERouterConfig, name: str) -> HoERouterConfig:
    """The arguments of one router's run: what the trainer counts out is counted anew."""
    fields = {field.name: getattr(args, field.name) for field in dataclasses.fields(args) if field.init}
    for renamed, old in (("activation_checkpointing", "gradient_checkpointing"),):
        if renamed in fields:
            fields[old] = None
    fields |= {"router": name, "output_dir": str(Path(str(args.output_dir)) / name)}
    return HoERouterConfig(**fields)
