"""`peft-hoe sweep`: an adapter at many preferences, measured, drawn and compared."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from ..errors import HoEError
from ..inputs import load_adapter, read_preferences, read_prompts
from .arguments import add_decoding, read_decoding, read_pairs

JUDGE_KEY = "OPENAI_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments; most are those of `peft_hoe.evaluation.sweep`."""
    add = parser.add_argument
    add("adapter", metavar="ADAPTER", help="directory or Hub id of a HoE adapter")
    add("--base", help="directory or Hub id of its base model; default what the adapter names")
    add(
        "--prompts",
        required=True,
        metavar="FILE",
        help="text (a prompt a line), JSON (a list) or JSON lines (`prompt`); chat messages go through the chat template",
    )
    add(
        "--reward",
        action="append",
        required=True,
        metavar="NAME=SOURCE",
        help="NAME=module:function, NAME=hub:ID[#output][:-] or NAME=url:...; once for each objective",
    )
    add("--output", required=True, metavar="DIR", help="where results go; an interrupted sweep goes on from there")
    add(
        "--preferences",
        default="grid",
        metavar="FILE",
        help="grid (default: the paper's 11 or 13 points, else Das-Dennis), or a file: JSON rows, or a preference a line",
    )
    add(
        "--payoff-prompts", metavar="FILE", help="held-out prompts to scale rewards on; default the sweep's own corners"
    )
    add(
        "--routers",
        choices=["keep", "static", "drop"],
        default="keep",
        help="static: as before they were trained; drop: the interpolation of experts alone (default keep)",
    )
    add_decoding(parser)
    add("--texts", type=int, default=1, help="texts for each prompt and preference, sampled (default 1)")
    add("--seed", type=int, default=0, help="of sampling (default 0)")
    add("--batch-size", type=int, default=128, help="completions at once (default 128)")
    add("--name", help="of the method, in tables and plots; default HoE")
    add(
        "--baseline",
        action="append",
        metavar="NAME=FILE",
        help="JSON lines of another method's completions of the same prompts, to compare with",
    )
    add("--judge", metavar="URL", help="OpenAI-compatible URL of a judge of completions against each baseline's")
    add("--judge-model", metavar="NAME", help=f"the server's name of the judge; a key is read from {JUDGE_KEY}")
    add("--judge-criterion", default="", metavar="TEXT", help='what better means to it, such as "more helpful"')
    add("--report", action="store_true", help="also write report.html, one self-contained page")
    add("--overwrite", action="store_true", help="begin anew where the output directory holds another sweep")
    add("--cpu", action="store_true", help="use no accelerator")
    add("--quiet", action="store_true", help="no progress bar and no tables")


def run(arguments: argparse.Namespace) -> int:
    """Sweep, compare, and write everything into the output directory.

    Raises:
        HoEError: an argument, a file or a reward is not what it should be, or a package is missing.
    """
    try:
        from .. import metrics  # noqa: F401  # before hours of work, not after
    except ImportError as error:
        raise HoEError(str(error)) from None
    from ..evaluation import Sweep, sweep
    from ..rewards.command_line import parse_rewards
    from ..rewards.sources import Rewards

    baselines = read_pairs(arguments.baseline, "--baseline", "NAME=FILE")
    _check_judge(arguments, baselines)
    prompts = read_prompts(arguments.prompts)
    held_out = None if arguments.payoff_prompts is None else read_prompts(arguments.payoff_prompts)
    preferences = read_preferences(arguments.preferences)
    sources = parse_rewards(arguments.reward)
    model, tokenizer = load_adapter(arguments.adapter, arguments.base)
    device = _device(arguments.cpu)
    model = model.eval().to(device)
    rewards = Rewards(sources, _objectives(model)).to(device)
    output = Path(arguments.output)
    found = sweep(
        model,
        tokenizer,
        prompts,
        rewards,
        preferences,
        name=arguments.name,
        payoff=held_out,
        decoding=read_decoding(arguments),
        texts=arguments.texts,
        routers=arguments.routers,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        output_dir=output,
        overwrite=arguments.overwrite,
        progress=not arguments.quiet,
    )
    others = [
        Sweep.from_generations(
            path,
            rewards,
            prompts=prompts,
            objectives=found.objectives,
            payoff=found.normalizer,
            name=name,
        )
        for name, path in baselines.items()
    ]
    _publish(arguments, found, others, output)
    return 0


def _publish(arguments: argparse.Namespace, found: Any, others: list[Any], output: Path) -> None:
    """Tables on the screen, everything else into the output directory."""
    from ..evaluation.reporting.as_json import as_json

    say = (lambda text: None) if arguments.quiet else print
    say(found.table() + "\n")
    measured = None
    if found.has_scale:
        measured = found.metrics()
        say(measured.table() + "\n")
    compared = [found.compare(other) for other in others] if measured is not None else []
    for comparison in compared:
        say(comparison.table() + "\n")
    judged = _judge(arguments, found, others)
    for rates in judged:
        say(rates.table() + "\n")
    written = ["sweep.json", "rewards.npy", "generations.jsonl", "metrics.json", "front.png"]
    numbers = as_json(measured, compared, judged)
    (output / "metrics.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    found.plot(output / "front.png", others=others)
    if arguments.payoff_prompts is not None:
        written.append("payoff.jsonl")
    if arguments.report:
        found.report(output / "report.html", others=others, judged=judged)
        written.append("report.html")
    print(f"saved in {output}: {', '.join(written)}")


def _check_judge(arguments: argparse.Namespace, baselines: dict[str, str]) -> None:
    if arguments.judge is None:
        return
    if arguments.judge_model is None:
        raise HoEError(
            "--judge needs --judge-model, the name by which the server knows the judge", argument="--judge-model"
        )
    if not baselines:
        raise HoEError("--judge compares with baselines; give at least one --baseline NAME=FILE", argument="--baseline")


def _judge(arguments: argparse.Namespace, found: Any, others: list[Any]) -> list[Any]:
    if arguments.judge is None:
        return []
    from ..evaluation import URLJudge, win_rates

    key = os.environ.get(JUDGE_KEY)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    judge = URLJudge(arguments.judge, arguments.judge_model, criterion=arguments.judge_criterion, headers=headers)
    return [win_rates(found, other, judge, progress=not arguments.quiet) for other in others]


def _objectives(model: Any) -> list[str]:
    from ..tuner.functional import adapter_of

    return adapter_of(model).objectives


def _device(cpu: bool) -> str:
    import torch

    return "cuda" if torch.cuda.is_available() and not cpu else "cpu"
