"""Files that are written as their tensors are made, read back by the library."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file

from peft_hoe.experts.weight_files import SafetensorsFile
from peft_hoe.experts.weight_writer import WeightWriter


def write(path, dtype, tensors, announced=None, others=10_000):
    with WeightWriter(path, dtype, announced or list(tensors), others) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.finish()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_library_reads_what_was_written_whatever_the_dtypes_and_their_order(tmp_path, dtype):
    generator = torch.Generator().manual_seed(0)
    kinds = [dtype, torch.float32, torch.int64, torch.bool, torch.uint8, torch.bfloat16, torch.float64]
    tensors = {  # sizes that leave every alignment
        f"{kind} {i}.ä": (torch.rand(2 * i + 1, 3, generator=generator) * 9).to(kind)
        for i in range(4)
        for kind in kinds
    }
    write(tmp_path / "x.safetensors", dtype, tensors)
    for found in (load_file(tmp_path / "x.safetensors"), load((tmp_path / "x.safetensors").read_bytes())):
        assert set(found) == set(tensors)
        assert all(
            found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in tensors.items()
        )
    ours = SafetensorsFile(tmp_path / "x.safetensors")
    assert all(torch.equal(ours.rows(name, 0, 99), tensor) for name, tensor in tensors.items())
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_tensors_that_were_announced_and_not_added_leave_no_trace(tmp_path):
    tensors = {"a": torch.ones(2, 3), "b": torch.zeros(0, 4), "c": torch.arange(5.0)}
    write(tmp_path / "x.safetensors", torch.float32, tensors, announced=["z" * 500, *"cba", "d"])
    found = load_file(tmp_path / "x.safetensors")
    assert set(found) == {"a", "b", "c"}
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_views_are_written_as_they_are_seen(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    write(tmp_path / "x.safetensors", torch.float32, {"t": whole.T, "part": whole[:, 1:3]})
    found = load_file(tmp_path / "x.safetensors")
    assert torch.equal(found["t"], whole.T)
    assert torch.equal(found["part"], whole[:, 1:3])


def test_the_file_is_no_safetensors_file_before_it_is_finished(tmp_path):
    with WeightWriter(tmp_path / "x.safetensors", torch.float32, ["a"], 0) as writer:
        writer.add("a", torch.ones(1000))
    with pytest.raises(Exception, match=r"(?i)header"):
        load_file(tmp_path / "x.safetensors")


def test_what_was_not_announced_is_refused(tmp_path):
    with WeightWriter(tmp_path / "x.safetensors", torch.float32, ["a", "b"], 0) as writer:
        writer.add("a", torch.ones(3))
        for name in ("a", "other"):
            with pytest.raises(ValueError, match=f"tensor '{name}' was not announced, or is there already"):
                writer.add(name, torch.ones(3))
        writer.add("b", torch.ones(10_000, dtype=torch.float64))  # more than nothing
        with pytest.raises(ValueError, match=r"the header has .* characters, and room is for -"):
            writer.finish()


def test_a_header_of_the_longest_numbers_fits():
    entry = {"dtype": "F8_E4M3", "shape": [10**15] * 3, "data_offsets": [10**18] * 2}
    assert len(json.dumps({"": entry})) < 200
