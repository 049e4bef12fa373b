"""All routers of an adapter in turn, by any of the trainers."""

from __future__ import annotations

import copy
import inspect
import json
import os
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback

from ..errors import CheckpointError, ExpertError, HoEError, check_choice
from ..objectives.normalizer import RewardNormalizer
from ..tuner.functional import adapter_of
from .run.checkpoints import checkpoints, read_state
from .run.processes import on_first_process
from .trl_versions import missing

RUN_FILE = "routers_run.json"
FINISHED_FILE = "router_finished.pt"
# Beside the settings that a checkpoint compares: a finished router is not trained again with others.
_SCHEDULE = ("max_steps", "num_train_epochs", "num_total_batches")

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
    say: Callable[[str], Any] | None = None,
    progress: bool = True,
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
        say: gets a line for each router that was compared with its untrained self, and with `auto_stop` one on where its
            training ended, such as `print`.
        progress: whether bars and metrics are shown on the console; `args.report_to` gets the metrics anyway.
        others: more arguments of the trainer's constructor, such as `processing_class` and `reward_model`.

    Returns:
        the payoff table in use; None where the trainer has no rewards. The adapter is saved in `args.output_dir`.

    Raises:
        HoEError: there is no such trainer, or `args` is another one's configuration.
        ImportError: the trainer needs another TRL.
        ExpertError: there are no routers, or unknown ones; before any of them trains.
        CheckpointError: there is no run to resume, or its settings were others.

    >>> from peft_hoe import HoEDistillationConfig, demo, train_routers
    >>> model = demo.load_demo_adapter(routers=[[0.75, 0.25], [0.25, 0.75]])
    >>> args = HoEDistillationConfig(
    ...     output_dir="run", max_steps=1, per_device_train_batch_size=4, max_new_tokens=8, save_strategy="no",
    ...     disable_tqdm=True, report_to="none", use_cpu=True,
    ... )
    >>> train_routers(
    ...     model, args, trainer="distill", train_dataset=[{"prompt": text} for text in demo.load_prompts()],
    ...     processing_class=demo.load_tokenizer(),
    ... )
    {'loss': ...}
    >>> [router.trained for router in model.peft_config["default"].routers]
    [True, True]
    """
    make = trainer_class(trainer, args)
    known = adapter_of(model, args.model_adapter_name).router_names
    names = known if routers is None else list(routers)
    unknown = [name for name in names if name not in known]
    if not known:
        raise ExpertError(
            "the adapter has no routers to train; add some, by model.add_router(preference) or peft-hoe add-router, or build "
            "it with routers= (--router)",
            argument="routers", value=names, allowed=known,
        )  # fmt: skip
    if unknown or not names:
        raise ExpertError(
            f"routers {unknown or names} are to be trained; the adapter has {known}",
            argument="routers",
            value=names,
            allowed=known,
        )
    has_rewards = "normalizer" in inspect.signature(make).parameters
    run: str | None = None
    for name in names:
        scale = {"normalizer": normalizer} if has_rewards else {}
        one = make(model=model, args=_for_router(args, name), train_dataset=train_dataset, **scale, **others)
        if run is None:
            run = on_first_process(one.accelerator, partial(begin_run, str(args.output_dir), resume_from_checkpoint))
        one.training_state.run_id = run
        if not progress:
            one.remove_callback(PrinterCallback)
            one.remove_callback(ProgressCallback)
        if not (resume_from_checkpoint and take_finished(one)):
            _train(one, resume_from_checkpoint)
            if one.plateau is not None and say is not None:
                say(f"router {name!r}: {one.plateau}")
        normalizer = one.normalizer
        if one.verdict is not None and say is not None:
            say(str(one.verdict))
        one.save_model(str(args.output_dir))  # a later router that fails must not cost this one
        if one.interrupted:
            break
    return normalizer


def trainer_class(name: str, args: Any) -> Any:
    """The trainer of a name, if `args` is its configuration.

    Raises:
        HoEError: there is no such trainer, or `args` is another one's configuration.
        ImportError: the trainer needs another TRL.
    """
    check_choice("trainer", name, tuple(TRAINERS))
    reason = missing(TRAINERS[name][0])
    if reason:
        raise ImportError(reason)
    kind, configuration = _classes(name)
    if not isinstance(args, configuration):
        raise HoEError(
            f"args is a {type(args).__name__}, but trainer={name!r} takes a {configuration.__name__}",
            argument="args",
            value=type(args).__name__,
        )
    return kind


def _classes(name: str) -> tuple[Any, Any]:
    """The trainer and its configuration. Imported here, since GRPO and DPO import TRL, which may be missing."""
    if name == "ppo":
        from .ppo.config import HoERouterConfig
        from .ppo.trainer import HoERouterTrainer

        return HoERouterTrainer, HoERouterConfig
    if name == "grpo":
        from .grpo.config import HoEGRPOConfig
        from .grpo.trainer import HoEGRPOTrainer

        return HoEGRPOTrainer, HoEGRPOConfig
    if name == "distill":
        from .distillation.config import HoEDistillationConfig
        from .distillation.trainer import HoEDistillationTrainer

        return HoEDistillationTrainer, HoEDistillationConfig
    from .dpo.config import HoEDPOConfig
    from .dpo.trainer import HoEDPOTrainer

    return HoEDPOTrainer, HoEDPOConfig


def _train(trainer: Any, resume: bool) -> None:
    """Train a router, or what is left of it."""
    trainer.train(resume_from_checkpoint=last_checkpoint(trainer) if resume else None)
    if not trainer.interrupted or trainer.state.global_step >= trainer.state.max_steps:
        write_finished(trainer)


def _for_router(args: Any, name: str) -> Any:
    """The arguments of one router's run; a trainer counts things out in its own copy."""
    own = copy.copy(args)
    own.router, own.output_dir = name, str(Path(str(args.output_dir)) / name)
    own.run_name = name if args.run_name is None else f"{args.run_name}-{name}"  # what reports call it
    return own


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
                f"there is no run of several routers in {os.fspath(output_dir)} to resume; train without resuming first",
                argument="resume_from_checkpoint",
                path=output_dir,
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
        if read_state(folder).get("run") == trainer.training_state.run_id:
            return folder
    return None


def write_finished(trainer: Any) -> None:
    """Say that a trainer's router is finished, and keep what it became: whole, or not at all."""
    if trainer.accelerator.is_main_process:
        averaged = trainer.average is not None and trainer.average.count > 0
        state = {
            "run": trainer.training_state.run_id,
            "router": trainer.average.values if averaged else trainer.router.state_dict(),
            # The next router starts from a user's value model as this one left it; heads are made anew.
            "critic": None if _critic(trainer) is None else _critic(trainer).state_dict(),
            "helps": trainer.training_state.helps,
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
    if state["run"] != trainer.training_state.run_id:
        return False
    here, there = _settings(trainer), state["settings"]
    if here != there:
        raise CheckpointError(
            f"{path} was written by a run with {there}, but this one has {here}", path=path, value=here, allowed=there
        )
    trainer.router.load_state_dict(state["router"])
    trainer.training_state.helps = state["helps"]
    trainer.training_state.put_router()
    if state["critic"] is not None and _critic(trainer) is not None:
        _critic(trainer).load_state_dict(state["critic"])
    if state["normalizer"] is not None:
        trainer.normalizer = RewardNormalizer.from_state_dict(state["normalizer"])
    return True


def _critic(trainer: Any) -> Any:
    """A user's value model, where the trainer has one."""
    return getattr(trainer, "value_model", None)


def _settings(trainer: Any) -> dict[str, Any]:
    settings: dict[str, Any] = trainer.settings_to_resume()
    weights = None if trainer.weights is None else trainer.weights.state_dict()["settings"]
    return settings | {name: getattr(trainer.args, name, None) for name in _SCHEDULE} | {"weights": weights}
