"""`peft-hoe export`: a preference as weights that engines serve without this package."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import HoEError
from ..preference import read_preference


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments; most are those of `peft_hoe.export_lora`."""
    add = parser.add_argument
    add("adapter", metavar="ADAPTER", help="directory or Hub id of a HoE adapter")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--preference", help="such as 0.7,0.3 or helpful=0.7,harmless=0.3")
    what.add_argument("--grid", type=float, metavar="STEP", help="a LoRA for every preference in steps, such as 0.1")
    what.add_argument(
        "--experts", action="store_true", help="with --format gguf: a file for every expert, see `peft-hoe weights`"
    )
    add("--format", default="lora", choices=["lora", "gguf"], help="gguf: for llama.cpp, with --base (default lora)")
    add("--output", required=True, metavar="DIR", help="where the LoRA goes; must be empty or new")
    add("--merged", metavar="BASE", help="merge into this base instead, and write a dense checkpoint")
    add(
        "--rank", type=int, help="reduce modules of a larger rank to this one by SVD; the error is told (default exact)"
    )
    add("--dtype", help="float32, bfloat16 or float16; default the adapter's own, but at least float32")
    add("--even", action="store_true", help="one rank for all modules, for engines that do not read rank_pattern")
    add(
        "--routers",
        default="keep",
        help="of trained routers: keep (their mean votes over --prompts), static (as before training) or drop (default keep)",
    )
    add("--prompts", metavar="FILE", help="text (a prompt a line), JSON or JSON lines, to calibrate trained routers on")
    add(
        "--base",
        help="the base model, to run --prompts, for --format gguf, and for experts of embeddings and norms; default what the "
        "adapter names",
    )
    add(
        "--sweep",
        metavar="DIR",
        help="of the adapter (peft-hoe sweep), with its --reward: tell the hypervolume that such exports lose along its front",
    )
    add("--reward", action="append", metavar="NAME=SOURCE", help="as for peft-hoe sweep; once for each objective")
    add("--dry-run", action="store_true", help="with --grid: tell the size only")
    add("--overwrite", action="store_true", help="replace an adapter in the output directory")


def run(arguments: argparse.Namespace) -> int:
    """Export, and print the report's table.

    Raises:
        HoEError: an argument cannot be used, or the export fails.
    """
    _check(arguments)
    from ..serving.atlas import export_atlas
    from ..serving.dense import export_merged
    from ..serving.lora import export_lora

    options: dict[str, Any] = {name: getattr(arguments, name) for name in ("rank", "dtype", "routers")}
    source: Any = arguments.adapter
    loaded = arguments.prompts is not None or arguments.sweep is not None
    if loaded:
        source, options["tokenizer"], options["prompts"] = _calibrated(arguments)
    if arguments.sweep is not None:
        from ..rewards.command_line import parse_rewards

        options |= {"sweep": arguments.sweep, "rewards": parse_rewards(arguments.reward)}
    if arguments.format == "gguf":
        _export_gguf(arguments, source, options)
        return 0
    if arguments.merged is not None:
        preference = read_preference(arguments.preference)
        print(export_merged(source, preference, arguments.merged, arguments.output, **options).table())
        return 0
    options |= {"even": arguments.even, "base": None if loaded else arguments.base}
    if arguments.grid is not None:
        export_atlas(source, arguments.grid, arguments.output, tell=print, dry_run=arguments.dry_run, **options)
        return 0
    preference = read_preference(arguments.preference)
    print(export_lora(source, preference, arguments.output, overwrite=arguments.overwrite, **options).table())
    return 0


def _export_gguf(arguments: argparse.Namespace, source: Any, options: dict[str, Any]) -> None:
    from ..serving.gguf_lora import export_gguf, export_gguf_experts
    from ..serving.source import base_of

    base = arguments.base or base_of(arguments.adapter)
    dtype = arguments.dtype or "float32"
    if arguments.experts:
        files = export_gguf_experts(source, base, arguments.output, dtype=dtype)
        print(
            "llama-server --model BASE.gguf --cache-ram 0 --lora-init-without-apply "
            + " ".join(f"--lora {f}" for f in files)
        )
        return
    preference = read_preference(arguments.preference)
    print(export_gguf(source, preference, base, arguments.output, **{**options, "dtype": dtype}).table())


def _check(arguments: argparse.Namespace) -> None:
    """Refuse options that the others leave without use."""
    gguf, single = arguments.format == "gguf", arguments.preference is not None
    unused = {
        "--dry-run": arguments.dry_run and arguments.grid is None and "it goes with --grid",
        "--grid": arguments.grid is not None and gguf and "--format gguf writes one preference, or --experts",
        "--experts": arguments.experts and not gguf and "it goes with --format gguf",
        "--merged": arguments.merged is not None
        and (gguf or not single)
        and "it goes with --preference and --format lora",
        "--even": arguments.even
        and (gguf or arguments.merged is not None)
        and "it goes with LoRAs, and GGUF files are even",
        "--base": arguments.base is not None
        and arguments.merged is not None
        and arguments.prompts is None
        and arguments.sweep is None
        and "--merged names the base",
        "--rank": arguments.rank is not None and arguments.experts and "experts are written as they are",
        "--prompts": arguments.prompts is not None and arguments.experts and "experts are written as they are",
        "--routers": arguments.routers != "keep"
        and arguments.experts
        and "experts are written as they are; peft-hoe weights takes it",
        "--sweep": arguments.sweep is not None
        and (gguf or arguments.dry_run or not arguments.reward)
        and "it goes with --reward NAME=SOURCE, which score its texts, and not with --format gguf or --dry-run",
        "--reward": arguments.reward is not None and arguments.sweep is None and "it goes with --sweep DIR",
        "--overwrite": arguments.overwrite
        and (gguf or not single or arguments.merged is not None)
        and "only a single LoRA replaces another",
    }
    for option, reason in unused.items():
        if reason:
            raise HoEError(
                f"{option} cannot be used here: {reason}",
                argument=option, value=getattr(arguments, option[2:].replace("-", "_")),
            )  # fmt: skip


def _calibrated(arguments: argparse.Namespace) -> tuple[Any, Any, list[Any] | None]:
    """Model, tokenizer, and prompts where there are some."""
    from ..inputs import load_adapter, read_prompts

    given = arguments.prompts
    prompts = None if given is None else [row["prompt"] for row in read_prompts(given)]
    model, tokenizer = load_adapter(arguments.adapter, arguments.base)
    return model.eval(), tokenizer, prompts
