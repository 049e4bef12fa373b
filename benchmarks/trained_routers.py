"""What benchmarks of fronts and figures train: HoE's routers, once for all or placed, and the LoRAMoE-like mixture."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file

import peft_hoe
from figures_setting import BATCH, Setting
from peft_hoe.adapter_sample import differing, sample_of
from peft_hoe.files import ADAPTER_WEIGHTS
from peft_hoe.placing import Budget, place
from peft_hoe.training import HoERouterConfig
from peft_hoe.training.every_router import train_routers
from router_training import NEW_TOKENS, SETTINGS, UPDATES

ROUTER = "hoe_router"  # in the names of an adapter's tensors
EXPERTS = "experts"  # the metadata of a file of routers that tells their experts


def ppo_settings(seed: int, updates: int) -> dict[str, Any]:
    """Arguments of HoERouterConfig: the settings of `router_training.py`, without logs and checkpoints."""
    return {
        "max_steps": updates, "seed": seed, "stop_token": "eos", "response_length": NEW_TOKENS,
        "local_rollout_forward_batch_size": 128, "save_strategy": "no", "num_sample_generations": 0, "report_to": [],
        "logging_steps": updates, "disable_tqdm": True, "use_cpu": True, **SETTINGS,
    }  # fmt: skip


def lora_moe_options(setting: Setting, seed: int = 0) -> dict[str, Any]:
    """What `BASELINES["lora_moe"]` needs besides policies."""
    return {
        "rewards": setting.rewards, "train_dataset": _training_prompts(setting),
        "normalizer": setting.scale(sampled=True), "training": ppo_settings(seed, UPDATES),
    }  # fmt: skip


def trained_routers(
    setting: Setting, untrained: Path, name: str, seed: int, updates: int = UPDATES, *, judged: bool = False,
    changes: Mapping[str, Any] | None = None,
) -> Path:  # fmt: skip
    """An adapter with its routers trained on the training prompts, by the settings of `router_training.py`.

    Args:
        setting: what it is trained with, and where it is kept; an interrupted run goes on where it was.
        untrained: the adapter's folder.
        name: of the result.
        seed: of training.
        updates: for each router.
        judged: whether a router that does not help on the validation prompts is left untrained.
        changes: other arguments of HoERouterConfig.

    Returns:
        the folder of the result, with its CPU time in `training.json`.
    """
    output = setting.folder / "trained" / f"{name}-seed{seed}"
    if (output / "training.json").exists():
        return output
    args = _arguments(setting, output, seed, updates, changes or {})
    lines: list[str] = []
    started = time.process_time()
    with contextlib.redirect_stdout(sys.stderr):  # the trainer prints its log
        train_routers(
            setting.steered(untrained), args, processing_class=setting.tokenizer, reward_model=setting.rewards,
            train_dataset=_training_prompts(setting), normalizer=setting.scale(sampled=True),
            resume_from_checkpoint=(output / "routers_run.json").exists(),
            eval_dataset=[{"prompt": prompt} for prompt in setting.validation] if judged else None,
            say=lambda line: lines.append(line),
        )  # fmt: skip
    record = {
        "cpu_seconds": round(time.process_time() - started), "updates": updates, "seed": seed, "verdicts": lines
    }  # fmt: skip
    (output / "training.json").write_text(json.dumps(record), encoding="utf-8")
    return output


def keep_routers(trained: Path, path: Path) -> None:
    """Write the routers of an adapter, which are small, into a file of their own, with some numbers of its experts."""
    tensors = load_file(trained / ADAPTER_WEIGHTS)
    routers = {name: tensor for name, tensor in tensors.items() if ROUTER in name}
    experts = {name: tensor for name, tensor in tensors.items() if ROUTER not in name}
    fresh = path.with_suffix(".new")
    save_file(routers, fresh, {EXPERTS: json.dumps(sample_of(list(experts), experts.__getitem__))})
    fresh.rename(path)


def restored(untrained: Path, path: Path, output: Path) -> None:
    """Make an adapter anew of its untrained self and the routers that `keep_routers` wrote, unless it is there.

    Raises:
        ValueError: the routers are those of other experts.
    """
    record = path.with_name(f"{path.stem}.json")
    if (output / "training.json").exists() or not path.exists() or not record.exists():
        return
    tensors, routers = load_file(untrained / ADAPTER_WEIGHTS), load_file(path)
    experts = {name: tensor for name, tensor in tensors.items() if ROUTER not in name}
    with safe_open(path, "pt") as file:
        sample = json.loads(file.metadata()[EXPERTS])
    if differing(sample, list(experts), experts.__getitem__):
        raise ValueError(
            f"{path} holds routers of other experts than those of {untrained}; remove it to train them anew"
        )
    shutil.copytree(untrained, output, dirs_exist_ok=True)
    save_file(tensors | routers, output / ADAPTER_WEIGHTS)
    shutil.copy(record, output / "training.json")


def placed_adapter(setting: Setting, name: str, seed: int, seconds: float) -> Path:
    """An adapter of one-hot experts to which `place` adds what a greedy sweep of the validation prompts is better with.

    Its routers train on a scale that is measured on training prompts, as `place` does where nothing is said.

    Args:
        setting: what it is trained with, and where it is kept.
        name: of the result.
        seed: of training.
        seconds: after which nothing more is begun.

    Returns:
        the folder of the result, with its CPU time and the story in `training.json`.
    """
    output = setting.folder / "trained" / f"{name}-seed{seed}"
    if (output / "training.json").exists():
        return output
    lines: list[str] = []
    started = time.process_time()
    corners = setting.adapter("hoe-corners", experts=[])
    model = setting.steered(corners)
    with contextlib.redirect_stdout(sys.stderr):
        front = peft_hoe.sweep(
            model, setting.tokenizer, setting.validation, setting.rewards, payoff=setting.scale(),
            decoding=setting.decoding(), batch_size=BATCH, progress=False,
        )  # fmt: skip
        place(
            model, front, budget=Budget(seconds=seconds), tokenizer=setting.tokenizer, rewards=setting.rewards,
            source=str(corners), base=setting.base, args=_arguments(setting, output, seed, UPDATES, {}),
            train_dataset=_training_prompts(setting), batch_size=BATCH, say=lines.append,
        )  # fmt: skip
    model.save_pretrained(output)
    record = {"cpu_seconds": round(time.process_time() - started), "updates": UPDATES, "seed": seed, "story": lines}
    (output / "training.json").write_text(json.dumps(record), encoding="utf-8")
    return output


def _arguments(setting: Setting, output: Path, seed: int, updates: int, changes: Mapping[str, Any]) -> HoERouterConfig:
    settings = ppo_settings(seed, updates) | {"stop_strings": list(setting.stop_strings) or None} | dict(changes)
    return HoERouterConfig(output_dir=str(output), **settings)


def _training_prompts(setting: Setting) -> list[dict[str, Any]]:
    return [{"prompt": prompt} for prompt in setting.prompts["train"]]
