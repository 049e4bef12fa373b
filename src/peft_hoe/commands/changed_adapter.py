"""What the commands that change an adapter share: which adapter, where the new one goes, and what is printed."""

from __future__ import annotations

import argparse
from typing import Any

from ..config import HoEConfig


def add_places(parser: argparse.ArgumentParser, *, base: bool = False) -> None:
    """Declare the adapter and the output, and the base where an expert is built."""
    add = parser.add_argument
    add("adapter", metavar="ADAPTER", help="directory or Hub id of a HoE adapter")
    add("--output", required=True, metavar="DIR", help="where the new adapter goes; ADAPTER itself with --overwrite")
    add("--overwrite", action="store_true", help="replace an adapter in the output directory")
    if base:
        add("--base", metavar="BASE", help="the base model, directory or Hub id; default what the adapter names")
        add("--device", default="cpu", help="where the expert is computed: cpu or cuda (default cpu)")
        add("--rank", type=int, help="of the new expert; default as the adapter was built, and a LoRA policy's own")


def places(arguments: argparse.Namespace) -> dict[str, Any]:
    """The same, by the names of the arguments of `peft_hoe.experts.add_expert` and its like."""
    given = {"adapter": arguments.adapter, "output_dir": arguments.output, "overwrite": arguments.overwrite}
    building = {name: value for name, value in vars(arguments).items() if name in ("base", "device")}
    return {**given, **building}


def show(config: HoEConfig, output: str) -> None:
    """Print what the new adapter has."""
    print(f"{output}: objectives {', '.join(config.objectives or [])}")
    for expert in config.experts or []:
        print(f"  expert {expert.name} at {_written(expert.preference)}")
    for router in config.routers or []:
        trained = "trained" if router.trained else "not trained"
        print(
            f"  router {router.name} at {_written(router.preference)}, votes for {', '.join(router.votes_for)}, {trained}"
        )


def _written(preference: list[float]) -> str:
    return ",".join(f"{weight:.3g}" for weight in preference)
