"""What a build costs: the truncated SVD, a policy against mergekit-extract-lora, memory by layers, and TinyLlama as a whole.

    OMP_NUM_THREADS=1 python benchmarks/build.py all --work DIR --shared DIR --mergekit ENVIRONMENT/bin/mergekit-extract-lora
    OMP_NUM_THREADS=1 python benchmarks/build.py svd --work DIR --shared DIR
    OMP_NUM_THREADS=1 python benchmarks/build.py extract --work DIR --mergekit ENVIRONMENT/bin/mergekit-extract-lora
    OMP_NUM_THREADS=1 python benchmarks/build.py memory --work DIR
    OMP_NUM_THREADS=1 python benchmarks/build.py whole --work DIR

`all` is the four parts one after the other; each says first how long it will take. What was measured is kept in `--work` and
not measured again by the same command, so that a run that was stopped goes on; `--again` measures anew. mergekit needs an own
environment: `python -m venv ENVIRONMENT && ENVIRONMENT/bin/pip install mergekit==0.1.5`. Checkpoints are generated in `--work`
(`generated_llama.py`) and found there again. Seconds are those of the CPU, which a busy machine hardly changes; ratios are of
one run. Each part prints a table; `extract` and `whole` also print what follows for a 7B and a 70B.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
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
LAYER = 44.04e6  # weights in scope of one generated layer
MODELS = {"7B (32 layers, width 4096)": 6.476e9, "70B (80 layers, width 8192)": 68.45e9}  # Llama's weights in scope
# Seconds on one core of the machine of docs/measurements/build_cost.md, to know when to come back
EXPECTED = {"svd": 240, "extract": 300, "memory": 150, "whole": 210}


class Records:
    """What was measured so far, by name, in a folder.

    Args:
        folder: where they lie.
        again: whether those that are there are dropped.
    """

    def __init__(self, folder: Path, again: bool) -> None:
        self._folder = folder
        if again:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """What `measure` returns, in JSON types; from the record where there is one."""
        path = self._folder / f"{name}.json"
        if not path.is_file():
            print(f"{name} ...", file=sys.stderr, flush=True)
            fresh = path.with_suffix(".new")
            fresh.write_text(json.dumps(measure()))
            fresh.rename(path)
        return json.loads(path.read_text())

    def usage(self, name: str, measure: Callable[[], Usage]) -> Usage:
        """The same of a process."""
        return Usage(**self.get(name, lambda: asdict(measure())))


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


def svd(arguments: argparse.Namespace, records: Records) -> None:
    """Every shape and spectrum against the full decomposition, and every module of the real policies."""
    rows = []
    for shape in SHAPES[: arguments.shapes]:
        for name, make_matrix in (
            ("k^-0.7", lambda shape=shape: spectrum(*shape, 0.7)),
            ("flat", lambda shape=shape: torch.randn(shape, generator=torch.Generator().manual_seed(0))),
        ):
            found = records.get(
                f"svd {shape[0]} x {shape[1]} {name}", lambda make_matrix=make_matrix: against_full(make_matrix(), RANK)
            )
            full, ours, share, how = found
            rows.append([
                f"{shape[0]} x {shape[1]}", name, f"{full:.2f}", f"{ours:.3f}", f"{full / ours:.1f}", f"{share:.3%}", how,
            ])  # fmt: skip
    if arguments.shared:
        shares = records.get(
            "svd real policies", lambda: [against_full(delta, 16)[2] for delta in real_task_vectors(arguments.shared)]
        )
        rows.append([f"{len(shares)} modules", "real, r = 16", "", "", "", f"at least {min(shares):.4%}", ""])
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
        return [asdict(theirs), asdict(ours), residuals(base, policy, work / "lora", work / "adapter")]

    *usages, norms = records.get(f"extract {layers} layers", both)
    theirs, ours = (Usage(**usage) for usage in usages)
    defaults = records.usage(f"extract {layers} layers defaults", lambda: build(work, layers, 2, r=RANK))
    rows = [
        row("mergekit-extract-lora", theirs, their_imports),
        row("build_adapter, like for like", ours, imports),
        row(f"build_adapter, defaults, two policies and a merged expert, r = {RANK}", defaults, imports),
    ]
    print(markdown(["", "CPU s", "without imports", "resident GiB", "anonymous GiB"], rows))
    extraction = (theirs.cpu - their_imports.cpu) / (ours.cpu - imports.cpu)
    print(f"\nlike for like: {extraction:.1f} x in extraction, {theirs.cpu / ours.cpu:.1f} x end to end")
    print(f"largest ratio of residual norms, ours to theirs: {max(norms):.5f}; mean {sum(norms) / len(norms):.5f}")
    extrapolate("like for like", ours.cpu - imports.cpu, layers)
    extrapolate("defaults, two policies and a merged expert", defaults.cpu - imports.cpu, layers)


def extrapolate(name: str, seconds: float, layers: int) -> None:
    """Time grows with the weights in scope at a fixed rank."""
    each = seconds / (LAYER * layers)
    larger = "; ".join(f"{model}: {each * weights / 60:.1f} min" for model, weights in MODELS.items())
    print(
        f"{name}: {seconds:.1f} s / {LAYER * layers / 1e6:.0f} million weights = {each * 1e9:.0f} ns each. On one core {larger}"
    )


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


def memory(arguments: argparse.Namespace, records: Records) -> None:
    """Peak memory of builds of more and more layers, of one policy."""
    rows = []
    for layers in [
        count * (arguments.layers or 4) for count in (8, 4, 2, 1)
    ]:  # the largest first: the others share its files

        def measure(layers: int = layers) -> list[Any]:
            usage = build(arguments.work, layers, 1, r=RANK, pruning=None, experts=[])
            return [asdict(usage), sum(file.stat().st_size for file in (arguments.work / "adapter").iterdir())]

        found, size = records.get(f"memory {layers} layers", measure)
        usage = Usage(**found)
        rows.append([
            str(layers), f"{usage.cpu:.0f}", f"{usage.anonymous / GIB:.3f}", f"{usage.resident / GIB:.3f}", f"{size / GIB:.3f}",
        ])  # fmt: skip
    print(markdown(["layers", "CPU s", "anonymous GiB", "resident GiB", "adapter GiB"], rows[::-1]))


def whole(arguments: argparse.Namespace, records: Records) -> None:
    """TinyLlama's 22 layers, two policies and one merged expert."""
    layers = arguments.layers or 22
    usage = records.usage(f"whole {layers} layers", lambda: build(arguments.work, layers, 2, r=RANK))
    size = sum(file.stat().st_size for file in (arguments.work / f"base-{layers}").iterdir())
    print(markdown(
        ["layers", "CPU s", "wall s", "anonymous GiB", "resident GiB", "read by calls, in checkpoints of this size"],
        [[str(layers), f"{usage.cpu:.0f}", f"{usage.wall:.0f}", f"{usage.anonymous / GIB:.2f}", f"{usage.resident / GIB:.2f}",
          f"{usage.read / size:.2f}"]],
    ))  # fmt: skip
    extrapolate("defaults, two policies and a merged expert", usage.cpu - our_imports(records).cpu, layers)


PARTS = {"svd": svd, "extract": extract, "memory": memory, "whole": whole}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["all", *PARTS])
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for checkpoints, adapters and what was measured"
    )
    parser.add_argument("--shared", type=Path, help="svd: folder with models/, for the real policies")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="svd: how many of the shapes, smallest first")
    parser.add_argument("--mergekit", type=Path, help="extract: the program, in an environment of its own")
    parser.add_argument(
        "--layers", type=int, help="extract: default 8; whole: default 22; memory: of the smallest, default 4"
    )
    parser.add_argument("--again", action="store_true", help="measure anew what was measured")
    arguments = parser.parse_args()
    chosen = list(PARTS) if arguments.part == "all" else [arguments.part]
    if "extract" in chosen and not (arguments.mergekit and arguments.mergekit.is_file()):
        parser.error("extract needs --mergekit ENVIRONMENT/bin/mergekit-extract-lora")
    torch.set_num_threads(1)
    expected = ", ".join(f"{part} {EXPECTED[part] / 60:.0f} min" for part in chosen)
    print(f"expected on one core, with generating checkpoints: {expected}", file=sys.stderr, flush=True)
    for part in chosen:
        started = time.monotonic()
        print(f"\n## {part}\n", flush=True)
        PARTS[part](arguments, Records(arguments.work / "records" / part, arguments.again))
        print(f"{part}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
