"""What benchmarks of fronts and figures train: HoE's routers, once for all, and the LoRAMoE-like mixture."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_hoe.training import HoERouterConfig
from peft_hoe.training.normalization import RewardNormalizer
from peft_hoe.training.train_routers import train_routers
from router_training import NEW_TOKENS, SETTINGS, UPDATES


def ppo_settings(seed: int, updates: int) -> dict[str, Any]:
    """Arguments of HoERouterConfig: the settings of `router_training.py`, without logs and checkpoints."""
    return {
        "max_steps": updates, "seed": seed, "stop_token": "eos", "response_length": NEW_TOKENS,
        "local_rollout_forward_batch_size": 128, "save_strategy": "no", "num_sample_generations": 0, "report_to": [],
        "logging_steps": updates, "disable_tqdm": True, "use_cpu": True, **SETTINGS,
    }  # fmt: skip


def lora_moe_options(setting: Any, seed: int = 0) -> dict[str, Any]:
    """What `BASELINES["lora_moe"]` needs besides policies, from a Setting or a Problem."""
    return {
        "rewards": setting.rewards, "train_dataset": [{"prompt": prompt} for prompt in setting.prompts["train"]],
        "normalizer": setting.scale(sampled=True), "training": ppo_settings(seed, UPDATES),
    }  # fmt: skip


def trained_routers(
    output: Path,
    untrained: Callable[[], Any],
    *,
    tokenizer: Any,
    rewards: Mapping[str, Any],
    prompts: Sequence[str],
    normalizer: RewardNormalizer,
    seed: int,
    updates: int,
) -> Path:
    """An adapter with its routers trained by the settings of `router_training.py`.

    Args:
        output: the adapter's folder, with its CPU time in `training.json`; an interrupted run goes on where it was.
        untrained: makes the model; called where the folder is not complete.
        tokenizer: the model's.
        rewards: `{objective: reward}`.
        prompts: of training.
        normalizer: scale of sampled rewards.
        seed: of training.
        updates: for each router.
    """
    if (output / "training.json").exists():
        return output
    args = HoERouterConfig(output_dir=str(output), **ppo_settings(seed, updates))
    started = time.process_time()
    with contextlib.redirect_stdout(sys.stderr):  # the trainer prints its log
        train_routers(
            untrained(), args, processing_class=tokenizer, reward_model=rewards,
            train_dataset=[{"prompt": prompt} for prompt in prompts], normalizer=normalizer,
            resume_from_checkpoint=(output / "routers_run.json").exists(),
        )  # fmt: skip
    record = {"cpu_seconds": round(time.process_time() - started), "updates": updates, "seed": seed}
    (output / "training.json").write_text(json.dumps(record), encoding="utf-8")
    return output
