"""The command line: parse, call, print. Every command is a module of `peft_hoe.commands`."""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from collections.abc import Sequence

from .errors import HoEError

_COMMANDS = {
    "build": "Turn existing single-objective policies into a steerable adapter.",
    "add-objective": "Add an objective to an adapter, with the policy that was trained for it.",
    "add-expert": "Add an expert to an adapter: of a policy, or merged from the adapter's own.",
    "add-router": "Add a router to an adapter, to be trained later.",
    "remove": "Remove experts and routers from an adapter.",
    "plan": "What a build will take: sizes, memory, disk and time, before anything is read.",
    "inspect": "What an adapter's directory holds: experts, placement, routers, sizes, report.",
    "policy": "Train one policy for each reward, where you have none to build from.",
    "merges": "The methods of merging policies, with their options and sources.",
    "demo": "Build, save, load and steer a tiny model offline.",
    "train": "Train the routers of an adapter for their preferences.",
    "recipes": "The paper's tasks: datasets, rewards and models by name.",
    "sweep": "Measure an adapter at many preferences: front, metrics, plots and a report.",
    "reproduce": "A whole experiment, resumable: build, train routers, sweep, baselines, report.",
    "calibrate": "A dial whose equal steps are equal steps along the front.",
    "export": "A preference as an ordinary LoRA or dense checkpoint, for any engine.",
    "serve": "An OpenAI server with a preference in every request.",
    "space": "The folder of a Space on the Hugging Face Hub, with that server's page.",
    "vllm": "The command line of a vLLM server with a preference in the model's name.",
    "vllm-check": "Whether trained routers can vote inside the vLLM that is installed here.",
    "weights": "A preference as the scales of a request to llama.cpp's server.",
    "run": "Run any Python program with HoE adapters registered in PEFT.",
}

# What one library tells another of its own changes is nothing that the user of a command can act on.
_THIRD_PARTIES = r"(transformers|peft|trl|torch|accelerate|datasets|huggingface_hub)(\.|$)"


def build_parser(commands: Sequence[str] = tuple(_COMMANDS)) -> argparse.ArgumentParser:
    """The parser with the arguments of the given commands; the modules of the others are not imported."""
    parser = argparse.ArgumentParser(prog="peft-hoe", description="One language model, many preferences.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in _COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        if name in commands:
            module = importlib.import_module(f".commands.{name.replace('-', '_')}", __package__)
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; errors about the input are one line on stderr and exit status 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = build_parser([name for name in argv[:1] if name in _COMMANDS]).parse_args(argv)
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
            warnings.filterwarnings("ignore", category=category, module=_THIRD_PARTIES)
        try:
            status: int = arguments.run(arguments)
        except HoEError as error:
            print(f"peft-hoe {arguments.command}: {error}", file=sys.stderr)
            return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
