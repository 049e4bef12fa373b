"""`peft-hoe add-expert`: one more expert of a saved adapter."""

from __future__ import annotations

import argparse
from dataclasses import replace

from ..experts import add_expert
from .arguments import read_expert
from .changed_adapter import add_places, places, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_places(parser, base=True)
    add = parser.add_argument
    add(
        "--expert",
        required=True,
        metavar="PREFERENCE[=PATH]",
        help="such as 0.25,0.75: a merge of the policies that the adapter was built from; with =PATH, of a policy of its own",
    )
    add("--name", help="of the expert; default e and a number")


def run(arguments: argparse.Namespace) -> int:
    """Add the expert, and print what the adapter has."""
    spec = replace(read_expert(arguments.expert), name=arguments.name, r=arguments.rank)
    show(add_expert(expert=spec, **places(arguments)), arguments.output)
    return 0
