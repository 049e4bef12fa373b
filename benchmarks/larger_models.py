"""What a build of a 7B and a 70B takes, by arithmetic from what was measured on smaller models; and what a GPU would take.

On one core the time of a build grows with the weights in scope at a fixed rank, because nearly all of it goes to products with
the weights and to reading them. For a GPU nothing is measured: operations and bytes are counted and divided by assumed speeds.
"""

from __future__ import annotations

from dataclasses import dataclass

LAYER = 44.04e6  # weights in scope of one generated layer
DIRECTIONS = 2.25  # of the randomised SVD's space, for each of rank; 288 of rank 128 on spectra k^-0.7 (build.py svd)
WEIGHT_BYTES = 2  # of a checkpoint in bfloat16
TOUCHED = (
    100  # bytes of a GPU's memory read and written for each weight and policy by what has no product in it, generously
)


@dataclass(frozen=True)
class Model:
    """The linear layers `(d_out, d_in)` of a Llama's layer, and how many layers it has."""

    name: str
    layers: int
    linear: tuple[tuple[int, int], ...]

    @property
    def weights(self) -> int:
        """In scope."""
        return self.layers * sum(rows * columns for rows, columns in self.linear)


MODELS = (
    Model("7B (32 layers, width 4096)", 32, ((4096, 4096),) * 4 + ((11008, 4096),) * 3),
    Model("70B (80 layers, width 8192)", 80, ((8192, 8192),) * 2 + ((1024, 8192),) * 2 + ((28672, 8192),) * 3),
)


@dataclass(frozen=True)
class AssumedGPU:
    """Speeds that a build might see of a data-centre GPU: a third to a half of what vendors print."""

    single: float = 20e12  # operations a second in float32, without TensorFloat-32
    double: float = 10e12  # in float64
    memory: float = 1e12  # bytes a second
    reading: float = 2e9  # bytes a second from the disk to the GPU
    eigen: float = 0.010  # seconds of a symmetric eigenproblem of a few hundred rows
    qr: float = 0.001  # seconds of orthonormalising a block

    def said(self) -> str:
        """What is assumed, in a few words."""
        speeds = f"{self.single / 1e12:g} and {self.double / 1e12:g} TFLOP/s in float32 and float64"
        bytes_ = f"{self.memory / 1e12:g} TB/s of memory, {self.reading / 1e9:g} GB/s from the disk"
        return f"assumed: {speeds}, {bytes_}, {1e3 * self.eigen:g} ms for eigenvalues, {1e3 * self.qr:g} ms for a QR"


def on_one_core(seconds: float, layers: int) -> str:
    """Seconds that were measured on so many generated layers, scaled by the weights in scope."""
    each = seconds / (LAYER * layers)
    larger = "; ".join(f"{model.name}: {_duration(each * model.weights)}" for model in MODELS)
    return (
        f"{seconds:.1f} s / {LAYER * layers / 1e6:.0f} million weights = {each * 1e9:.0f} ns each. On one core {larger}"
    )


def on_a_gpu(policies: int, experts: int, passes: int, rank: int, gpu: AssumedGPU = AssumedGPU()) -> str:
    """What one GPU would take. Nothing of it is measured.

    Args:
        policies: full fine-tunes.
        experts: of them, each with a decomposition in each linear layer.
        passes: how often weights in scope are read.
        rank: r.
        gpu: its speeds.
    """
    lines = []
    for model in MODELS:
        products = sum(_svd_operations(rows, columns, rank, gpu) for rows, columns in model.linear)
        parts = {
            "products": model.layers * experts * products,
            "small decompositions": model.layers * len(model.linear) * experts * _small_decompositions(rank, gpu),
            "entry by entry": model.weights * policies * TOUCHED / gpu.memory,
            "reading": model.weights * WEIGHT_BYTES * (policies + 1) * passes / gpu.reading,
        }
        shown = ", ".join(f"{name} {_duration(seconds)}" for name, seconds in parts.items())
        lines.append(f"{model.name}: {_duration(sum(parts.values()))} ({shown})")
    return f"On one GPU, by arithmetic and not measured ({gpu.said()}): " + "; ".join(lines)


def _svd_operations(rows: int, columns: int, rank: int, gpu: AssumedGPU) -> float:
    """Seconds of the products of one decomposition (`experts/krylov.py`), d directions in all.

    In float32 each direction is multiplied by the matrix and by its transpose, and made orthogonal to the others twice; in
    float64 come the inner products of the images, and the triplets at the end.
    """
    smaller, larger = sorted((rows, columns))
    d = DIRECTIONS * rank
    single = 4 * d * rows * columns + 4 * d**2 * smaller
    double = d**2 * larger + 2 * d * rank * larger
    return single / gpu.single + double / gpu.double


def _small_decompositions(rank: int, gpu: AssumedGPU) -> float:
    """Seconds of what a GPU does one after the other in one decomposition: three QR a block, eigenvalues from the rank on."""
    width = min(max(rank // 4, 16), 64)
    blocks = DIRECTIONS * rank / width
    return 3 * blocks * gpu.qr + (blocks - rank / width + 1) * gpu.eigen


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
