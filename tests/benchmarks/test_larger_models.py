"""The arithmetic of what builds of larger models take."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def larger(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("larger_models")


def test_weights_in_scope_of_llamas(larger):
    """The 70B's keys and values have 8 heads of 128."""
    assert [model.weights for model in larger.MODELS] == [
        32 * (4 * 4096**2 + 3 * 4096 * 11008), 80 * (2 * 8192**2 + 2 * 1024 * 8192 + 3 * 8192 * 28672)
    ]  # fmt: skip


def test_one_core_is_scaled_by_weights(larger):
    said = larger.on_one_core(44.04, 1)
    assert "44 million weights = 1000 ns each. On one core 7B (32 layers, width 4096): 1.8 h" in said  # 6476 s


def test_a_gpu_is_arithmetic_and_says_so(larger):
    said = larger.on_a_gpu(policies=1, experts=1, passes=1, rank=128)
    assert said.startswith("On one GPU, by arithmetic and not measured (assumed: 20 and 10 TFLOP/s")
    # A block is 32 of 288 directions: 9 blocks of three QR, and eigenvalues at 5 and once at the end; 224 times.
    assert f"small decompositions {224 * (27 * 0.001 + 6 * 0.010):.0f} s" in said
    assert f"reading {2 * 2 * 6.476 / 2:.0f} s" in said  # two models, two bytes a weight, 2 GB a second
    slow = larger.AssumedGPU(single=1e9, double=1e30)
    work = 4 * 288 * 6.476e9 + 4 * 288**2 * 224 * 4096  # every layer's smaller side is 4096
    assert f"products {work / 1e9 / 3600:.1f} h" in larger.on_a_gpu(1, 1, 1, 128, slow)
