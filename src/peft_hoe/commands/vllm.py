"""`peft-hoe vllm`: the command line of a vLLM server whose models have a preference in their name."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from ..errors import HoEError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add = parser.add_argument
    add("adapters", nargs="+", metavar="NAME=ADAPTER", help="directory or Hub id of a HoE adapter, or of an atlas")
    add("--base", help="directory or Hub id of the base model; default what the first adapter names")
    add("--grid", type=float, default=0.1, metavar="STEP", help="step between preferences (default 0.1)")
    add("--rank", type=int, help="reduce LoRAs to this rank by SVD (default exact)")
    add(
        "--routers",
        default="keep",
        help="what trained routers do: keep (they vote inside vLLM), static or drop (default keep)",
    )
    add("--cache", default="~/.cache/peft_hoe/vllm", metavar="DIR", help="where LoRAs are written")
    add("--cache-bytes", default="10G", help="of that folder at most (default 10G)")
    add("--max-loras", type=int, default=8, help="different preferences in one batch (default 8)")


def run(arguments: argparse.Namespace) -> int:
    """Check that the adapters can be served, and print the line.

    Raises:
        HoEError: they cannot.
    """
    from ..serving.vllm_names import Names
    from ..serving.vllm_settings import PREFIX, Settings

    if arguments.max_loras < 1:
        raise HoEError(
            f"--max-loras is {arguments.max_loras}; at least one LoRA must be in a batch",
            argument="--max-loras", value=arguments.max_loras, allowed="at least 1",
        )  # fmt: skip
    environment = {
        f"{PREFIX}ADAPTERS": ",".join(arguments.adapters),
        f"{PREFIX}GRID": f"{arguments.grid:g}",
        f"{PREFIX}CACHE": str(Path(arguments.cache).expanduser()),
        f"{PREFIX}CACHE_BYTES": arguments.cache_bytes,
        f"{PREFIX}RANK": "" if arguments.rank is None else str(arguments.rank),
        f"{PREFIX}ROUTERS": "" if arguments.routers == "keep" else arguments.routers,
    }
    settings = Settings.from_environment(environment)
    if settings is None:
        raise HoEError("no adapter is named; write NAME=ADAPTER", argument="NAME=ADAPTER", value=arguments.adapters)
    names = Names(settings)
    first = next(iter(names.adapters.values()))
    base = arguments.base or first.base
    if not base:
        raise HoEError(f"{first.name} does not name its base model; give --base", argument="--base")
    points = sum(len(adapter.grid.points) for adapter in names.adapters.values())
    told = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", **{name: value for name, value in environment.items() if value}}
    command = ["vllm", "serve", base, "--enable-lora", "--max-lora-rank", str(names.max_rank)]
    command += ["--max-loras", str(arguments.max_loras), "--max-cpu-loras", str(max(points, arguments.max_loras))]
    lines = [f"{name}={shlex.quote(value)}" for name, value in told.items()]
    print(" \\\n    ".join([*lines, shlex.join(command)]))
    if names.layout is not None:
        print("# trained routers vote inside vLLM; peft-hoe vllm-check, where vLLM is installed, says whether they can")
    example = first.spellings(first.grid.points[len(first.grid.points) // 2])
    print(f"# {points} preferences; models such as {first.name}@{example[0]} or {first.name}@{example[1]}")
    return 0
