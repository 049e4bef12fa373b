"""`peft-hoe plan`: what a build will take, before anything is read."""

from __future__ import annotations

import argparse

from ..experts.plan import plan_build
from .build_settings import add_settings, read_settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments: those of `peft-hoe build` that decide what is made."""
    add_settings(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the plan."""
    print(plan_build(**read_settings(arguments)).table())
    return 0
