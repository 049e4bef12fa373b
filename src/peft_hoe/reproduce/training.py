"""The router training of an experiment: the arguments of each trainer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import HoEError
from ..generation.decoding import Decoding
from ..router_recipe import SAMPLES
from ..training.every_router import RUN_FILE, TRAINERS, finished_routers, train_routers
from ..training.trl_versions import missing
from ..tuner.functional import adapter_of
from .inputs import Prompts
from .plan import Plan
from .seeds import of_seed


def check_trainer(plan: Plan) -> None:
    """See that the trainer is installed, and can write texts as the plan's decoding says.

    Raises:
        HoEError: what to install, or to leave out.
    """
    if not plan.learns:
        return
    reason = missing(TRAINERS[plan.trainer][0])
    if reason:
        raise HoEError(reason, argument="trainer", value=plan.trainer)
    decoding = plan.decoding
    if plan.trainer == "grpo":
        _group(plan.batch_size)
    if decoding.stop_tokens is not None or decoding.options:
        raise HoEError(
            f"the decoding is {decoding.record}; routers train with the stop tokens of tokenizer and model and without further "
            "options: leave both out, or train no routers (updates=0)",
            argument="decoding", value=decoding.record,
        )  # fmt: skip


def train(
    plan: Plan, seed: int | None, model: Any, tokenizer: Any, prompts: Prompts, rewards: Any, *, progress: bool
) -> None:
    """Train all routers and save the adapter in `trained`; goes on where an earlier call ended.

    Args:
        plan: the settings.
        seed: of training, one of several; None for the plan's own.
        model: with the adapter as it was built.
        tokenizer: the policies'.
        prompts: of the experiment.
        rewards: likewise.
        progress: whether bars and metrics are shown.

    Raises:
        KeyboardInterrupt: SIGINT stopped it, after a checkpoint.
    """
    output = plan.folder / of_seed("trained", seed)
    settings: dict[str, Any] = {"eval_dataset": prompts.validation or None}
    if plan.trainer == "ppo":
        settings["reward_model"] = rewards
    elif plan.trainer == "grpo":
        settings["reward_funcs"] = rewards
    else:
        settings = {}
    train_routers(
        model,
        arguments(plan, progress, output, seed=seed),
        trainer=plan.trainer,
        train_dataset=prompts.train,
        processing_class=tokenizer,
        resume_from_checkpoint=(output / RUN_FILE).is_file(),
        progress=progress,
        say=print if progress else None,
        **settings,
    )
    left = [name for name in adapter_of(model).router_names if name not in finished_routers(output)]
    if left:
        raise KeyboardInterrupt(f"the training of the routers {left} was interrupted")


def arguments(plan: Plan, progress: bool, output: Path, *, resumes: bool = True, seed: int | None = None) -> Any:
    """The trainer's configuration.

    Args:
        plan: the settings.
        progress: whether bars and metrics are shown.
        output: where it writes.
        resumes: whether checkpoints are written.
        seed: of training, one of several; None for the plan's own.
    """
    if seed is not None:
        plan = replace(plan, seed=seed)
    saving = _saving(plan) if resumes else {"save_strategy": "no"}
    own: dict[str, Any] = {"output_dir": str(output), "learning_rate": plan.learning_rate, **saving}
    if seed is not None:
        own["run_name"] = f"seed{seed}"  # what reports call it, before the router's name
    if plan.trainer == "ppo":
        from ..training.ppo.config import HoERouterConfig

        return HoERouterConfig(**ppo_settings(plan, progress), **own)
    shared = _shared_settings(plan, progress) | own
    if plan.trainer == "grpo":
        from ..training.grpo.config import HoEGRPOConfig

        return HoEGRPOConfig(
            max_completion_length=plan.decoding.max_new_tokens,
            **_texts(plan.decoding),
            num_generations=_group(plan.batch_size),
            auto_stop=plan.updates == "auto",
            **shared,
        )
    from ..training.distillation.config import HoEDistillationConfig

    return HoEDistillationConfig(
        max_new_tokens=plan.decoding.max_new_tokens,
        **_texts(plan.decoding),
        **shared,
    )


def _texts(decoding: Decoding) -> dict[str, Any]:
    """What all trainers that write texts call the same; they always sample."""
    return {
        "temperature": decoding.temperature,
        "top_k": decoding.top_k,
        "top_p": decoding.top_p,
        "stop_strings": list(decoding.stop_strings) or None,
        "chat_template_kwargs": dict(decoding.chat_template_kwargs) or None,
    }


def ppo_settings(plan: Plan, progress: bool) -> dict[str, Any]:
    """Fields of HoERouterConfig, but for the folder, the learning rate and checkpoints."""
    return _shared_settings(plan, progress) | {
        "response_length": plan.decoding.max_new_tokens,
        **_texts(plan.decoding),
        "local_rollout_forward_batch_size": min(64, plan.micro_batch_size or plan.batch_size),
        "stop_token": "eos",
        "auto_stop": plan.updates == "auto",
        "num_sample_generations": 0,
    }


def _shared_settings(plan: Plan, progress: bool) -> dict[str, Any]:
    micro = plan.micro_batch_size or plan.batch_size
    return {
        "max_steps": plan.most_updates,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": plan.batch_size // micro,
        "seed": plan.seed,
        "use_cpu": plan.cpu,
        "disable_tqdm": not progress,
        "logging_strategy": "steps" if progress or plan.report_to else "no",
        "report_to": list(plan.report_to),
    }


def _saving(plan: Plan) -> dict[str, Any]:
    return {"save_strategy": "steps", "save_steps": plan.save_steps, "save_total_limit": 1}


def _group(batch: int) -> int:
    """The completions of a prompt: the most that divide the batch.

    Raises:
        HoEError: the batch cannot be divided.
    """
    sizes = [size for size in range(2, SAMPLES + 1) if batch % size == 0]
    if not sizes:
        raise HoEError(
            f"the batch of {batch} cannot be divided into groups of 2 to {SAMPLES}; with GRPO give one that can",
            argument="batch_size", value=batch, allowed=f"a multiple of one of 2 to {SAMPLES}",
        )  # fmt: skip
    return sizes[-1]
