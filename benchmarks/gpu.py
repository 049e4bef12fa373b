"""What steering costs on a GPU: launches, decoding and prefill in eager mode, decoding in a CUDA graph, compiled, and PPO.

    python benchmarks/gpu.py [--output FILE]
    OMP_NUM_THREADS=1 python benchmarks/gpu.py --tiny    # without a GPU: every part but the graph

A random Llama of Llama-2-7B's shapes in bfloat16; adapters of rank 128 on all linear layers, 3 of 4 experts active.
Variants are timed in turn, in rounds; medians. Without a GPU "launches" are operations that reach torch's dispatcher,
views left out. Each part is printed and kept as soon as it is measured, and one that fails does not stop the others.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig, StaticCache

import peft_hoe
import steered_llama as st
import training_cost

SEVEN_B = st.Shape(4096, 11008, 32, 32, 32000, 128, "cuda", torch.bfloat16)
TINY = st.Shape(64, 96, 2, 4, 128, 4, "cpu", torch.bfloat16)
TRAINING = {"hidden": 2048, "layers": 22, "vocabulary": 32000, "batch": 32, "prompt_length": 32, "response_length": 64}
TINY_TRAINING = {"hidden": 24, "layers": 1, "vocabulary": 64, "batch": 2, "micro_batch": 2, "prompt_length": 4,
                 "response_length": 4, "updates": 1}  # fmt: skip
VIEWS = ("view", "t", "slice", "unsqueeze", "expand", "detach", "alias", "_unsafe_view", "select", "transpose")
GRAPHED = ("base", "LoRA", "HoE, routed, length kept", "HoE, static")
VARIANTS = ("base", "LoRA", "3 LoRAs", "HoE, static", "HoE, rows", "HoE, routed", "HoE, routed, length kept")


class Operations(TorchDispatchMode):
    """Counts what reaches the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ not in VIEWS
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def launches(job: st.Job) -> int:
    """Kernels that one call launches."""
    job()
    if not torch.cuda.is_available():
        with Operations() as counted:
            job()
        return counted.count
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        job()
        torch.cuda.synchronize()
    names = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx", "hipLaunchKernel")
    return sum(event.count for event in found.key_averages() if event.key in names)


def variants(base: Any, shape: st.Shape, names: Sequence[str] = VARIANTS) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Name to (model, arguments of a call)."""
    static = functools.cache(lambda: st.hoe(base, shape.rank))
    routed = functools.partial(st.hoe, base, shape.rank, trained=True)
    made: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
        "base": (lambda: base, {}),
        "LoRA": (lambda: st.lora(base, st.ACTIVE * shape.rank), {}),
        "3 LoRAs": (lambda: st.lora(base, shape.rank, st.ACTIVE), {}),
        "HoE, static": (static, {}),
        "HoE, rows": (static, {"preference": st.rows}),
        "HoE, routed": (lambda: routed(interpolation="linear"), {}),
        "HoE, routed, length kept": (lambda: routed(interpolation="norm"), {}),
    }
    return {name: (made[name][0](), made[name][1]) for name in names}


def arguments(settings: dict[str, Any], batch: int) -> dict[str, Any]:
    """With one preference a row, for that many."""
    return {name: value(batch) if callable(value) else value for name, value in settings.items()}


def eager(models: dict[str, Any], shape: st.Shape, given: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Launches and milliseconds, by measure and variant."""
    one, many = st.prompt(shape, 1, given.context), st.prompt(shape, given.batch, given.context // 4)
    jobs: dict[str, dict[str, st.Job]] = {"decode": {}, "prefill": {}, "prefill, batch": {}}
    for name, (model, settings) in models.items():
        jobs["decode"][name] = st.decode(model, one, 1, **arguments(settings, 1))
        jobs["prefill"][name] = st.prefill(model, one, **arguments(settings, 1))
        jobs["prefill, batch"][name] = st.prefill(model, many, **arguments(settings, given.batch))
    found = {measure: st.interleaved(each, given.rounds, warm_up=2) for measure, each in jobs.items()}
    return {"launches": {name: float(launches(job)) for name, job in jobs["decode"].items()}} | found


@torch.no_grad()
def graphed(models: dict[str, Any], shape: st.Shape, given: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Milliseconds of a step of decoding that is replayed from a CUDA graph; without a GPU, as it is."""
    ids, jobs = st.prompt(shape, 1, given.context), {}
    for name in GRAPHED:
        model = models[name][0]
        cache = StaticCache(config=model.config, max_cache_len=given.context + 256)
        model(input_ids=ids, logits_to_keep=1, **{st.CACHE: cache})
        token = ids[:, :1].clone()

        def step(model: Any = model, token: torch.Tensor = token, cache: Any = cache) -> None:
            model(input_ids=token, **{st.CACHE: cache})

        if not torch.cuda.is_available():
            jobs[name] = step
            continue
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        jobs[name] = graph.replay
    return {"graph decode": st.interleaved(jobs, given.rounds, warm_up=2)}


@torch.no_grad()
def compiled(shape: st.Shape, given: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds of the first and milliseconds of a later `generate` with a static cache that transformers compiles."""
    short = replace(shape, layers=min(shape.layers, given.compiled_layers))
    models, ids = variants(st.base_model(short), short, GRAPHED), st.prompt(short, 1, given.prompt)
    first: dict[str, float] = {}
    later: dict[str, float] = {}
    for name in GRAPHED:
        settings = CompileConfig(backend=given.backend, mode=None)
        settings._compile_all_devices = True  # also without a GPU
        torch.compiler.reset()
        job = st.generate(models[name][0], ids, given.new, cache_implementation="static", compile_config=settings)
        start = time.perf_counter()
        job()
        first[name] = time.perf_counter() - start
        later |= st.interleaved({name: job}, given.rounds)
    return {"compiled generate, first, s": first, "compiled generate, later": later}


def training(shape: st.Shape, given: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds and MiB of an update of PPO, each variant in a process of its own."""
    options = TINY_TRAINING if given.tiny else TRAINING
    command = [item for key, value in options.items() for item in (f"--{key.replace('_', '-')}", str(value))]
    command += ["--device", shape.device, "--dtype", "float32" if given.tiny else "bfloat16"]
    peers = ("TRL, callable",) if training_cost.trl_has_ppo() else ()
    if not peers:
        print("TRL has no PPOTrainer since 1.13; to compare, install that of constraints/trl-1.12.txt", flush=True)
    measured = {variant: training_cost.run(variant, command) for variant in (*peers, "HoE")}
    return {
        "PPO update, s": {variant: each["wall_seconds"] for variant, each in measured.items()},
        "PPO update, MiB": {variant: each["memory_mib"] for variant, each in measured.items()},
    }


def lines(found: dict[str, dict[str, float]]) -> list[str]:
    """Of the table."""
    rows = []
    for measure, each in found.items():
        peer = each.get("LoRA", each.get("TRL, callable"))
        rows += [
            f"| {measure} | {name} | {value:.2f} | {f'{value / peer:.2f}' if peer else ''} |"
            for name, value in each.items()
        ]
    return rows


def free() -> None:
    """Give the GPU's memory back, which the trainers need in their own processes."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on the CPU where there is no GPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("eager", "graph", "compiled", "training"), help="one part alone")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    if not given.tiny and not torch.cuda.is_available():
        raise SystemExit("there is no GPU; --tiny runs the script on the CPU, to see that it works")
    shape = replace(TINY, device="cuda" if torch.cuda.is_available() else "cpu") if given.tiny else SEVEN_B
    given.context, given.batch = (16, 3) if given.tiny else (512, 32)
    given.prompt, given.new, given.compiled_layers = (4, 3, 1) if given.tiny else (64, 64, 8)
    given.backend = "aot_eager" if given.tiny else "inductor"
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"{card}, torch {torch.__version__}, peft_hoe {peft_hoe.__version__}, {shape}\n", flush=True)
    models = variants(st.base_model(shape), shape) if given.only in (None, "eager", "graph") else {}
    parts: dict[str, Callable[[], dict[str, dict[str, float]]]] = {
        "eager": lambda: eager(models, shape, given),
        "graph": lambda: graphed(models, shape, given),
        "compiled": lambda: compiled(shape, given),
        "training": lambda: training(shape, given),
    }
    kept: dict[str, Any] = {"card": card, "torch": torch.__version__, "parts": {}}
    failed = []
    for part, measure in parts.items():
        if given.only not in (None, part):
            continue
        if part not in ("eager", "graph"):
            models.clear()
        free()
        start = time.perf_counter()
        try:
            found = measure()
        except Exception:  # what comes next can still be measured
            traceback.print_exc()
            failed.append(part)
            continue
        kept["parts"] |= found
        if given.output:
            given.output.write_text(json.dumps(kept, indent=2))
        print(f"{part}, in {time.perf_counter() - start:.0f} s\n\n| measure | variant | value | / LoRA, TRL |")
        print("\n".join(["|---|---|---:|---:|", *lines(found)]), flush=True)
        print()
    if failed:
        raise SystemExit(f"not measured: {', '.join(failed)}")


if __name__ == "__main__":
    main()
