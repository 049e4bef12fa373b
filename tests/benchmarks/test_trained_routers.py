"""Routers that a benchmark keeps, and puts back into an adapter of the same experts."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
NAMES = [f"base_model.model.m{k}.{part}.weight" for k in range(3) for part in ("hoe_A", "hoe_B", "hoe_router")]


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("trained_routers")


def adapter(folder: Path, experts: int, routers: int) -> Path:
    """An adapter's file: experts drawn by one seed, routers by another."""
    drawn = {True: torch.Generator().manual_seed(routers), False: torch.Generator().manual_seed(experts)}
    folder.mkdir()
    tensors = {name: torch.randn(4, 8, generator=drawn["hoe_router" in name]) for name in NAMES}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_what_was_kept_is_put_back(kept, tmp_path):
    trained, untrained = adapter(tmp_path / "trained", 0, 1), adapter(tmp_path / "untrained", 0, 2)
    path = tmp_path / "routers.safetensors"
    kept.keep_routers(trained, path)
    assert sorted(load_file(path)) == [name for name in sorted(NAMES) if "hoe_router" in name]
    kept.restored(untrained, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()  # without its record nothing is known of its training
    path.with_suffix(".json").write_text('{"updates": 60}')
    kept.restored(untrained, path, tmp_path / "out")
    found, wanted = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "out", trained))
    assert all(torch.equal(found[name], wanted[name]) for name in NAMES)
    assert (tmp_path / "out" / "training.json").read_text() == '{"updates": 60}'


def test_routers_of_other_experts_are_refused(kept, tmp_path):
    path = tmp_path / "routers.safetensors"
    kept.keep_routers(adapter(tmp_path / "trained", 0, 1), path)
    path.with_suffix(".json").write_text("{}")
    with pytest.raises(ValueError, match="routers of other experts"):
        kept.restored(adapter(tmp_path / "other", 3, 2), path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
