"""`peft-hoe remove`: a saved adapter without some experts and routers."""

from __future__ import annotations

import argparse

from ..experts import remove
from .changed_adapter import add_places, places, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_places(parser)
    add = parser.add_argument
    add(
        "--expert",
        action="append",
        default=[],
        metavar="NAME",
        help="an expert, for which no router that stays may vote",
    )
    add("--router", action="append", default=[], metavar="NAME", help="a router; routers go first")


def run(arguments: argparse.Namespace) -> int:
    """Remove them, and print what the adapter has."""
    show(remove(experts=arguments.expert, routers=arguments.router, **places(arguments)), arguments.output)
    return 0
