"""What a build costs: the truncated SVD, a policy against mergekit-extract-lora, memory by layers, TinyLlama as a whole, what
`peft-hoe plan` says of a 7B and a 70B, builds that are killed, and an adapter that grows and shrinks.

    OMP_NUM_THREADS=1 python benchmarks/build.py all --work DIR --shared DIR --mergekit ENVIRONMENT/bin/mergekit-extract-lora
    OMP_NUM_THREADS=1 python benchmarks/build.py svd --work DIR --shared DIR
    OMP_NUM_THREADS=1 python benchmarks/build.py extract --work DIR --mergekit ENVIRONMENT/bin/mergekit-extract-lora
    OMP_NUM_THREADS=1 python benchmarks/build.py memory --work DIR
    OMP_NUM_THREADS=1 python benchmarks/build.py whole --work DIR
    OMP_NUM_THREADS=1 python benchmarks/build.py plan --work DIR
    OMP_NUM_THREADS=1 python benchmarks/build.py kills --work DIR
    OMP_NUM_THREADS=1 python benchmarks/build.py grow --work DIR --shared DIR

`all` is the parts one after the other; each says first how long it will take. What was measured is kept in `--work` and
not measured again by the same command, so that a run that was stopped goes on; `--again` measures anew. mergekit needs an own
environment: `python -m venv ENVIRONMENT && ENVIRONMENT/bin/pip install mergekit==0.1.5`. Checkpoints are generated in `--work`
(`generated_llama.py`, some 13 GB in all) and found there again. Seconds are those of the CPU, which a busy machine hardly
changes; ratios are of one run. Each part prints a table; `extract` and `whole` also print what follows for a 7B and a 70B, on
one core from what was measured and on one GPU by arithmetic alone (`larger_models.py`). `kills` and `grow` are `kills.py` and
`grow_adapter.py`.
`--shapes 1 --layers 1 --kills 1 --prompts 2` tries everything in some 5 CPU minutes, and measures nothing of use.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from fronts_tables import markdown
from kept_records import Records
from larger_models import MODELS
from measured_builds import RANK, extract, memory, whole
from measured_process import run
from peft_hoe.experts.svd import truncated_svd

HERE = Path(__file__).resolve().parent
SHAPES = ((1024, 1024), (2048, 2048), (4096, 4096), (4096, 11008))
# Seconds on one core of the machine of docs/measurements/build_cost.md, to know when to come back
EXPECTED = {"svd": 240, "extract": 300, "memory": 420, "whole": 210, "plan": 30, "kills": 240, "grow": 60}


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
        rows.append(
            [
                f"{len(shares)} modules",
                "real, r = 16",
                "",
                "",
                "",
                f"at least {math.floor(1e6 * min(shares)) / 1e4} %",
                "",
            ]
        )
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


# -- what other programs print -----------------------------------------------------------------------------------------


def plan(arguments: argparse.Namespace, records: Records) -> None:
    """`peft-hoe plan` of a 7B and a 70B of which only configurations are there, and what that takes itself."""
    for model in MODELS:
        folder = arguments.work / f"only-config-{model.layers}"
        settings = LlamaConfig(
            hidden_size=model.linear[0][0], intermediate_size=model.linear[-1][0], num_hidden_layers=model.layers,
            num_attention_heads=model.linear[0][0] // 128, num_key_value_heads=model.linear[2][0] // 128, vocab_size=128256,
            tie_word_embeddings=False, dtype="bfloat16", architectures=["LlamaForCausalLM"],
        )  # fmt: skip
        for name in ("base", "a", "b"):
            settings.save_pretrained(folder / name)
        policies = ["--policy", f"a={folder / 'a'}", "--policy", f"b={folder / 'b'}"]
        command = [sys.executable, "-m", "peft_hoe.cli", "plan", str(folder / "base"), *policies, "--rank", str(RANK)]
        usage = records.usage(f"plan of {model.layers} layers", lambda command=command: run(command))
        text = records.get(f"plan of {model.layers} layers, its text", lambda command=command: said(command))
        print(f"{model.name}, planned in {usage.cpu:.1f} CPU s, imports included:\n\n{text}")


def kills(arguments: argparse.Namespace, records: Records) -> None:
    """`kills.py`."""
    wanted = str(arguments.kills)
    command = [sys.executable, str(HERE / "kills.py"), "--work", str(arguments.work), "--kills", wanted]
    print(records.get(f"{wanted} kills", lambda: said(command)))


def grow(arguments: argparse.Namespace, records: Records) -> None:
    """`grow_adapter.py`."""
    prompts = str(arguments.prompts)
    command = [sys.executable, str(HERE / "grow_adapter.py"), "--shared", str(arguments.shared), "--prompts", prompts]
    print(records.get(f"grow on {prompts} prompts", lambda: said(command)))


def said(command: list[str]) -> str:
    """What a program prints; what it says of its progress and errors is shown.

    Raises:
        SystemExit: it failed.
    """
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if found.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{found.stdout}")
    return found.stdout


PARTS = {
    "svd": svd, "extract": extract, "memory": memory, "whole": whole, "plan": plan, "kills": kills, "grow": grow,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["all", *PARTS])
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for checkpoints, adapters and what was measured"
    )
    parser.add_argument("--shared", type=Path, help="svd, grow: folder with models/ and data/, for the real policies")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="svd: how many of the shapes, smallest first")
    parser.add_argument("--mergekit", type=Path, help="extract: the program, in an environment of its own")
    parser.add_argument(
        "--layers", type=int, help="extract: default 8; whole: default 22; memory: of the smallest, default 4"
    )
    parser.add_argument("--kills", type=int, default=20, help="kills: how many (default 20)")
    parser.add_argument("--prompts", type=int, default=60, help="grow: how many (default 60)")
    parser.add_argument("--again", action="store_true", help="measure anew what was measured")
    arguments = parser.parse_args()
    chosen = list(PARTS) if arguments.part == "all" else [arguments.part]
    if "extract" in chosen and not (arguments.mergekit and arguments.mergekit.is_file()):
        parser.error("extract needs --mergekit ENVIRONMENT/bin/mergekit-extract-lora")
    if "grow" in chosen and not arguments.shared:
        parser.error("grow needs --shared DIR")
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
