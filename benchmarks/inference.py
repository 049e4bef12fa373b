"""What steering costs in inference on a CPU, beside the base, LoRAs, X-LoRA, MOD and the floor.

    OMP_NUM_THREADS=1 python benchmarks/inference.py [--output FILE]

A random Llama of width 1024 and 8 layers, float32; adapters of rank 32 on all linear layers, 3 of 4 experts active. All
variants are timed in turn, in rounds; medians. Prefill of 256 tokens, a step of decoding after them, generation of 32
tokens after 64. The floor is the base and, measured apart, the two bare products of a LoRA of the same total rank at
every module's shapes. "MOD" decodes the mean of three models' log-probabilities.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model

import peft_hoe
import steered_llama as st

NOT_DECODED = ("X-LoRA", "MOD, 3 models")  # reported in prefill and generation


def variants(shape: st.Shape) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Name to (model or models, arguments of a call)."""
    base = st.base_model(shape)
    merged = st.hoe(base, shape.rank).merge_and_unload()
    copies = [base, *(st.base_model(shape) for _ in range(2))]  # three policies have three sets of weights to read
    total = st.ACTIVE * shape.rank
    return {
        "base": (base, {}),
        f"LoRA, rank {total}": (st.lora(base, total), {}),
        f"{st.ACTIVE} LoRAs": (st.lora(base, shape.rank, st.ACTIVE), {}),
        "X-LoRA": (st.xlora(base, shape.rank, shape.hidden), {}),
        "MOD, 3 models": (copies, {}),
        "HoE, routed": (st.hoe(base, shape.rank, trained=True, interpolation="linear"), {}),
        "HoE, routed, length kept": (st.hoe(base, shape.rank, trained=True), {}),
        "HoE, static": (st.hoe(base, shape.rank), {}),
        "HoE, rows": (st.hoe(base, shape.rank), {"preference": st.rows(1)}),
        "HoE, merged": (merged, {}),
    }


def jobs_of(
    models: dict[str, tuple[Any, dict[str, Any]]], shape: st.Shape, lengths: Any
) -> dict[str, dict[str, st.Job]]:
    """For each measure the job of each variant."""
    long, short = st.prompt(shape, 1, lengths.prefill), st.prompt(shape, 1, lengths.prompt)
    jobs: dict[str, dict[str, st.Job]] = {"prefill": {}, "decode": {}, "generate": {}}
    for name, (model, settings) in models.items():
        if isinstance(model, list):
            jobs["prefill"][name] = st.fused_prefill(model, long)
            jobs["generate"][name] = st.fused_generate(model, short, lengths.new)
            continue
        jobs["prefill"][name] = st.prefill(model, long, **settings)
        jobs["generate"][name] = st.generate(model, short, lengths.new, **settings)
        if name not in NOT_DECODED:
            jobs["decode"][name] = st.decode(model, long, lengths.steps, **settings)
    base, total = models["base"][0], st.ACTIVE * shape.rank
    jobs["prefill"]["products"] = st.bare_products(base, total, lengths.prefill)
    one = st.bare_products(base, total, 1)
    jobs["decode"]["products"] = lambda: [one() for _ in range(lengths.steps)]
    return jobs


def by_active(shape: st.Shape, lengths: Any, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a step of decoding and of a prefill, over the base's, by the number of active experts."""
    base = st.base_model(shape)
    objectives = [f"o{i}" for i in range(16)]
    counts = [1, 2, 4, 8, 16]
    point = {k: [(1 - 0.01 * k) / k + 0.02 * (i == 0) if i < k else 0.0 for i in range(16)] for k in counts}
    point = {k: [p / sum(each) for p in each] for k, each in point.items()}
    config = peft_hoe.HoEConfig(
        objectives=objectives, r=shape.rank, target_modules="all-linear", task_type="CAUSAL_LM", init_weights=False,
        routers=[{"preference": point[k], "votes_for": objectives[:k]} for k in counts if k > 1],
    )  # fmt: skip
    static = st.prepared(get_peft_model(st.another(base), config), False, point[1])
    routed = st.prepared(get_peft_model(st.another(base), config), True, point[1])
    ids = st.prompt(shape, 1, lengths.prompt)
    jobs: dict[str, st.Job] = {"base": st.decode(base, ids, lengths.steps)}
    for k in counts:
        jobs[f"static {k}"] = st.decode(static, ids, lengths.steps, preference=point[k])
        if k > 1:
            jobs[f"routed {k}"] = st.decode(routed, ids, lengths.steps, preference=point[k])
    times = st.interleaved(jobs, rounds)
    ratios = {name: value / times["base"] for name, value in times.items()}
    found: dict[str, dict[str, float]] = {}
    for kind in ("static", "routed"):
        found[kind] = {str(k): ratios[f"{kind} {k}"] for k in counts if f"{kind} {k}" in ratios}
    return found


def doubling(ratios: dict[str, float]) -> str:
    """Where the time is twice the base's, from a line through the measured points."""
    points = [(int(k), ratio) for k, ratio in ratios.items()]
    for (k0, r0), (k1, r1) in itertools.pairwise(points):
        if r0 < 2 <= r1:
            return f"{k0 + (2 - r0) / (r1 - r0) * (k1 - k0):.1f} experts"
    return "1 expert or fewer" if points[0][1] >= 2 else f"more than {points[-1][0]} experts"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=2816)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--rank", type=int, default=32, help="of each expert")
    parser.add_argument("--prefill", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=64, help="before generation")
    parser.add_argument("--new", type=int, default=32, help="tokens generated")
    parser.add_argument("--steps", type=int, default=4, help="of decoding, timed together")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    shape = st.Shape(given.hidden, given.intermediate, given.layers, given.heads, given.vocabulary, given.rank)
    models = variants(shape)
    jobs = jobs_of(models, shape, given)
    times = {measure: st.interleaved(each, given.rounds) for measure, each in jobs.items()}
    floor = {measure: times[measure]["base"] + times[measure].pop("products") for measure in ("prefill", "decode")}
    del models, jobs
    experts = by_active(shape, given, given.rounds)
    lora = f"LoRA, rank {st.ACTIVE * shape.rank}"
    print(
        f"{torch.get_num_threads()} thread, load {st.load_average()}, {platform.machine()}, torch {torch.__version__}\n"
    )
    print("| variant | prefill, ms | / floor | / LoRA | decode, ms | / floor | / LoRA | generate, ms | / LoRA |")
    print("|---|" + "---:|" * 8)
    for name in [*times["prefill"], "floor"]:
        cells = [name]
        for measure in ("prefill", "decode", "generate"):
            value = floor.get(measure) if name == "floor" else times[measure].get(name)
            if measure == "decode" and value is not None:
                value, scale = value / given.steps, given.steps
            else:
                scale = 1
            columns = 2 if measure == "generate" else 3
            if value is None:
                cells += [""] * columns
                continue
            cells.append(f"{value:.1f}")
            if measure != "generate":
                cells.append(f"{value * scale / floor[measure]:.2f}")
            cells.append(f"{value * scale / times[measure][lora]:.2f}")
        print("| " + " | ".join(cells) + " |")
    print("\nA step of decoding over the base's, by active experts:\n")
    print("| votes | " + " | ".join(experts["static"]) + " | twice the base at |\n|---|" + "---:|" * 6)
    for kind, ratios in experts.items():
        cells = [f"{ratios[k]:.2f}" if k in ratios else "" for k in experts["static"]]
        print(f"| {kind} | " + " | ".join(cells) + f" | {doubling(ratios)} |")
    if given.output:
        record = {"settings": vars(given) | {"output": None}, "load": st.load_average(), "times": times, "floor": floor,
                  "by_active": experts}  # fmt: skip
        given.output.write_text(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
