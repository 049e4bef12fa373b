"""`peft-hoe train`: routers of an adapter learn their preferences."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..errors import HoEError
from ..inputs import load_adapter, read_rows
from ..router_recipe import RATES, RESPONSES, SAMPLES
from .arguments import add_reports, add_sampling, add_updates, read_pairs
from .train_settings import check_options, configuration

_TRAINERS = (
    "ppo (rewards, with a critic), grpo (rewards, in groups), distill (prompts or text alone) or dpo (pairs of answers)"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments; most are fields of the trainers' configurations."""
    add = parser.add_argument
    add("adapter", metavar="ADAPTER", help="directory or Hub id of a HoE adapter with routers")
    add("--base", help="directory or Hub id of its base model; default what the adapter names")
    add("--trainer", default="ppo", choices=["ppo", "grpo", "distill", "dpo"], help=f"{_TRAINERS}; default ppo")
    add("--router", action="append", metavar="NAME", help="a router to train; once for each, default all")
    add(
        "--prompts",
        metavar="FILE",
        help="text (a prompt a line), JSON (a list) or JSON lines with `prompt`; distill reads `text` too",
    )
    add(
        "--eval-prompts",
        metavar="FILE",
        help="prompts of the payoff table and the verdict; default the training prompts, no verdict",
    )
    add(
        "--payoff-prompts", type=int, metavar="N",
        help="how many of these are drawn to scale rewards and to judge routers; default 128",
    )  # fmt: skip
    add(
        "--pairs", action="append", metavar="NAME=FILE",
        help="JSON or JSON lines with `prompt`, `chosen` and `rejected`; once for each objective, for dpo",
    )  # fmt: skip
    add(
        "--reward", action="append", metavar="NAME=SOURCE",
        help="NAME=module:function, NAME=hub:ID[#output][:-] or NAME=url:...; once for each objective, for ppo and grpo",
    )  # fmt: skip
    add(
        "--reward-timeout", type=float, metavar="SECONDS",
        help="a reward may take so long for a batch; default for ever",
    )  # fmt: skip
    add("--output", required=True, metavar="DIR", help="where the trained adapter goes")
    add_updates(parser)
    add(
        "--batch-size", type=int, default=RESPONSES,
        help=f"responses or pairs in an update, on each process (default {RESPONSES})",
    )  # fmt: skip
    add(
        "--micro-batch-size",
        type=int,
        help="responses or pairs in a forward; default the batch, and 64 in rollouts of ppo",
    )
    add(
        "--group-size", type=int,
        help=f"responses to a prompt that are compared with one another, for grpo (default {SAMPLES}) and, in place of its "
        "critic, for ppo (default none)",
    )  # fmt: skip
    add_sampling(parser)
    add("--learning-rate", type=float, help=f"of the router; default {RATES}")
    add(
        "--kl-coef", type=float,
        help="weight of the divergence from the base: kl_coef of ppo and beta of grpo (default 0), beta of dpo",
    )  # fmt: skip
    add("--mu", type=float, help="temperature of the weights of objectives (default 0.1)")
    add("--beta", type=float, help="how fast they forget (default 0.1)")
    add("--seed", type=int, default=0, help="of prompts and sampling (default 0)")
    add("--save-steps", type=int, help="a checkpoint every so many updates; default none")
    add("--resume", action="store_true", help="go on with the run in --output, with the same other arguments")
    add("--bf16", action="store_true", help="train in bfloat16 autocast")
    add("--cpu", action="store_true", help="use no accelerator")
    add_reports(parser)
    add("--quiet", action="store_true", help="no progress bar and no metrics on the console")


def run(arguments: argparse.Namespace) -> int:
    """Train and save.

    Raises:
        HoEError: an argument, a file or a reward is not what it should be.
    """
    from ..training.every_router import TRAINERS, train_routers
    from ..training.trl_versions import missing

    reason = missing(TRAINERS[arguments.trainer][0])
    if reason:
        raise HoEError(reason, argument="--trainer", value=arguments.trainer)
    check_options(arguments)
    data = _data(arguments)
    model, tokenizer = load_adapter(arguments.adapter, arguments.base)
    normalizer = train_routers(
        model,
        configuration(arguments),
        trainer=arguments.trainer,
        processing_class=tokenizer,
        routers=arguments.router,
        resume_from_checkpoint=arguments.resume,
        progress=not arguments.quiet,
        say=None if arguments.quiet else print,
        **data,
    )
    table = "" if normalizer is None else f"; payoff table {json.dumps(normalizer.payoff.round(4).tolist())}"
    print(f"saved in {arguments.output}{table}")
    return 0


def _data(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the trainer learns from."""
    if arguments.trainer == "dpo":
        files = read_pairs(arguments.pairs, "--pairs", "NAME=FILE")
        return {"train_dataset": {name: read_rows(file, "pairs", ("chosen",)) for name, file in files.items()}}
    texts = ("prompt", "text", "messages", "input_ids") if arguments.trainer == "distill" else ("prompt",)
    data: dict[str, Any] = {"train_dataset": read_rows(arguments.prompts, "prompts", texts)}
    if arguments.trainer == "distill":
        return data
    from ..rewards.command_line import parse_rewards

    held_out = arguments.eval_prompts
    name = {"ppo": "reward_model", "grpo": "reward_funcs"}[arguments.trainer]
    data |= {"eval_dataset": None if held_out is None else read_rows(held_out, "prompts", ("prompt",))}
    return data | {name: parse_rewards(arguments.reward)}
