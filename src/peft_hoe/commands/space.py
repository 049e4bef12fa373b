"""`peft-hoe space`: the folder of a Space on the Hugging Face Hub, whose page is that of `peft-hoe serve --page`."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add = parser.add_argument
    add("output", metavar="DIR", help="directory that is written")
    add("--adapter", required=True, help="directory, which is copied, or Hub id of a HoE adapter")
    add("--base", help="Hub id of its base model; default what the adapter names")
    add("--sweep", metavar="DIR", help="a saved sweep whose front the page shows")
    add("--title", help="of the page; default the last part of ADAPTER")


def run(arguments: argparse.Namespace) -> int:
    """Write the folder, and say how it is tried and pushed.

    Raises:
        HoEError: the adapter or its base cannot be used.
    """
    from ..serving.space import write_space

    folder = write_space(
        arguments.adapter, Path(arguments.output), base=arguments.base, sweep=arguments.sweep, title=arguments.title
    )
    print(f"{folder}: cd there and run python app.py, or push it: hf upload --repo-type space USER/NAME {folder}")
    return 0
