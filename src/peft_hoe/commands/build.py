"""`peft-hoe build`: existing single-objective policies become a steerable adapter."""

from __future__ import annotations

import argparse

from ..experts import build_adapter
from ..preference import read_preference
from .build_settings import add_settings, read_settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_settings(parser)
    add = parser.add_argument
    add("--output", required=True, metavar="DIR", help="where the adapter goes")
    add("--default-preference", metavar="PREFERENCE", help="the preference in effect when none is given")
    add("--overwrite", action="store_true", help="replace an adapter in the output directory")
    add("--quiet", action="store_true", help="no progress bar and no table")


def run(arguments: argparse.Namespace) -> int:
    """Build, and print the report's table unless told to be quiet."""
    build_adapter(
        **read_settings(arguments),
        output_dir=arguments.output,
        default_preference=read_preference(arguments.default_preference) if arguments.default_preference else None,
        overwrite=arguments.overwrite,
        progress=not arguments.quiet,
    )
    return 0
