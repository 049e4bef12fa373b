"""`peft-hoe weights`: a preference as the scales of the experts' LoRAs in a request to llama.cpp's server."""

from __future__ import annotations

import argparse
import json
import sys

from ..preference import read_preference


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add = parser.add_argument
    add("adapter", metavar="ADAPTER", help="directory or Hub id of a HoE adapter")
    add("preference", metavar="PREFERENCE", help="such as 0.7,0.3 or helpful=0.7,harmless=0.3")
    add(
        "--routers",
        default="keep",
        help="of trained routers: keep (refuse where they vote), static (as before training) or drop (default keep)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the `lora` list; where it is not exact, say so on stderr.

    Raises:
        HoEError: the adapter or the preference cannot be used.
    """
    from ..serving.llama_cpp import expert_scales

    scales = expert_scales(arguments.adapter, read_preference(arguments.preference), routers=arguments.routers)
    print(json.dumps(scales.lora))
    if scales.lost:
        options = f"--preference {arguments.preference}"
        options += "" if arguments.routers == "keep" else f" --routers {arguments.routers}"
        print(
            f"peft-hoe weights: one factor, {scales.factor:.4g}, stands for those of all modules, which is off by "
            f"{scales.lost:.2%} of the delta's norm; peft-hoe export --format gguf {options} is exact",
            file=sys.stderr,
        )
    return 0
