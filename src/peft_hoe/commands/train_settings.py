"""The options of `peft-hoe train` as a trainer's configuration."""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import Any

from ..errors import HoEError
from ..generation.decoding import Decoding
from ..router_recipe import SAMPLES
from .arguments import read_decoding, read_reports, read_updates

# What a trainer cannot do without, and what it has no use for.
_NEEDS = {"ppo": ("prompts", "reward"), "grpo": ("prompts", "reward"), "distill": ("prompts",), "dpo": ("pairs",)}
_TEXTS = ("max_new_tokens", "temperature", "top_k", "top_p", "stop", "chat_template_kwargs")  # how they are written
_REWARDS_ONLY = ("reward", "reward_timeout", "eval_prompts", "payoff_prompts", "mu", "beta")
_UNUSED = {
    "ppo": ("pairs",),
    "grpo": ("pairs",),
    "distill": ("pairs", "group_size", "kl_coef", *_REWARDS_ONLY),
    "dpo": ("prompts", "group_size", *_TEXTS, *_REWARDS_ONLY),
}


def check_options(arguments: argparse.Namespace) -> None:
    """See that the options are those of the trainer, and numbers in range.

    Raises:
        HoEError: one is missing, of no use, or out of range.
    """
    trainer = arguments.trainer
    for name in _NEEDS[trainer]:
        if not getattr(arguments, name):
            raise HoEError(f"--trainer {trainer} needs {_option(name)}", argument=_option(name))
    for name in _UNUSED[trainer]:
        if getattr(arguments, name) is not None:
            raise HoEError(
                f"--trainer {trainer} has no use for {_option(name)}; leave it out",
                argument=_option(name), value=getattr(arguments, name),
            )  # fmt: skip
    updates = read_updates(arguments)
    if updates == "auto" and "reward" not in _NEEDS[trainer]:
        raise HoEError(
            f"--updates is auto, which follows the worst gap in rewards, but --trainer {trainer} has none; give a number",
            argument="--updates", value=updates,
        )  # fmt: skip
    counts: dict[str, int | None] = {"updates": updates if isinstance(updates, int) else None, **_counts(arguments)}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise HoEError(
                f"{_option(name)} is {value}; it must be at least 1",
                argument=_option(name), value=value, allowed="at least 1",
            )  # fmt: skip
    micro = arguments.micro_batch_size or arguments.batch_size
    if arguments.batch_size % micro:
        raise HoEError(
            f"batch size {arguments.batch_size} is no multiple of the micro-batch size {micro}",
            argument="--micro-batch-size", value=micro, allowed=f"a divisor of {arguments.batch_size}",
        )  # fmt: skip
    group = SAMPLES if trainer == "grpo" and arguments.group_size is None else arguments.group_size
    if group is not None and (group < 2 or arguments.batch_size % group):
        raise HoEError(
            f"--group-size is {group}, but the {arguments.batch_size} responses of an update (--batch-size) are divided into "
            "groups of as many, at least 2; choose a divisor",
            argument="--group-size",
            value=group,
            allowed=f"a divisor of {arguments.batch_size}, at least 2",
        )


def _counts(arguments: argparse.Namespace) -> dict[str, int | None]:
    names = ("max_updates", "batch_size", "micro_batch_size", "group_size", "payoff_prompts", "save_steps")
    return {name: getattr(arguments, name) for name in names}


def configuration(arguments: argparse.Namespace) -> Any:
    """The trainer's configuration.

    Raises:
        HoEError: metrics cannot be reported where they should go, or a setting is out of range.
    """
    from ..training.every_router import TRAINERS

    micro, reports = arguments.micro_batch_size or arguments.batch_size, read_reports(arguments)
    settings = {
        "output_dir": arguments.output,
        "learning_rate": arguments.learning_rate,
        **_length(arguments),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": arguments.batch_size // micro,
        "seed": arguments.seed,
        "save_strategy": "no" if arguments.save_steps is None else "steps",
        "save_steps": arguments.save_steps,
        "bf16": arguments.bf16,
        "use_cpu": arguments.cpu,
        "disable_tqdm": arguments.quiet,
        "logging_strategy": "no" if arguments.quiet and not reports else "steps",
        "report_to": reports,
        **_OWN[arguments.trainer](arguments),
    }
    kind = getattr(import_module("peft_hoe.training"), TRAINERS[arguments.trainer][1])
    return kind(**{name: value for name, value in settings.items() if value is not None})


def _length(arguments: argparse.Namespace) -> dict[str, Any]:
    updates = read_updates(arguments)
    return {"auto_stop": True, "max_steps": arguments.max_updates} if updates == "auto" else {"max_steps": updates}


def _texts(arguments: argparse.Namespace, length: str) -> dict[str, Any]:
    """How texts are written, as fields of a configuration; `length` is what it calls that of a text.

    Raises:
        HoEError: an option is out of range.
    """
    decoding = Decoding.of({"max_new_tokens": 64, **read_decoding(arguments), "do_sample": True})
    return {
        length: decoding.max_new_tokens,
        "temperature": decoding.temperature,
        "top_k": decoding.top_k,
        "top_p": decoding.top_p,
        "stop_strings": list(decoding.stop_strings) or None,
        "chat_template_kwargs": dict(decoding.chat_template_kwargs) or None,
    }


def _ppo(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        **_texts(arguments, "response_length"),
        "local_rollout_forward_batch_size": min(64, arguments.micro_batch_size or 64),
        "stop_token": "eos",
        "mu": arguments.mu,
        "beta": arguments.beta,
        "kl_coef": arguments.kl_coef,
        "payoff_prompts": arguments.payoff_prompts,
        "reward_timeout": arguments.reward_timeout,
        "num_sample_generations": 0,
        **({} if arguments.group_size is None else {"num_generations": arguments.group_size, "baseline": "group"}),
    }


def _grpo(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        **_texts(arguments, "max_completion_length"),
        "num_generations": arguments.group_size,
        "mu": arguments.mu,
        "objective_beta": arguments.beta,
        "beta": arguments.kl_coef,
        "payoff_prompts": arguments.payoff_prompts,
        "reward_timeout": arguments.reward_timeout,
    }


def _distill(arguments: argparse.Namespace) -> dict[str, Any]:
    return _texts(arguments, "max_new_tokens")


def _dpo(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"beta": arguments.kl_coef}


_OWN = {"ppo": _ppo, "grpo": _grpo, "distill": _distill, "dpo": _dpo}


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
