"""The script for a GPU runs on the CPU, without a warning, and loses nothing where a part of it fails."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("psutil")
    pytest.importorskip("transformers", "5.0")  # with older ones nothing is measured
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu")


def run(gpu, monkeypatch, output, *options):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--rounds", "1", "--output", str(output), *options])
    gpu.main()
    return json.loads(output.read_text())["parts"]


@pytest.mark.slow
def test_each_variant_of_eager_mode_is_measured(gpu, monkeypatch, tmp_path):
    parts = run(gpu, monkeypatch, tmp_path / "parts.json", "--only", "eager")
    assert list(parts) == ["launches", "decode", "prefill", "prefill, batch"]
    assert all(tuple(each) == gpu.VARIANTS for each in parts.values())
    launched = parts["launches"]
    modules = 7 * gpu.TINY.layers
    assert (launched["LoRA"] - launched["base"]) / modules == 4
    assert (launched["HoE, static"] - launched["base"]) / modules == 6  # two stretches of experts


@pytest.mark.slow
def test_a_part_that_fails_does_not_stop_the_others(gpu, monkeypatch, tmp_path, capsys):
    def fails(*_):
        raise MemoryError

    for part in ("eager", "compiled", "training"):
        monkeypatch.setattr(gpu, part, fails)
    output = tmp_path / "parts.json"
    with pytest.raises(SystemExit, match="not measured: eager, compiled, training"):
        run(gpu, monkeypatch, output)
    assert list(json.loads(output.read_text())["parts"]) == ["graph decode"]
    assert "MemoryError" in capsys.readouterr().err
