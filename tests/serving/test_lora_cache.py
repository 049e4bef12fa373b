from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch

from peft_hoe import HoEError
from peft_hoe.serving.lora_exporter import LoraExporter
from peft_hoe.serving.preference_grid import PreferenceGrid
from peft_hoe.serving.source import adapter_from_files

fcntl = pytest.importorskip("fcntl")
from peft_hoe.serving.lora_cache import LoraCache  # noqa: E402

HOLD = """
import sys
from pathlib import Path
from peft_hoe.serving.lora_cache import LoraCache
from peft_hoe.serving.lora_exporter import LoraExporter
from peft_hoe.serving.preference_grid import PreferenceGrid
from peft_hoe.serving.source import adapter_from_files
exporter = LoraExporter(adapter_from_files(sys.argv[2]))
cache = LoraCache(Path(sys.argv[1]), exporter, PreferenceGrid(["low", "high"], 0.25), 10**9)
print(cache.path([0.5, 0.5]), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def adapter(toys, tmp_path):
    toys.make_policy().save_pretrained(tmp_path / "hoe")
    return tmp_path / "hoe"


def make(folder, adapter, max_bytes=10**9, **options):
    grid = PreferenceGrid(["low", "high"], 0.25)
    return LoraCache(folder, LoraExporter(adapter_from_files(adapter), **options), grid, max_bytes)


def loras(folder):
    return sorted(path.parent.name for path in folder.glob("*/*/adapter_config.json"))


def size_of_one(folder, adapter):
    path = make(folder, adapter).path([1, 0])
    return sum(file.stat().st_size for file in path.iterdir())


def test_a_lora_is_written_once_and_stays(adapter, tmp_path, as_lora, toys, ids):
    cache = make(tmp_path / "cache", adapter)
    path = cache.path([0.75, 0.25])
    written = (path / "adapter_model.safetensors").stat().st_mtime_ns
    assert cache.path([0.75, 0.25]) == path
    assert make(tmp_path / "cache", adapter).path([0.75, 0.25]) == path  # another server, or this one after a restart
    assert (path / "adapter_model.safetensors").stat().st_mtime_ns == written
    model = toys.make_policy()
    with torch.no_grad():
        expected = model(input_ids=ids, preference=[0.75, 0.25]).logits
    torch.testing.assert_close(as_lora(path, ids).float(), expected, atol=1e-4, rtol=0)


def test_another_adapter_or_another_way_to_export_it_has_other_paths(adapter, toys, tmp_path):
    first = make(tmp_path / "cache", adapter).path([0.5, 0.5])
    assert make(tmp_path / "cache", adapter, rank=2).path([0.5, 0.5]) != first
    assert make(tmp_path / "cache", adapter, routers="drop").path([0.5, 0.5]) != first
    toys.make_policy(seed=3).save_pretrained(adapter)
    assert make(tmp_path / "cache", adapter).path([0.5, 0.5]) != first
    assert first.is_dir()


def test_the_least_recently_used_makes_room_and_nobody_loses_what_it_uses(adapter, tmp_path):
    one = size_of_one(tmp_path / "measured", adapter)
    folder = tmp_path / "cache"
    before = make(folder, adapter)
    for number, point in enumerate(([1, 0], [0, 1])):  # of the same rank, so of the same size
        path = before.path(point)
        os.utime(path, (number, number))
    del before  # that server is gone
    cache = make(folder, adapter, max_bytes=int(2.8 * one))
    kept = cache.path([1, 0])  # now the last used, and held
    cache.path([0.5, 0.5])
    assert loras(folder) == ["0.5,0.5", "1,0"]
    with pytest.raises(HoEError, match=r"servers use.*raise the limit"):
        cache.path([0, 1])
    assert kept.is_dir()
    assert loras(folder) == ["0.5,0.5", "1,0"]


@pytest.mark.slow
def test_what_another_process_uses_stays_until_it_ends(adapter, tmp_path):
    one = size_of_one(tmp_path / "measured", adapter)
    folder = tmp_path / "cache"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), str(adapter)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        held = holder.stdout.readline().strip()
        cache = make(folder, adapter, max_bytes=2 * one)
        with pytest.raises(HoEError, match="servers use"):
            cache.path([1, 0])
        holder.kill()  # however it ends
        holder.wait()
        deadline = time.monotonic() + 30
        while True:
            try:
                path = cache.path([1, 0])
                break
            except HoEError:
                assert time.monotonic() < deadline
        assert path.is_dir()
        assert not os.path.isdir(held)
    finally:
        holder.kill()
        holder.communicate()


def test_an_adapter_in_memory_has_no_files_to_be_known_by(toys, tmp_path):
    from peft_hoe.serving.source import adapter_from_model

    cache = LoraCache(
        tmp_path, LoraExporter(adapter_from_model(toys.make_policy())), PreferenceGrid(["low", "high"], 0.25), 1
    )
    with pytest.raises(HoEError, match="save it first"):
        cache.path([1, 0])
