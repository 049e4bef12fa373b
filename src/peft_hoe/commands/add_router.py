"""`peft-hoe add-router`: one more router of a saved adapter."""

from __future__ import annotations

import argparse

from ..experts import add_router
from ..preference import read_preference
from ..specs import KINDS, RouterSpec
from .changed_adapter import add_places, places, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_places(parser)
    add = parser.add_argument
    add("--router", required=True, metavar="PREFERENCE", help="where it stands, such as 0.25,0.75")
    add("--router-kind", default=KINDS[0], help=f"{' or '.join(KINDS)} (default {KINDS[0]})")
    add("--votes-for", metavar="NAMES", help="experts with commas, or all; default those around its preference")
    add("--name", help="of the router; default r and a number")


def run(arguments: argparse.Namespace) -> int:
    """Add the router, and print what the adapter has."""
    chosen = arguments.votes_for
    votes_for = chosen if chosen in (None, "all") else [name.strip() for name in chosen.split(",")]
    preference = read_preference(arguments.router)
    router = RouterSpec(preference, name=arguments.name, votes_for=votes_for, kind=arguments.router_kind)
    show(add_router(router=router, **places(arguments)), arguments.output)
    return 0
