"""What steering costs beside the forward: setting a preference, many objectives, a preference per row, the first compiled call.

    OMP_NUM_THREADS=1 python benchmarks/steering_cost.py

Random Llamas on the CPU, float32. CPU time of this process and, for compiling, of the compilers that it starts. Each first call
is made in a process of its own, with an empty cache of compiled code.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from peft import get_peft_model
from transformers import CompileConfig

import peft_hoe
import steered_llama as st

COMPILED = ("LoRA", "HoE, static", "HoE, routed", "HoE, routed, length kept")


def milliseconds(job: Callable[[], object]) -> float:
    start = time.process_time()
    job()
    return (time.process_time() - start) * 1e3


def preferences(layers: int, times: int) -> dict[str, float]:
    """Median milliseconds of set_preference on so many layers of 7 modules, for a preference never seen, and for one seen."""
    base = st.base_model(st.Shape(32, 64, layers, 4, 64))
    model = st.hoe(base, 4, trained=True)
    generator = random.Random(0)
    new, seen = [], []
    for _ in range(times):
        parts = [generator.random() for _ in range(3)]
        preference = [part / sum(parts) for part in parts]
        new.append(milliseconds(lambda p=preference: model.set_preference(p)))
        model.set_preference(st.STATIC)
        seen.append(milliseconds(lambda p=preference: model.set_preference(p)))
    return {"new": statistics.median(new), "seen": statistics.median(seen)}


def injection(objectives: int) -> float:
    """Seconds to inject an adapter for so many objectives."""
    base = st.base_model(st.Shape(32, 64, 2, 4, 64))
    config = peft_hoe.HoEConfig(
        objectives=[f"o{i}" for i in range(objectives)], r=1, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return milliseconds(lambda: get_peft_model(base, config)) / 1e3


def rows(shape: st.Shape, batch: int, rounds: int) -> dict[str, float]:
    """A batch with one preference a row over the same batch with one for all, in decoding and in prefill."""
    base = st.base_model(shape)
    static, routed = st.hoe(base, shape.rank), st.hoe(base, shape.rank, trained=True)
    # Rows where the router votes, each with another share of it.
    near = [[0.3 + 0.001 * i, 0.3, 0.4 - 0.001 * i] for i in range(batch)]
    found = {}
    for name, model, one, many in (("static", static, st.STATIC, st.rows(batch)), ("routed", routed, near[1], near)):
        ids, long = st.prompt(shape, batch, 16), st.prompt(shape, batch, 32)
        decode = {kind: st.decode(model, ids, 2, preference=p) for kind, p in (("one", one), ("rows", many))}
        prefill = {kind: st.prefill(model, long, preference=p) for kind, p in (("one", one), ("rows", many))}
        for measure, jobs in (("decode", decode), ("prefill", prefill)):
            times = st.interleaved(jobs, rounds)
            found[f"{name}, {measure}"] = times["rows"] / times["one"]
    return found


def first_call(variant: str, layers: int) -> float:
    """CPU seconds of the first generate with a static cache, compiled by inductor, with all that it starts."""
    base = st.base_model(st.Shape(64, 128, layers, 4, 64, 4))
    if variant == "LoRA":
        model = st.lora(base, st.ACTIVE * 4)
    else:
        kind = "norm" if "length" in variant else "linear"
        model = st.hoe(base, 4, trained="routed" in variant, interpolation=kind)
    settings = CompileConfig(backend="inductor", mode=None)
    settings._compile_all_devices = True  # transformers would not on a CPU
    job = st.generate(
        model, torch.full((1, 8), 5), 4, cache_implementation="static", compile_config=settings
    )  # fmt: skip
    before = time.process_time()
    job()
    started = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() - before + started.ru_utime + started.ru_stime


def in_its_own_process(variant: str, layers: int) -> float:
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        command = [sys.executable, __file__, "--first-call", variant, "--layers", str(layers)]
        output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return float(output.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="of the compiled models")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--first-call", choices=COMPILED, help="print its seconds, and nothing else")
    parser.add_argument("--skip-compiling", action="store_true")
    given = parser.parse_args()
    if given.first_call:
        print(first_call(given.first_call, given.layers))
        return
    print(f"load {st.load_average()}, torch {torch.__version__}")
    print("set_preference, 32 layers x 7 modules:", {k: f"{v:.2f} ms" for k, v in preferences(32, 60).items()})
    print("600 objectives are injected in", f"{injection(600):.1f} s")
    print("32 rows with 32 preferences over one for all:", {
        k: f"{v:.2f}" for k, v in rows(st.Shape(512, 1408, 4, 8, 512, 16), 32, given.rounds).items()})  # fmt: skip
    if given.skip_compiling:
        return
    seconds = {variant: in_its_own_process(variant, given.layers) for variant in COMPILED}
    for variant, value in seconds.items():
        print(f"first compiled generate, {variant}: {value:.0f} s, {value / seconds['LoRA']:.2f} of a LoRA's")


if __name__ == "__main__":
    main()
