"""One recipe: trainers, commands, experiments, benchmarks and pages say the same of where routers stand and how they train."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peft_hoe import HoEDistillationConfig, HoERouterConfig, router_recipe
from peft_hoe.commands import reproduce, train
from peft_hoe.commands.reproduce import _plan
from peft_hoe.commands.train_settings import configuration
from peft_hoe.reproduce.training import arguments
from peft_hoe.router_recipe import MODULE_RATE, RATES, TOKEN_RATE, default_experts, default_routers
from peft_hoe.training.every_router import TRAINERS

ROOT = Path(__file__).parents[1]
# What no result is better or worse by: where it is written, how it is shown, and how a batch is computed.
EXECUTION = {
    "output_dir", "logging_steps", "logging_strategy", "disable_tqdm", "save_strategy", "save_steps", "save_total_limit",
    "num_sample_generations", "per_device_train_batch_size", "gradient_accumulation_steps", "local_rollout_forward_batch_size",
    "steps_per_generation", "seed",
}  # fmt: skip
# What is the task's: how long its texts are. The configuration of PPO alone lets texts run on unless it is told where they end.
TASK = {"response_length", "max_completion_length", "max_new_tokens", "stop_token"}


def default(trainer: str) -> Any:
    """The trainer's configuration, where nothing is said."""
    kind = getattr(importlib.import_module("peft_hoe.training"), TRAINERS[trainer][1])
    return kind(output_dir="out", use_cpu=True)


def of_train(trainer: str) -> Any:
    """What `peft-hoe train` makes of it."""
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    return configuration(parser.parse_args(["A", "--prompts", "P", "--output", "out", "--trainer", trainer, "--cpu"]))


def plan_of(trainer: str) -> Any:
    """What `peft-hoe reproduce` plans."""
    parser = argparse.ArgumentParser()
    reproduce.add_arguments(parser)
    head = ["own", "--base", "B", "--policy", "a=A", "--policy", "b=B", "--reward", "a=x:y", "--reward", "b=x:y"]
    return _plan(parser.parse_args([*head, "--prompts", "P", "--output", "out", "--trainer", trainer, "--cpu"]))


def of_reproduce(trainer: str) -> Any:
    return arguments(plan_of(trainer), progress=False, output=Path("out"))


def benchmark(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module(name)


def recipe(found: Any) -> dict[str, Any]:
    """All fields that results depend on, with the answers of an update."""
    names = {field.name for field in dataclasses.fields(found) if field.init} - EXECUTION - TASK
    rows = found.per_device_train_batch_size * found.gradient_accumulation_steps
    return {"rows": rows, **{name: getattr(found, name) for name in sorted(names)}}


@pytest.mark.parametrize("trainer", ["ppo", "grpo", "distill"])
@pytest.mark.parametrize("made", [of_train, of_reproduce])
def test_commands_train_as_the_configurations_do(trainer: str, made: Callable[[str], Any]) -> None:
    if trainer == "grpo":
        pytest.importorskip("trl")
    assert recipe(made(trainer)) == recipe(default(trainer))


def test_benchmarks_train_as_the_configuration_does(monkeypatch: pytest.MonkeyPatch) -> None:
    module = benchmark("trained_routers", monkeypatch)
    made = HoERouterConfig(output_dir="out", **module.ppo_settings(0, module.UPDATES))
    assert recipe(made) == recipe(HoERouterConfig(output_dir="out", use_cpu=True))


def test_trainers_agree_on_what_they_share() -> None:
    """What every trainer has: the length of training, its batch and its rate; and what trainers with rewards have."""
    pytest.importorskip("trl")
    ppo, grpo, distill = (recipe(default(trainer)) for trainer in ("ppo", "grpo", "distill"))
    every = {
        "rows",
        "max_steps",
        "learning_rate",
        "lr_scheduler_type",
        "warmup_steps",
        "weight_decay",
        "temperature",
        "top_k",
    }
    rewarded = {"mu", "step", "weighting", "reference_point", "payoff_prompts", "verdict_texts", "auto_stop"}
    for name in every:
        assert ppo[name] == grpo[name] == distill[name], name
    for name in rewarded | {"advantage_scaling"}:
        assert ppo[name] == grpo[name], name
    assert ppo["beta"] == grpo["objective_beta"]  # of the objectives' weights
    assert ppo["kl_coef"] == grpo["beta"]  # of the divergence
    assert ppo["num_ppo_epochs"] == grpo["num_iterations"]
    assert grpo["num_generations"] == router_recipe.SAMPLES
    assert isinstance(default("distill"), HoEDistillationConfig)


def test_experiments_and_benchmarks_place_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of("ppo")
    assert [list(row) for row in plan.experts] == default_experts(2)
    assert [list(row) for row in plan.routers] == default_routers(2)
    for name in ("fronts_adapters", "default_fronts"):
        module = benchmark(name, monkeypatch)
        assert (module.default_experts, module.default_routers) == (default_experts, default_routers)


def test_the_readme_places_alike() -> None:
    """And trains with nothing set but where texts end, as the commands do."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    placed = {
        key: json.loads(rows) for key, rows in re.findall(r"^    (experts|routers)=(\[\[.*?\]\]),", text, re.MULTILINE)
    }
    assert placed == {"experts": default_experts(2), "routers": default_routers(2)}
    assert 'HoERouterConfig(output_dir="run", router="r0", stop_token="eos")' in text


def test_the_page_of_training_says_these_numbers() -> None:
    page = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (`[^|]*`) \| (.*?) \|$", page, re.MULTILINE))
    args = default("ppo")
    assert f"updates: {args.max_steps}, unless" in rows["`max_steps`"]
    micro, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
    batch = rows["`per_device_train_batch_size`, `gradient_accumulation_steps`"]
    assert f"{micro} × {steps} = {micro * steps} answers" in batch
    assert f"{TOKEN_RATE:g} / hidden size, and {MODULE_RATE:g} for a router by module" in rows["`learning_rate`"]
    others = [args.num_ppo_epochs, args.kl_coef, args.lam, args.temperature]
    assert rows["`num_ppo_epochs`, `kl_coef`, `lam`, `temperature`"].startswith(
        ", ".join(f"{x:g}" for x in others) + ":"
    )
    assert rows["`num_generations`, `baseline`"].startswith(f'{args.num_generations} and `"{args.baseline}"`')
    reproduced = (ROOT / "docs/reproduce.md").read_text(encoding="utf-8")
    shown = f"| {args.max_steps}, {micro * steps}, {RATES.split(',')[0]} ([the recipe](training.md#the-recipe))"
    assert shown in reproduced
