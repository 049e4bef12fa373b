"""Fronts of HoE and its baselines on policies of a 260k-parameter TinyStories Llama, with intervals.

    python benchmarks/fronts.py --shared DIR --output fronts --policies POLICIES

Every method has the same policies, rank and build defaults, answers the same 120 test prompts at the same preferences,
and is scored on one scale: the payoff table of the one-hot experts on the validation prompts at the same decoding,
reference point −0.1. Greedy, and sampled at temperature 1; 48 new tokens. Routers of HoE and of the LoRAMoE-like
mixture are trained with the settings of `router_training.py`.

`hoe` has the policies' experts and one at the centroid; `hoe_linear` is the same without its length between experts;
`hoe_pairs` (three objectives) has merged experts in the middle of each pair in place of the centroid. `hoe_trained` has
trained routers between the corners and at the centroid, and no merged expert; `hoe_merged_trained` has the merged
expert at the centroid, and the same routers around it. POLICIES holds MORLHF policies as `morlhf_policies.py` writes
them; seeds that lack a preference are left out. `hoe_same` is HoE made from that script's own single-objective
policies, so that both come from the same recipe; `hoe_same_merged_trained` has routers too.

Every sweep is a folder under `<output>/<set>/sweeps`, and is not repeated; `--only`, `--pairs` and `--decodings` run
parts. Tables are of all sweeps that are there: on the screen, and in `fronts.json` and `fronts.md`. `--split validation`
does the same on the validation prompts, with names of its own; what was chosen was chosen there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft_hoe
from figures_setting import parser
from fronts_adapters import SETS, Problem
from fronts_costs import llama_shapes, seconds_per_token, storage_table, stored
from fronts_tables import Front
from morlhf_policies import PREFERENCES, runs
from peft_hoe.evaluation import HoEMethod, Sweep
from peft_hoe.evaluation.baselines import BASELINES
from router_training import NEW_TOKENS, TEXTS
from trained_routers import lora_moe_options

# Method: seeds of training
METHODS = {
    "hoe": 1, "hoe_linear": 1, "hoe_pairs": 1, "hoe_same": 1, "rs": 1, "rs_norm": 1, "rs_dense": 1, "mod": 1, "ta": 1,
    "ties": 1, "pcb": 1, "prompting": 1, "morlhf": 3, "lora_moe": 1, "hoe_trained": 5, "hoe_merged_trained": 5,
    "hoe_same_merged_trained": 3,
}  # fmt: skip
RANK = 16
STORIES = llama_shapes(64, 172, 5, 512, 32, tied=True)


class Missing(Exception):
    """A method whose policies are not there (yet)."""


def make(problem: Problem, name: str, seed: int, sampled: bool, policies: Path | None) -> tuple[Any, Any]:
    """A method, and the preferences that it answers."""
    how: dict[str, Any] = {"decoding": problem.decoding(sampled)}
    grid = peft_hoe.preference_grid(len(problem.objectives))
    if name.startswith("hoe"):
        return HoEMethod(problem.steered(hoe(problem, name, seed, policies)), problem.tokenizer, **how), grid
    where = {"tokenizer": problem.tokenizer, "folder": problem.folder / "adapters" / "baselines", **how}
    if name == "morlhf":
        own = morlhf_policies(problem, seed, policies)
        return BASELINES[name].make(problem.base, own, objectives=problem.objectives, **where), list(own)
    if name == "lora_moe":
        where["folder"] = problem.folder / "trained" / f"lora_moe-seed{seed}"
        where |= lora_moe_options(problem, seed)
    return BASELINES[name].make(problem.base, problem.policies, **where), grid


def hoe(problem: Problem, name: str, seed: int, policies: Path | None) -> Path:
    """The folder of one of the variants of HoE."""
    if name in ("hoe_trained", "hoe_merged_trained"):
        return problem.trained_hoe(name, seed, merged=name == "hoe_merged_trained")
    if name == "hoe_linear":
        return problem.adapter(name, interpolation="linear")
    if name == "hoe_pairs":
        if len(problem.objectives) < 3:
            raise Missing("the middle of the only pair is the centroid")
        return problem.adapter(name, experts=middles(len(problem.objectives)))
    if name.startswith("hoe_same"):
        own = {objective: folder_of(policies) / f"stories260k-{objective}" for objective in problem.objectives}
        absent = [path.name for path in own.values() if not (path / "model.safetensors").exists()]
        if absent:
            raise Missing(f"not there: {', '.join(absent)}")
        sources = {objective: str(path) for objective, path in own.items()}
        if name.endswith("trained"):
            return problem.trained_hoe(name, seed, sources, merged=True)
        return problem.adapter(name, sources)
    return problem.adapter(name)


def middles(n: int) -> list[list[float]]:
    """The middle of each pair of N objectives."""
    pairs = itertools.combinations(range(n), 2)
    return [[0.5 if i in pair else 0.0 for i in range(n)] for pair in pairs]


def folder_of(policies: Path | None) -> Path:
    """The folder --policies."""
    if policies is None:
        raise Missing("its policies are in the folder --policies")
    return policies


def morlhf_policies(problem: Problem, seed: int, folder: Path | None) -> dict[tuple[float, ...], str]:
    """`{λ: directory}` of one seed."""
    wanted = [run for run in runs(problem.key, seed + 1) if run.seed == seed]
    found = {tuple(run.preference.values()): folder_of(folder) / run.name for run in wanted}
    absent = [path.name for path in found.values() if not (path / "model.safetensors").exists()]
    if absent:
        raise Missing(f"not there: {', '.join(absent)}")
    return {point: str(path) for point, path in found.items()}


def swept(
    problem: Problem, name: str, seed: int, sampled: bool, asked: bool, arguments: argparse.Namespace
) -> Sweep | None:
    """A sweep from its folder, or a new one; None where its policies are not there, or it is not asked for."""
    where, prompts = (
        ("sweeps", problem.test) if arguments.split == "test" else ("sweeps_validation", problem.validation)
    )
    folder = problem.folder / where / f"{name}-seed{seed}-{'sampled' if sampled else 'greedy'}"
    if (folder / "sweep.json").exists():
        return Sweep.load(folder)
    if not asked:
        return None
    try:
        method, preferences = make(problem, name, seed, sampled, arguments.policies)
    except Missing as reason:
        print(f"{name}, seed {seed}: left out ({reason})", file=sys.stderr, flush=True)
        return None
    started = time.process_time()
    found = peft_hoe.sweep(
        prompts=prompts, rewards=problem.rewards, preferences=preferences, generate=method, name=name,
        payoff=problem.scale(sampled), texts=arguments.texts if sampled else 1, batch_size=660, output_dir=folder,
        progress=False,
    )  # fmt: skip
    print(f"{folder.name}: {time.process_time() - started:.0f} s of CPU time", file=sys.stderr, flush=True)
    return found


def front(problem: Problem, sampled: bool, arguments: argparse.Namespace) -> Front | None:
    """Everything that there is for one set of objectives at one decoding; None without HoE and soups."""
    sweeps: dict[str, Sweep] = {}
    for name, seeds in METHODS.items():
        runs = [swept(problem, name, seed, sampled, False, arguments) for seed in range(min(seeds, arguments.seeds))]
        found = [run for run in runs if run is not None]
        if found:
            sweeps[name] = Sweep.stack(found)
    if not {"hoe", "rs"} <= set(sweeps):
        return None
    n = len(problem.objectives)
    counts = stored(STORIES, n, RANK, len(sweeps["rs"].preferences), routers=2 if n == 2 else 3, votes=n)
    counts["morlhf"] = len(PREFERENCES[problem.key]) * STORIES.parameters
    path = problem.folder / "cpu_times.json"
    times = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return Front(sweeps, counts, times, own_prompts=arguments.split == "validation")


def measure_times(problem: Problem, arguments: argparse.Namespace) -> None:
    """CPU seconds for a token, by method; of those that were swept."""
    path = problem.folder / "cpu_times.json"
    if path.exists():
        return
    done = {name: problem.folder / "sweeps" / f"{name}-seed0-greedy/sweep.json" for name in METHODS}
    names = [
        name for name in METHODS if done[name].exists() and name != "morlhf"
    ]  # a model of its own, without adapter
    methods = {name: make(problem, name, 0, False, arguments.policies)[0] for name in names}
    # Between a LoRA expert and a router.
    middle = [0.3, 0.7] if len(problem.objectives) == 2 else [1 / len(problem.objectives)] * len(problem.objectives)
    found = seconds_per_token(problem.base, problem.tokenizer, problem.test[:64], methods, middle, NEW_TOKENS)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def main(given: Sequence[str] | None = None) -> None:
    """Sweep what is missing, then print all tables."""
    command = parser(__doc__)
    command.add_argument("--policies", type=Path, help="folder with MORLHF policies")
    command.add_argument(
        "--pairs", nargs="+", choices=SETS, default=list(SETS), help="sets of objectives (default all)"
    )
    command.add_argument(
        "--only", nargs="*", choices=METHODS, default=list(METHODS), help="methods to sweep (default all)"
    )
    command.add_argument("--decodings", nargs="+", choices=["greedy", "sampled"], default=["greedy", "sampled"])
    command.add_argument("--seeds", type=int, default=5, help="seeds of training at most (default 5)")
    command.add_argument("--texts", type=int, default=TEXTS, help=f"sampled texts for each prompt (default {TEXTS})")
    command.add_argument("--limit", type=int, help="use the first prompts only")
    command.add_argument(
        "--split", choices=["test", "validation"], default="test", help="prompts; choose on validation (default test)"
    )
    command.add_argument("--times", action="store_true", help="measure CPU times too")
    arguments = command.parse_args(given)
    for key, decoding in itertools.product(arguments.pairs, arguments.decodings):
        problem = Problem(arguments.shared, arguments.output, key, arguments.limit)
        for name in arguments.only:
            for seed in range(min(METHODS[name], arguments.seeds)):
                swept(problem, name, seed, decoding == "sampled", True, arguments)
        if arguments.times:
            measure_times(problem, arguments)
    write_tables(arguments)


def write_tables(arguments: argparse.Namespace) -> None:
    """Of all sweeps that there are."""
    result: dict[str, Any] = {"peft_hoe": peft_hoe.__version__, "fronts": {}}
    parts = []
    for key, decoding in itertools.product(SETS, ("greedy", "sampled")):
        problem = Problem(arguments.shared, arguments.output, key, arguments.limit)
        found = front(problem, decoding == "sampled", arguments)
        if found is not None:
            result["fronts"][f"{key}, {decoding}"] = found.to_dict()
            parts.append(f"### {' × '.join(problem.objectives)}, {decoding}\n\n{found.tables()}")
    parts.append(f"### Llama-2-7B, from shapes\n\n{storage_table()}")
    stem = "fronts" if arguments.split == "test" else "fronts_validation"
    (arguments.output / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (arguments.output / f"{stem}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print("\n\n".join(parts))


if __name__ == "__main__":
    main()
