"""`peft-hoe merges`: the methods of merging policies."""

from __future__ import annotations

import argparse

from ..experts.merging import METHODS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments: there are none."""


def run(arguments: argparse.Namespace) -> int:
    """Print a table of all methods."""
    rows = [("method", "options and their defaults", "source")]
    for name, method in METHODS.items():
        options = ", ".join(f"{option}={default:g}" for option, default in method.options.items())
        rows.append((name, options or "none", method.source))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    for name, options, source in rows:
        print(f"{name:{widths[0]}}  {options:{widths[1]}}  {source}")
    return 0
