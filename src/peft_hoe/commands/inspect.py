"""`peft-hoe inspect`: what an adapter's directory holds."""

from __future__ import annotations

import argparse

from ..experts import inspect_adapter


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's argument."""
    parser.add_argument("adapter", metavar="ADAPTER", help="directory of a HoE adapter")


def run(arguments: argparse.Namespace) -> int:
    """Print objectives, experts, placement, routers, sizes and the report."""
    print(inspect_adapter(arguments.adapter).text())
    return 0
