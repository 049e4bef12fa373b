"""The settings of a build on the command line, for every command that takes them."""

from __future__ import annotations

import argparse
import re
from typing import Any

from ..experts import Loading, Merging, Pruning, Ranks, TaskSVD
from ..experts.merging import METHODS
from ..experts.option_groups import PRUNE_SCOPES
from ..experts.options import (
    CAPTURES,
    DEFAULT_CAPTURE,
    DEFAULT_INTERPOLATION,
    DEFAULT_RANK,
    DEFAULT_RESCALE,
    DTYPES,
)
from ..experts.svd import SOLVERS
from ..preference import read_preference
from ..specs import KINDS
from .arguments import read_expert, read_number, read_pairs


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Declare base, policies and settings; each is an argument of `build_adapter`, or a field of one of its groups."""
    _add_parts(parser)
    _add_making(parser)
    _add_reading(parser)


def _add_parts(parser: argparse.ArgumentParser) -> None:
    """What the adapter is made of: policies, experts and routers."""
    add = parser.add_argument
    add("base", metavar="BASE", help="directory or Hub id of the model that the policies were trained from")
    add(
        "--policy",
        action="append",
        required=True,
        metavar="OBJECTIVE=PATH",
        help="a policy, full fine-tune or LoRA adapter, directory or Hub id (id@revision); once for each objective",
    )
    add(
        "--expert",
        action="append",
        metavar="PREFERENCE[=PATH]",
        help="a multi-objective expert, such as 0.5,0.5 or helpful=0.5,harmless=0.5; with =PATH it is made of that policy, "
        "which was trained for the preference; default the centroid",
    )
    add("--router", action="append", metavar="PREFERENCE", help="a router expert; default none")
    add("--router-kind", default=KINDS[0], help=f"of the routers: {' or '.join(KINDS)} (default {KINDS[0]})")


def _add_making(parser: argparse.ArgumentParser) -> None:
    """How experts are made: their ranks, what is pruned and merged, and which modules get them."""
    add = parser.add_argument
    add(
        "--rank",
        default="auto",
        help=f"a number; a share of the energy, such as 0.95; full; or auto: {DEFAULT_RANK}, and LoRA policies at their own",
    )
    add(
        "--max-rank",
        type=int,
        default=Ranks.maximum,
        metavar="N",
        help=f"with a share of the energy: at most so many (default {Ranks.maximum})",
    )
    add(
        "--module-rank", action="append", metavar="MODULE=N", help="the rank in modules of a name or regular expression"
    )
    add("--prune", default=str(Pruning.share), help=f"share of entries to drop, or none (default {Pruning.share})")
    add("--prune-scope", default="global", help=f"one of {', '.join(PRUNE_SCOPES)} (default global)")
    add("--merge", default="ties", help=f"one of {', '.join(METHODS)} (default ties)")
    add("--merge-option", action="append", metavar="NAME=NUMBER", help="an option of the merge, such as density=0.6")
    add(
        "--expert-merge",
        action="append",
        metavar="EXPERT=METHOD[,NAME=NUMBER...]",
        help="another merge for one expert, by the name that peft-hoe plan prints, such as centroid=dare,density=0.3",
    )
    add(
        "--rescale",
        default=str(DEFAULT_RESCALE),
        help=f"norm, policy_norm, a number or none (default {DEFAULT_RESCALE})",
    )
    add("--interpolation", default=DEFAULT_INTERPOLATION, help=f"norm or linear (default {DEFAULT_INTERPOLATION})")
    add(
        "--capture",
        default=DEFAULT_CAPTURE,
        help=f"what gets experts besides linear layers: {','.join(CAPTURES)}, one of them, none, or auto, which is embeddings "
        f"where a policy changed them much (default {DEFAULT_CAPTURE})",
    )
    add("--svd", default="randomized", help=f"one of {', '.join(SOLVERS)} (default randomized)")
    add(
        "--svd-tolerance",
        type=float,
        default=TaskSVD.tolerance,
        metavar="SHARE",
        help=f"share of the energy that the randomized SVD may leave (default {TaskSVD.tolerance})",
    )
    add("--seed", type=int, default=0, help="seed of the randomized SVD")
    add("--target-modules", default="all-linear", help="all-linear, a name, names with commas, or a regular expression")
    add("--exclude-modules", help="a name, names with commas, or a regular expression")


def _add_reading(parser: argparse.ArgumentParser) -> None:
    """How the base and the policies are read, and where the work is done."""
    add = parser.add_argument
    add("--task-type", help="PEFT's task type; default from the base's class")
    add("--dtype", help=f"one of {', '.join(DTYPES)}; default the base's")
    add("--revision", help="revision of the base on the Hub")
    add("--allow-pickle", action="store_true", help="read .bin checkpoints too, with weights_only")
    add("--keep-shards", action="store_true", help="keep the files of models on the Hub in its cache, all of them")
    add(
        "--num-processes",
        type=int,
        default=1,
        metavar="N",
        help="processes that share the work, one thread each (default 1)",
    )
    add("--device", default="cpu", help="where modules are computed: cpu or cuda (default cpu)")


def read_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was given, by the names of the arguments of `build_adapter`."""
    return {
        "base": arguments.base,
        "policies": read_pairs(arguments.policy, "--policy", "OBJECTIVE=PATH"),
        "experts": None if arguments.expert is None else [read_expert(item) for item in arguments.expert],
        "routers": _routers(arguments),
        "r": _ranks(arguments),
        "pruning": _pruning(arguments),
        "merging": Merging(
            arguments.merge, _merge_options(arguments.merge_option, "--merge-option"), _merges(arguments.expert_merge)
        ),
        "svd": TaskSVD(arguments.svd, arguments.svd_tolerance),
        "rescale": read_number(arguments.rescale, float),
        "interpolation": arguments.interpolation,
        "capture": () if arguments.capture == "none" else arguments.capture.split(","),
        "seed": arguments.seed,
        "target_modules": _names(arguments.target_modules) or "all-linear",
        "exclude_modules": _names(arguments.exclude_modules),
        "loading": Loading(
            arguments.task_type,
            arguments.revision,
            allow_pickle=arguments.allow_pickle,
            keep_shards=arguments.keep_shards,
        ),
        "dtype": arguments.dtype,
        "num_processes": arguments.num_processes,
        "device": arguments.device,
    }


def _ranks(arguments: argparse.Namespace) -> Ranks:
    pairs = read_pairs(arguments.module_rank, "--module-rank", "MODULE=N")
    modules = {name: read_number(value, int) for name, value in pairs.items()}
    rank = read_number(arguments.rank, int)
    share = read_number(rank, float) if isinstance(rank, str) else rank
    if isinstance(share, float):
        return Ranks(energy=share, maximum=arguments.max_rank, modules=modules)
    return Ranks(rank, maximum=arguments.max_rank, modules=modules)


def _pruning(arguments: argparse.Namespace) -> Pruning:
    share = read_number(arguments.prune, float)
    return Pruning(0.0 if share == "none" else share, arguments.prune_scope)


def _merge_options(items: list[str] | None, option: str) -> dict[str, Any]:
    pairs = read_pairs(items, option, "NAME=NUMBER")
    return {name: read_number(value, float) for name, value in pairs.items()}


def _merges(items: list[str] | None) -> dict[str, Merging]:
    """How single experts are merged."""
    found = {}
    for name, text in read_pairs(items, "--expert-merge", "EXPERT=METHOD[,NAME=NUMBER...]").items():
        method, *options = text.split(",")
        found[name] = Merging(method, _merge_options(options, "--expert-merge"))
    return found


def _preferences(items: list[str] | None) -> list[Any] | None:
    return None if items is None else [read_preference(item) for item in items]


def _routers(arguments: argparse.Namespace) -> list[dict[str, Any]] | None:
    points = _preferences(arguments.router)
    return None if points is None else [{"preference": point, "kind": arguments.router_kind} for point in points]


def _names(text: str | None) -> str | list[str] | None:
    """Names of modules: with commas, or one alone; anything else is a regular expression, or "all-linear"."""
    if text and ("," in text or re.fullmatch(r"\w+", text)):
        return [name.strip() for name in text.split(",")]
    return text
