"""`peft-hoe add-objective`: one more objective of a saved adapter, and the expert for it."""

from __future__ import annotations

import argparse

from ..errors import HoEError
from ..experts import add_objective
from ..preference import read_preference
from ..specs import ExpertSpec
from .arguments import read_pairs
from .changed_adapter import add_places, places, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_places(parser, base=True)
    add = parser.add_argument
    add("--policy", required=True, metavar="OBJECTIVE=PATH", help="the new objective, and the policy trained for it")
    add("--expert", metavar="PREFERENCE", help="what the policy was trained for; default the new objective alone")
    add("--name", help="of the expert; default the objective's, where it serves that alone")


def run(arguments: argparse.Namespace) -> int:
    """Add the objective, and print what the adapter has.

    Raises:
        HoEError: an argument cannot be used, or the adapter cannot be changed.
    """
    ((name, policy),) = read_pairs([arguments.policy], "--policy", "OBJECTIVE=PATH").items()
    expert = None
    if arguments.expert is not None:
        expert = ExpertSpec(read_preference(arguments.expert), name=arguments.name, r=arguments.rank)
    elif arguments.name is not None:
        raise HoEError(
            "--name goes with --expert; an expert of the new objective alone has its name",
            argument="--name", value=arguments.name,
        )  # fmt: skip
    elif arguments.rank is not None:
        expert = ExpertSpec({name: 1.0}, r=arguments.rank)
    show(add_objective(name=name, policy=policy, expert=expert, **places(arguments)), arguments.output)
    return 0
