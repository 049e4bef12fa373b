"""What a build costs: the truncated SVD, a policy against mergekit-extract-lora, memory by layers, and TinyLlama as a whole.

    OMP_NUM_THREADS=1 python benchmarks/build.py svd --shared DIR
    OMP_NUM_THREADS=1 python benchmarks/build.py extract --work DIR --mergekit ENVIRONMENT/bin/mergekit-extract-lora
    OMP_NUM_THREADS=1 python benchmarks/build.py memory --work DIR
    OMP_NUM_THREADS=1 python benchmarks/build.py whole --work DIR

mergekit needs an environment of its own: `python -m venv ENVIRONMENT && ENVIRONMENT/bin/pip install mergekit==0.1.5`.
Checkpoints are generated in `--work` (`generated_llama.py`) and found there again. Seconds are those of the CPU, which a busy
machine hardly changes; ratios are of one run. Each part prints a table.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fronts_tables import markdown
from generated_llama import make
from measured_process import Usage, run
from peft_hoe.experts.svd import truncated_svd

RANK = 128
SHAPES = ((1024, 1024), (2048, 2048), (4096, 4096), (4096, 11008))
BUILD = """
import json, sys, torch
torch.set_num_threads(1)
import peft_hoe
job = json.loads(sys.argv[1])
peft_hoe.build_adapter(job["base"], job["policies"], job["output"], progress=False, **job["options"])
"""
LIKE = {"r": RANK, "experts": [], "pruning": None, "rescale": None, "interpolation": "linear"}
GIB = 2**30


# -- the truncated SVD -------------------------------------------------------------------------------------------------


def spectrum(rows: int, columns: int, exponent: float) -> Tensor:
    """A matrix with singular values k^-exponent and random directions."""
    generator = torch.Generator().manual_seed(0)
    size = min(rows, columns)
    left, _ = torch.linalg.qr(torch.randn(rows, size, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(columns, size, generator=generator))
    return (left * torch.arange(1, size + 1) ** -exponent) @ right.T


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    started = time.process_time()
    found = function()
    return time.process_time() - started, found


def against_full(matrix: Tensor, rank: int) -> tuple[float, float, float, str]:
    """CPU seconds of the full decomposition and of ours, ours as a share of the optimal energy, and how."""
    full, values = timed(lambda: torch.linalg.svd(matrix, full_matrices=False)[1].double())
    ours, factors = timed(lambda: truncated_svd(matrix, rank))
    best = float(values[:rank].square().sum() / values.square().sum())
    return full, ours, factors.energy / best, factors.solver


def svd(arguments: argparse.Namespace) -> None:
    """Every shape and spectrum against the full decomposition, and every module of the real policies."""
    rows = []
    for shape in SHAPES[: arguments.shapes]:
        for name, make_matrix in (
            ("k^-0.7", lambda shape=shape: spectrum(*shape, 0.7)),
            ("flat", lambda shape=shape: torch.randn(shape, generator=torch.Generator().manual_seed(0))),
        ):
            full, ours, share, how = against_full(make_matrix(), RANK)
            rows.append(
                [
                    f"{shape[0]} x {shape[1]}",
                    name,
                    f"{full:.2f}",
                    f"{ours:.3f}",
                    f"{full / ours:.1f}",
                    f"{share:.3%}",
                    how,
                ]
            )
            print(rows[-1], file=sys.stderr, flush=True)
    if arguments.shared:
        shares = [against_full(delta, 16)[2] for delta in real_task_vectors(arguments.shared)]
        rows.append([f"{len(shares)} modules", "real, r = 16", "", "", "", f"at least {min(shares):.3%}", ""])
    print(markdown(["matrix", "spectrum", "full SVD, s", "ours, s", "ratio", "share of the optimum", "solver"], rows))


def real_task_vectors(shared: Path) -> list[Tensor]:
    """Every linear weight's change in the policies of the shared folder."""
    from safetensors.torch import load_file

    base = load_file(shared / "models/stories260k/model.safetensors")
    found = []
    for policy in sorted((shared / "models/policies").glob("stories260k-*")):
        weights = load_file(policy / "model.safetensors")
        found += [weights[name].float() - base[name].float() for name in base if "_proj" in name]
    return found


# -- processes ---------------------------------------------------------------------------------------------------------


def build(work: Path, layers: int, policies: int, **options: Any) -> Usage:
    """One build in a process of its own."""
    output = work / "adapter"
    shutil.rmtree(output, ignore_errors=True)
    job = {
        "base": str(make(work / f"base-{layers}", layers)),
        "policies": {f"p{i}": str(make(work / f"p{i}-{layers}", layers, i)) for i in range(1, policies + 1)},
        "output": str(output), "options": options,
    }  # fmt: skip
    return run([sys.executable, "-c", BUILD, json.dumps(job)])


def row(name: str, usage: Usage, imports: Usage) -> list[str]:
    return [
        name, f"{usage.cpu:.1f}", f"{usage.cpu - imports.cpu:.1f}", f"{usage.resident / GIB:.2f}",
        f"{usage.anonymous / GIB:.2f}",
    ]  # fmt: skip


def extract(arguments: argparse.Namespace) -> None:
    """One policy as it is, against mergekit; then our defaults with two policies and a merged expert."""
    work, layers = arguments.work, arguments.layers or 8
    program = str(arguments.mergekit)
    interpreter = str(Path(program).with_name("python"))
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    base, policy = make(work / f"base-{layers}", layers), make(work / f"p1-{layers}", layers, 1)
    shutil.rmtree(work / "lora", ignore_errors=True)
    command = [
        program, "--model", str(policy), "--base-model", str(base), "--out-path", str(work / "lora"), "--max-rank", str(RANK),
        "-e", "embed_tokens", "-e", "lm_head", "-e", "norm", "--no-write-model-card",
    ]  # fmt: skip
    theirs = run(command, offline)
    their_imports = run([interpreter, "-c", "import mergekit.scripts.extract_lora"], offline)
    ours = build(work, layers, 1, **LIKE)
    norms = residuals(base, policy, work / "lora", work / "adapter")
    imports = run([sys.executable, "-c", "import peft_hoe"])
    defaults = build(work, layers, 2, r=RANK)
    rows = [
        row("mergekit-extract-lora", theirs, their_imports),
        row("build_adapter, like for like", ours, imports),
        row(f"build_adapter, defaults, two policies and a merged expert, r = {RANK}", defaults, imports),
    ]
    print(markdown(["", "CPU s", "without imports", "resident GiB", "anonymous GiB"], rows))
    extraction = (theirs.cpu - their_imports.cpu) / (ours.cpu - imports.cpu)
    print(f"\nlike for like: {extraction:.1f} x in extraction, {theirs.cpu / ours.cpu:.1f} x end to end")
    print(f"largest ratio of residual norms, ours to theirs: {max(norms):.5f}; mean {sum(norms) / len(norms):.5f}")


def residuals(base: Path, policy: Path, lora: Path, adapter: Path) -> list[float]:
    """For every module the norm of what ours leaves of the task vector, over that of what mergekit's leaves."""
    from peft_hoe.experts.checkpoints import Checkpoint

    before, after, theirs, ours = (Checkpoint(path, path.name) for path in (base, policy, lora, adapter))
    ratios = []
    for name in (name for name in before.names if "_proj" in name):
        delta = after.tensor(name).float() - before.tensor(name).float()
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        left = [
            float((delta - store.tensor(f"{stem}.{b}").float() @ store.tensor(f"{stem}.{a}").float()).norm())
            for store, b, a in ((theirs, "lora_B.weight", "lora_A.weight"), (ours, "hoe_B.weight", "hoe_A.weight"))
        ]
        ratios.append(left[1] / left[0])
    return ratios


def memory(arguments: argparse.Namespace) -> None:
    """Peak memory of builds of more and more layers, of one policy."""
    rows = []
    for layers in (32, 16, 8, 4):  # the largest first: the others share its files
        usage = build(arguments.work, layers, 1, r=RANK, pruning=None, experts=[])
        size = sum(file.stat().st_size for file in (arguments.work / "adapter").iterdir())
        rows.append(
            [
                str(layers),
                f"{usage.cpu:.0f}",
                f"{usage.anonymous / GIB:.3f}",
                f"{usage.resident / GIB:.3f}",
                f"{size / GIB:.3f}",
            ]
        )
        print(rows[-1], file=sys.stderr, flush=True)
    print(markdown(["layers", "CPU s", "anonymous GiB", "resident GiB", "adapter GiB"], rows))


def whole(arguments: argparse.Namespace) -> None:
    """TinyLlama's 22 layers, two policies and one merged expert."""
    layers = arguments.layers or 22
    usage = build(arguments.work, layers, 2, r=RANK)
    size = sum(file.stat().st_size for file in (arguments.work / f"base-{layers}").iterdir())
    print(markdown(
        ["layers", "CPU s", "wall s", "anonymous GiB", "resident GiB", "read by calls, in checkpoints of this size"],
        [[str(layers), f"{usage.cpu:.0f}", f"{usage.wall:.0f}", f"{usage.anonymous / GIB:.2f}", f"{usage.resident / GIB:.2f}",
          f"{usage.read / size:.2f}"]],
    ))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["svd", "extract", "memory", "whole"])
    parser.add_argument("--shared", type=Path, help="svd: folder with models/, for the real policies")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="svd: how many of the shapes, smallest first")
    parser.add_argument("--work", type=Path, help="folder for checkpoints and adapters")
    parser.add_argument("--mergekit", type=Path, help="extract: the program, in an environment of its own")
    parser.add_argument("--layers", type=int, help="extract: default 8; whole: default 22")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    {"svd": svd, "extract": extract, "memory": memory, "whole": whole}[arguments.part](arguments)


if __name__ == "__main__":
    main()
