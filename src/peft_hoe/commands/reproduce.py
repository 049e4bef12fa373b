"""`peft-hoe reproduce`: build, train routers, sweep, baselines and report in one resumable command."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import HoEError
from ..inputs import read_preferences
from ..preference import read_preference
from ..router_recipe import RATES, RESPONSES
from .arguments import (
    add_decoding,
    add_reports,
    add_updates,
    read_decoding,
    read_number,
    read_pairs,
    read_reports,
    read_updates,
)

_SPLITS = ("train", "validation", "test")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments; each is an argument of `Plan.of`."""
    add = parser.add_argument
    add("task", metavar="RECIPE", help="a name of `peft-hoe recipes`, or own: a task of your own")
    add(
        "--base",
        metavar="ID",
        help="the model that the policies were trained from; default the recipe's, if it has one",
    )
    add("--policy", action="append", metavar="OBJECTIVE=ID", help="as in build; default the recipe's published ones")
    add("--reward", action="append", metavar="NAME=SOURCE", help="as in train, instead of the recipe's")
    add(
        "--prompts",
        action="append",
        metavar="FILE",
        help="JSON {train: [...], validation: [...], test: [...]}, or SPLIT=FILE once for each, instead of the recipe's",
    )
    add("--data", metavar="PATH", help="a local copy of the recipe's dataset, in its published schema")
    add("--output", required=True, metavar="DIR", help="where everything goes; an interrupted run goes on from there")
    add("--expert", action="append", metavar="PREFERENCE", help="a merged expert, or none; default the centroid")
    add(
        "--router", action="append", metavar="PREFERENCE",
        help="a router, or none; default one between the centroid and each objective",
    )  # fmt: skip
    add(
        "--auto", action="store_true",
        help="place experts and routers where the front of the validation prompts is weak, beside those that are given, until "
        "the budget is used; default as many parameters as the adapter is built with",
    )  # fmt: skip
    add("--budget-parameters", type=int, metavar="N", help="of --auto")
    add("--budget-minutes", type=float, metavar="M", help="of --auto")
    add("--trainer", default="ppo", help="of routers: ppo, grpo or distill (default ppo)")
    add_updates(parser, "; 0 trains none")
    add("--batch-size", type=int, default=RESPONSES, help=f"responses in an update (default {RESPONSES})")
    add("--micro-batch-size", type=int, help="responses in a forward of training; default the batch")
    add("--learning-rate", type=float, help=f"of routers; default {RATES}")
    add("--save-steps", type=int, default=10, help="a checkpoint of training every so many updates (default 10)")
    add("--preferences", default="grid", metavar="FILE", help="as in sweep: grid (default), or a file")
    add("--baselines", default="", metavar="NAMES", help="with commas, such as rs_dense,ties; more may be added later")
    add_decoding(parser, "default the recipe's, else 64")
    add("--texts", type=int, default=1, help="sampled texts for each prompt and preference of all sweeps (default 1)")
    add("--limit", type=int, help="test prompts at most; default all")
    add("--rank", default="auto", help="of experts, as in build (default auto)")
    add("--seed", type=int, default=0, help="of prompts, build and training (default 0)")
    add(
        "--seeds", metavar="NUMBERS",
        help="of training, several with commas, such as 0,1,2: each trains and is swept, and intervals hold what differs; "
        "more may be added later",
    )  # fmt: skip
    add("--sweep-batch-size", type=int, default=128, help="completions at once (default 128)")
    add_reports(parser)
    add("--cpu", action="store_true", help="use no accelerator")
    add("--dry-run", action="store_true", help="print settings and stages, and do nothing")
    add("--restart", action="store_true", help="delete the experiment in --output first")
    add("--quiet", action="store_true", help="print the result only")


def run(arguments: argparse.Namespace) -> int:
    """Run what is left to do.

    Raises:
        HoEError: an argument, a file or a stage is not what it should be, or a package is missing.
    """
    try:
        from ..reproduce import describe, reproduce
    except ImportError as error:
        raise HoEError(str(error)) from None
    plan = _plan(arguments)
    if arguments.dry_run:
        print(describe(plan))
        return 0
    say = None if arguments.quiet else print
    try:
        found = reproduce(plan, restart=arguments.restart, progress=not arguments.quiet, say=say)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here")
        return 130
    if not arguments.quiet:
        print("\n" + found.summary)
    print(f"saved in {plan.output_dir}: {found.report.name}, summary.txt, metrics.json, front.png, adapter, sweeps")
    return 0


def _plan(arguments: argparse.Namespace) -> Any:
    from ..reproduce import Plan

    return Plan.of(
        arguments.task,
        base=arguments.base,
        policies=read_pairs(arguments.policy, "--policy", "OBJECTIVE=ID"),
        rewards=read_pairs(arguments.reward, "--reward", "NAME=SOURCE"),
        prompts=_prompts(arguments.prompts),
        data=arguments.data,
        output_dir=arguments.output,
        experts=_preferences(arguments.expert),
        routers=_preferences(arguments.router),
        auto=_budget(arguments),
        trainer=arguments.trainer,
        updates=read_updates(arguments),
        max_updates=arguments.max_updates,
        batch_size=arguments.batch_size,
        micro_batch_size=arguments.micro_batch_size,
        learning_rate=arguments.learning_rate,
        save_steps=arguments.save_steps,
        preferences=read_preferences(arguments.preferences),
        baselines=[name.strip() for name in arguments.baselines.split(",") if name.strip()],
        decoding=read_decoding(arguments),
        texts=arguments.texts,
        limit=arguments.limit,
        rank=read_number(arguments.rank, int),
        seed=arguments.seed,
        seeds=_seeds(arguments.seeds),
        sweep_batch_size=arguments.sweep_batch_size,
        report_to=read_reports(arguments),
        cpu=arguments.cpu,
    )


def _seeds(text: str | None) -> list[int]:
    """Of --seeds.

    Raises:
        HoEError: not whole numbers with commas.
    """
    try:
        return [] if text is None else [int(number) for number in text.split(",")]
    except ValueError:
        raise HoEError(
            f"--seeds is {text!r}; give whole numbers with commas, such as 0,1,2", argument="--seeds", value=text
        ) from None


def _budget(arguments: argparse.Namespace) -> Any:
    """Of --auto; None without it.

    Raises:
        HoEError: a budget without it, or one that is not above 0.
    """
    from ..placing import Budget

    parameters, minutes = arguments.budget_parameters, arguments.budget_minutes
    if parameters is None and minutes is None:
        return arguments.auto or None
    if not arguments.auto:
        unused, value = ("--budget-minutes", minutes) if parameters is None else ("--budget-parameters", parameters)
        raise HoEError(
            "--budget-parameters and --budget-minutes are of --auto; give that too, or leave them out",
            argument=unused, value=value,
        )  # fmt: skip
    return Budget(parameters=parameters, seconds=None if minutes is None else 60 * minutes)


def _prompts(items: list[str] | None) -> str | dict[str, str] | None:
    """One file, or a file for each split."""
    if not items or (len(items) == 1 and items[0].partition("=")[0] not in _SPLITS):
        return items[0] if items else None
    return read_pairs(items, "--prompts", "FILE, or SPLIT=FILE")


def _preferences(items: list[str] | None) -> list[Any] | None:
    if items == ["none"]:
        return []
    return None if items is None else [read_preference(item) for item in items]
