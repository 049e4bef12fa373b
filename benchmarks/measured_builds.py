"""Builds in processes of their own: against mergekit-extract-lora, with more and more layers, and TinyLlama as a whole."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fronts_tables import markdown
from generated_llama import make
from kept_records import Records
from larger_models import on_a_gpu, on_one_core
from measured_process import Usage, run
from peft_hoe.experts import plan_build

RANK = 128
BUILD = """
import json, sys, torch
torch.set_num_threads(1)
import peft_hoe
job = json.loads(sys.argv[1])
experts = job["options"].pop("experts", None)
if job["own"]:
    experts = [[0.5, 0.5], peft_hoe.ExpertSpec([0.25, 0.75], policy=job["own"])]
peft_hoe.build_adapter(job["base"], job["policies"], job["output"], experts=experts, progress=False, **job["options"])
"""
LIKE = {"r": RANK, "experts": [], "pruning": None, "rescale": None, "interpolation": "linear", "capture": []}
DEFAULTS = {"r": RANK}
EVERYTHING = {"r": RANK, "pruning": None, "capture": ["embeddings", "norms"]}
GIB = 2**30


def checkpoints(work: Path, layers: int, policies: int) -> tuple[Path, dict[str, Path]]:
    """A base and so many policies."""
    numbers = range(1, policies + 1)
    return make(work / f"base-{layers}", layers), {f"p{i}": make(work / f"p{i}-{layers}", layers, i) for i in numbers}


def build(work: Path, layers: int, policies: int, **options: Any) -> Usage:
    """One build in a process of its own."""
    base, found = checkpoints(work, layers, policies)
    return built(work, base, found, None, options)


def build_everything(work: Path, layers: int) -> Usage:
    """Two policies that changed embeddings too, a merge of them, and an expert of a third policy; all of it captured."""
    base = make(work / f"base-{layers}", layers)
    *policies, own = (make(work / f"ends{i}-{layers}", layers, i, ends=True) for i in (1, 2, 3))
    return built(work, base, dict(zip(("p1", "p2"), policies, strict=True)), own, EVERYTHING)


def built(work: Path, base: Path, policies: dict[str, Path], own: Path | None, options: dict[str, Any]) -> Usage:
    """What a build used."""
    output = work / "adapter"
    shutil.rmtree(output, ignore_errors=True)
    named = {name: str(path) for name, path in policies.items()}
    job = {"base": str(base), "policies": named, "output": str(output), "own": own and str(own), "options": options}
    return run([sys.executable, "-c", BUILD, json.dumps(job)])


def planned(records: Records, name: str, work: Path, layers: int, policies: int, **options: Any) -> str:
    """What `peft-hoe plan` says of a build."""

    def ask() -> list[float]:
        base, found = checkpoints(work, layers, policies)
        plan = plan_build(base, found, **options)
        return [plan.seconds, plan.memory_bytes]

    seconds, size = records.get(f"plan of {name} {layers} layers", ask)
    return f"{name}: planned {seconds:.1f} s and {size / GIB:.2f} GiB"


def our_imports(records: Records) -> Usage:
    return records.usage("imports of peft_hoe", lambda: run([sys.executable, "-c", "import peft_hoe"]))


def row(name: str, usage: Usage, imports: Usage) -> list[str]:
    return [
        name, f"{usage.cpu:.1f}", f"{usage.cpu - imports.cpu:.1f}", f"{usage.resident / GIB:.2f}",
        f"{usage.anonymous / GIB:.2f}",
    ]  # fmt: skip


def extract(arguments: argparse.Namespace, records: Records) -> None:
    """One policy as it is, against mergekit; then our defaults with two policies and a merged expert."""
    work, layers = arguments.work, arguments.layers or 8
    program = str(arguments.mergekit)
    interpreter = str(Path(program).with_name("python"))
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    base, policy = make(work / f"base-{layers}", layers), make(work / f"p1-{layers}", layers, 1)
    command = [
        program, "--model", str(policy), "--base-model", str(base), "--out-path", str(work / "lora"), "--max-rank", str(RANK),
        "-e", "embed_tokens", "-e", "lm_head", "-e", "norm", "--no-write-model-card",
    ]  # fmt: skip
    their_imports = records.usage(
        "extract mergekit's imports", lambda: run([interpreter, "-c", "import mergekit.scripts.extract_lora"], offline)
    )
    imports = our_imports(records)

    def both() -> list[Any]:  # of one sitting: their ratio is what counts
        shutil.rmtree(work / "lora", ignore_errors=True)
        theirs, ours = run(command, offline), build(work, layers, 1, **LIKE)
        return [asdict(theirs), asdict(ours), lost(base, policy, work / "lora", work / "adapter")]

    *usages, norms = records.get(f"extract {layers} layers, what is lost", both)
    theirs, ours = (Usage(**usage) for usage in usages)
    defaults = records.usage(f"extract {layers} layers defaults", lambda: build(work, layers, 2, **DEFAULTS))
    rows = [
        row("mergekit-extract-lora", theirs, their_imports),
        row("build_adapter, like for like", ours, imports),
        row(f"build_adapter, defaults, two policies and a merged expert, r = {RANK}", defaults, imports),
    ]
    print(markdown(["", "CPU s", "without imports", "resident GiB", "anonymous GiB"], rows))
    extraction = (theirs.cpu - their_imports.cpu) / (ours.cpu - imports.cpu)
    print(f"\nlike for like: {extraction:.1f} x in extraction, {theirs.cpu / ours.cpu:.1f} x end to end")
    ratios, shares = zip(*norms, strict=True)
    print(f"largest ratio of residual norms, ours to theirs: {max(ratios):.5f}; mean {sum(ratios) / len(ratios):.5f}")
    print(f"least share of the energy that theirs hold, of {len(shares)} modules: {min(shares):.4%}")
    print(planned(records, "like for like", work, layers, 1, **LIKE))
    print(planned(records, "defaults", work, layers, 2, **DEFAULTS))
    print(f"\nlike for like: {on_one_core(ours.cpu - imports.cpu, layers)}")
    print(f"like for like: {on_a_gpu(1, 1, 1, RANK)}")
    print(f"defaults, two policies and a merged expert: {on_one_core(defaults.cpu - imports.cpu, layers)}")
    print(f"defaults, two policies and a merged expert: {on_a_gpu(2, 3, 2, RANK)}")


def lost(base: Path, policy: Path, lora: Path, adapter: Path) -> list[tuple[float, float]]:
    """Ours over mergekit's in every module: the norm of what is left of the task vector, and what is held of its square."""
    from peft_hoe.experts.checkpoints import Checkpoint

    before, after, theirs, ours = (Checkpoint(path, path.name) for path in (base, policy, lora, adapter))
    found = []
    for name in (name for name in before.names if "_proj" in name):
        delta = after.tensor(name).float() - before.tensor(name).float()
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        left = [
            float((delta - store.tensor(f"{stem}.{b}").float() @ store.tensor(f"{stem}.{a}").float()).norm())
            for store, b, a in ((theirs, "lora_B.weight", "lora_A.weight"), (ours, "hoe_B.weight", "hoe_A.weight"))
        ]
        whole = float(delta.double().square().sum())
        found.append((left[1] / left[0], (whole - left[1] ** 2) / (whole - left[0] ** 2)))
    return found


def memory(arguments: argparse.Namespace, records: Records) -> None:
    """Peak memory of builds of more and more layers: of one policy, and of all that a build takes."""
    work, least = arguments.work, arguments.layers or 4

    def measure(build_it: Callable[[], Usage]) -> list[Any]:
        usage = build_it()
        return [asdict(usage), sum(file.stat().st_size for file in (work / "adapter").iterdir())]

    def one(layers: int) -> Usage:
        return build(work, layers, 1, r=RANK, pruning=None, experts=[])

    header = ["layers", "CPU s", "anonymous GiB", "resident GiB", "adapter GiB"]
    for name, times, build_of in (
        ("one policy", (8, 4, 2, 1), one),  # the largest first: the others share its files
        ("two policies, a merge, an expert of a third policy, embeddings and norms captured", (4, 1),
         lambda layers: build_everything(work, layers)),
    ):  # fmt: skip
        rows, anonymous = [], []
        for layers in [count * least for count in times]:
            found, size = records.get(
                f"memory {layers} layers, {name}", lambda layers=layers, of=build_of: measure(lambda: of(layers))
            )
            usage = Usage(**found)
            anonymous.append(usage.anonymous)
            sizes = (usage.anonymous, usage.resident, size)
            rows.append([str(layers), f"{usage.cpu:.0f}", *(f"{count / GIB:.3f}" for count in sizes)])
        print(f"{name}:\n\n{markdown(header, rows[::-1])}\n")
        print(f"anonymous memory at most {max(anonymous) / min(anonymous) - 1:.1%} above the least\n")


def whole(arguments: argparse.Namespace, records: Records) -> None:
    """TinyLlama's 22 layers, two policies and one merged expert."""
    work, layers = arguments.work, arguments.layers or 22
    usage, imports = (
        records.usage(f"whole {layers} layers", lambda: build(work, layers, 2, **DEFAULTS)), our_imports(records)
    )  # fmt: skip
    size = sum(file.stat().st_size for file in (work / f"base-{layers}").iterdir())
    header = [
        "layers",
        "CPU s",
        "wall s",
        "anonymous GiB",
        "resident GiB",
        "read for each of the three models, in its size",
    ]
    print(markdown(
        header,
        [[str(layers), f"{usage.cpu:.0f}", f"{usage.wall:.0f}", f"{usage.anonymous / GIB:.2f}", f"{usage.resident / GIB:.2f}",
          f"{(usage.read - imports.read) / size / 3:.2f}"]],
    ))  # fmt: skip
    print(planned(records, "whole", work, layers, 2, **DEFAULTS))
    print(f"\ndefaults, two policies and a merged expert: {on_one_core(usage.cpu - imports.cpu, layers)}")
    print(f"defaults, two policies and a merged expert: {on_a_gpu(2, 3, 2, RANK)}")
