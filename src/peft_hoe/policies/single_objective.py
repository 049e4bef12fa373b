"""Policies to compare with and to build from: one model, trained with TRL's GRPOTrainer on a weighted sum of rewards.

A one-hot preference makes a single-objective policy, what `build_adapter` takes. MORLHF (multi-objective RLHF) is one such run
for every preference: the strongest baseline and the dearest, as nothing is shared between preferences.

The objective is max E[Σ_i λ_i R̂_i] − β KL(π ‖ base), R̂ the rewards on the scale of a payoff table where there is one.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peft import PeftConfig
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from ..config import HoEConfig
from ..errors import HoEError
from ..generation.decoding import Decoding
from ..generation.prompt_rows import check_prompts
from ..objectives.normalizer import RewardNormalizer
from .scores import Scores

try:
    from datasets import Dataset
    from trl import GRPOConfig  # type: ignore[attr-defined]
except ImportError as error:
    raise ImportError("policies are trained by TRL's GRPOTrainer: pip install 'peft-hoe[train]'") from error

# The field's name since transformers 5.23, and before.
_FIELDS = {field.name for field in dataclasses.fields(GRPOConfig)}
_CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in _FIELDS else "gradient_checkpointing"


def policy_gradient_config(
    output_dir: str | os.PathLike[str], *, prompts: int, samples: int, **settings: Any
) -> GRPOConfig:
    """The plain policy gradient with a group baseline, as TRL names it.

    Every batch of samples is used for one update, so that nothing is clipped; the advantage of a sample is its reward minus
    the mean of its prompt's samples, not divided by a standard deviation (`scale_rewards="none"`); the loss is a sum over
    tokens with a constant divisor, so that it does not depend on lengths (`loss_type="dr_grpo"`). The learning rate is
    constant, arithmetic float32, dropout off, and nothing is saved on the way.

    Args:
        output_dir: where the policy goes.
        prompts: prompts of an update.
        samples: completions of each, at least 2.
        settings: more fields of GRPOConfig, which win over those above.

    >>> from peft_hoe.policies import policy_gradient_config
    >>> args = policy_gradient_config("policy", prompts=4, samples=8, max_steps=10, use_cpu=True)
    >>> args.num_generations, args.scale_rewards
    (8, 'none')
    """
    plain: dict[str, Any] = {
        "loss_type": "dr_grpo",
        "scale_rewards": "none",
        "num_iterations": 1,
        "lr_scheduler_type": "constant",
        "bf16": False,
        _CHECKPOINTING: False,
        "disable_dropout": True,
        "save_strategy": "no",
        "report_to": [],
    }
    if prompts < 1 or samples < 2:
        raise HoEError(
            f"an update has {prompts} prompts and {samples} samples of each; it needs at least 1 prompt, and 2 samples for "
            "a baseline",
            argument="prompts" if prompts < 1 else "samples",
            value=prompts if prompts < 1 else samples,
            allowed="at least 1" if prompts < 1 else "at least 2",
        )
    batch = {"per_device_train_batch_size": prompts * samples, "num_generations": samples}
    return GRPOConfig(output_dir=os.fspath(output_dir), **{**plain, **batch, **settings})


def train_policy(
    base: str | os.PathLike[str],
    args: GRPOConfig,
    *,
    rewards: Any,
    preference: Any,
    train_dataset: Any,
    objectives: Sequence[str] | None = None,
    normalizer: RewardNormalizer | None = None,
    peft_config: Any = None,
    processing_class: Any = None,
    stop_strings: Sequence[str] = (),
    callbacks: Sequence[Any] | None = None,
    say: Callable[[str], Any] | None = None,
) -> list[dict[str, Any]]:
    """Train one policy for one preference and save it in `args.output_dir`, with its tokenizer.

    The folder is an ordinary model folder, or a LoRA adapter, and appears when it is complete.

    Args:
        base: directory or Hub id of the model to start from, and to stay close to (`args.beta`).
        args: as from `policy_gradient_config`, or any GRPOConfig.
        rewards: a Rewards, or what makes one. Models among them are moved to the device that trains.
        preference: λ; weights the rewards.
        train_dataset: rows with `prompt` (text or chat messages); other columns go to the rewards.
        objectives: the N names; default the names that a mapping of rewards has.
        normalizer: the scale of the rewards; None for the rewards as they are.
        peft_config: a LoraConfig to train an adapter; None to train every weight.
        processing_class: the tokenizer; default the base's.
        stop_strings: texts that end a completion. It is trained on up to and including the token that completes one, and
            rewards read what comes before, as in `Decoding`. TRL's `completions/clipped_ratio` counts it as clipped.
        callbacks: of transformers' Trainer.
        say: gets a line for each log entry, such as `print`, in place of the Trainer's own progress bar and numbers.

    Returns:
        what was logged; `rewards/<objective>/mean` is on the scale of the normalizer. A completion that has no reward (None
        or NaN) in an objective of positive weight is left out, if another one of its prompt has one; prompts of several tasks
        train together.

    Raises:
        HoEError: `base` or `peft_config` is of another kind, the folder is not empty, there are no prompts, the model has no
            embedding for the padding token, `args` has reward weights of its own, or something that does not go with stop
            strings.
        PreferenceError: the preference does not fit the objectives.
        RewardError: nor do the rewards or the normalizer, or a reward fails.

    >>> from peft import LoraConfig
    >>> from peft_hoe import demo, train_policy
    >>> from peft_hoe.policies import policy_gradient_config
    >>> args = policy_gradient_config(
    ...     "policy", prompts=2, samples=2, max_steps=1, logging_steps=1, max_completion_length=8, use_cpu=True
    ... )
    >>> log = train_policy(
    ...     demo.BASE, args, rewards=demo.REWARDS, preference={"cheerful": 1, "vivid": 0},
    ...     train_dataset=[{"prompt": text} for text in demo.load_prompts()],
    ...     peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    ...     say=lambda line: None,
    ... )
    >>> log[0]["reward"] == log[0]["rewards/cheerful/mean"]
    True
    """
    from ..training.grpo.stopping_trainer import StoppingTrainer  # late: settings alone need no trainer

    _check_model(base, peft_config)
    scores = Scores(rewards, preference, objectives, normalizer)
    _check_arguments(args)
    stops = Decoding(stop_strings=stop_strings).stop_strings  # type: ignore[arg-type]
    _check_stops(args, stops)
    target = _empty_folder(args.output_dir)
    dataset = _rows(train_dataset, processing_class)
    scores.columns = [name for name in dataset.column_names if name != "prompt"]
    args.reward_weights = scores.preference.tolist()
    try:
        trainer = StoppingTrainer(
            stop_strings=stops,
            model=os.fspath(base),
            reward_funcs=scores.functions(),
            args=args,
            train_dataset=dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            callbacks=list(callbacks or []),
        )
    finally:
        args.reward_weights = None
    scores.rewards.to(trainer.accelerator.device)
    if say is not None:
        for own in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(own)
        trainer.add_callback(_Lines(say))
    trainer.train()
    _save(trainer, target)
    return trainer.state.log_history


class _Lines(TrainerCallback):
    """A line for each log entry of an update."""

    def __init__(self, say: Callable[[str], Any]) -> None:
        self.say = say

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        """Say the mean rewards and the divergence of an update; on the first process, and not of what is no update."""
        if not state.is_world_process_zero or "reward" not in logs:
            return
        means = [(re.fullmatch("rewards/(.+)/mean", key), value) for key, value in logs.items()]
        parts = [f"{match[1]} {value:.3f}" for match, value in means if match]
        divergence = f", KL {logs['kl']:.3f} nats a token" if "kl" in logs else ""  # there is none with beta=0
        self.say(f"update {state.global_step} of {state.max_steps}: {', '.join(parts)}{divergence}")


def _check_model(base: Any, peft_config: Any) -> None:
    if not isinstance(base, (str, os.PathLike)):
        raise HoEError(
            f"base is a {type(base).__name__}; name its directory or Hub id, after base.save_pretrained(...) if it is new",
            argument="base",
            value=type(base).__name__,
        )
    if isinstance(peft_config, HoEConfig) or not isinstance(peft_config, (PeftConfig, type(None))):
        raise HoEError(
            f"peft_config is a {type(peft_config).__name__}; give a LoraConfig, or None to train every weight. Experts are "
            "built from the policies afterwards, with peft_hoe.build_adapter",
            argument="peft_config",
            value=peft_config,
        )


def _check_arguments(args: Any) -> None:
    if not isinstance(args, GRPOConfig):
        raise HoEError(
            f"args is a {type(args).__name__}; use policy_gradient_config(...) or a GRPOConfig",
            argument="args",
            value=type(args).__name__,
        )
    if args.reward_weights is not None:
        raise HoEError(
            f"args.reward_weights is {args.reward_weights}; leave it out, the preference weights the rewards",
            argument="reward_weights",
            value=args.reward_weights,
        )


def _check_stops(args: Any, stops: Sequence[str]) -> None:
    if "stop_strings" in (args.generation_kwargs or {}):
        raise HoEError(
            "generation_kwargs has stop_strings, which transformers cannot look for without a tokenizer; say "
            "train_policy(..., stop_strings=)",
            argument="generation_kwargs",
            value=args.generation_kwargs,
        )
    reasons = {
        "use_vllm": "it would go on to the full length",
        "mask_truncated_completions": "TRL tells a completion that has ended by its last token, so that those that a stop "
        "string ended would be left out",
    }
    for name, reason in reasons.items():
        if stops and getattr(args, name):
            raise HoEError(
                f"{name}=True with stop_strings is not supported: {reason}. Leave one of them out",
                argument=name,
                value=True,
            )


def _rows(given: Any, processing_class: Any) -> Dataset:
    dataset = given if isinstance(given, Dataset) else Dataset.from_list(list(given))
    check_prompts(dataset, processing_class)
    if "prompt" not in dataset.column_names:
        raise HoEError(
            f"the dataset's columns are {dataset.column_names}; GRPOTrainer needs `prompt`, text or chat messages",
            argument="train_dataset",
            value=dataset.column_names,
        )
    return dataset


def _empty_folder(output_dir: Any) -> Path:
    folder = Path(output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise HoEError(
            f"{folder} exists and is not an empty folder; name another output_dir, or remove it yourself",
            argument="output_dir",
            value=str(folder),
        )
    return folder


def _save(trainer: Any, target: Path) -> None:
    """All or nothing: written beside the folder first."""
    part = target.with_name(f".{target.name}.part")
    if trainer.args.should_save:
        shutil.rmtree(part, ignore_errors=True)  # what an interrupted save left
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(part))
    trainer.accelerator.wait_for_everyone()
    if trainer.args.should_save:
        if target.exists() and any(target.iterdir()):  # checkpoints, where the user asked for them
            shutil.copytree(part, target, dirs_exist_ok=True)
            shutil.rmtree(part)
        else:
            if target.exists():
                target.rmdir()
            os.replace(part, target)
