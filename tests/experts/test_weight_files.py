"""Files of weights against the libraries that wrote them."""

from __future__ import annotations

import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_hoe.experts import build_adapter
from peft_hoe.experts.module_work import ModuleWork
from peft_hoe.experts.weight_files import FILE_ERRORS, SafetensorsFile, open_file

KINDS = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


def tensors():
    generator = torch.Generator().manual_seed(0)
    found = {str(kind): (torch.rand(7, 5, 3, generator=generator) * 100).to(kind) for kind in KINDS}
    return {**found, "scalar": torch.tensor(4.0), "vector": torch.arange(9.0), "nothing": torch.zeros(0, 4)}


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_every_tensor_and_any_of_its_rows_is_what_was_saved(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    saved = tensors()
    (save_file if suffix == ".safetensors" else torch.save)(saved, path)
    file = open_file(path)
    assert set(file.names) == set(saved)
    for name, tensor in saved.items():
        file.expect(name)
        assert (file.shape(name), file.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
        for start, stop in ((0, 7), (2, 4), (6, 99), (3, 3)):
            expected = tensor[start:stop] if tensor.ndim else tensor
            found = file.rows(name, start, stop)
            assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
            assert torch.equal(found.double(), expected.double())


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system cannot be asked")
def test_what_is_expected_is_read_ahead_by_a_copy_in_another_process_too(tmp_path, monkeypatch):
    save_file({"a": torch.ones(30), "b": torch.ones(50)}, tmp_path / "x.safetensors")
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda number, start, length, advice: asked.append((length, advice)))
    open_file(tmp_path / "x.safetensors").expect("b")
    copy = pickle.loads(pickle.dumps(open_file(tmp_path / "x.safetensors")))
    copy.expect("a")  # nothing had been read there, and nothing was asked for
    assert asked == [(200, os.POSIX_FADV_WILLNEED), (120, os.POSIX_FADV_WILLNEED)]
    gone = pickle.loads(pickle.dumps(copy))
    (tmp_path / "x.safetensors").unlink()
    gone.expect("a")
    with pytest.raises(FILE_ERRORS, match="No such file"):
        gone.rows("a", 0, 1)


def test_while_a_module_is_computed_the_next_is_read_ahead(llama, policies, tmp_path, monkeypatch):
    seen, expect, make = [], SafetensorsFile.expect, ModuleWork.make
    monkeypatch.setattr(SafetensorsFile, "expect", lambda file, name: seen.append(name) or expect(file, name))
    monkeypatch.setattr(ModuleWork, "make", lambda work, index, *rest: seen.append(index) or make(work, index, *rest))
    build_adapter(llama, policies, tmp_path / "out", r=2, pruning=None, progress=False)
    order = [name for name in seen if isinstance(name, str)]
    modules = list(dict.fromkeys(order))
    assert order == [name for name in modules for _ in range(3)]  # the base's and both policies'
    assert seen[:4] == [0, *[modules[0]] * 3]
    assert [i for i, item in enumerate(seen) if item == 1] == [4]
    assert len(modules) == 6  # of seven, the first is not expected


def test_what_is_read_is_memory_of_its_own(tmp_path):
    save_file({"a": torch.ones(3)}, tmp_path / "x.safetensors")
    file = open_file(tmp_path / "x.safetensors")
    file.rows("a", 0, 3).zero_()
    assert file.rows("a", 0, 3).tolist() == [1, 1, 1]
    assert load_file(tmp_path / "x.safetensors")["a"].tolist() == [1, 1, 1]


def test_a_file_that_is_cut_off_while_it_is_open_is_an_error(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(300), "b": torch.ones(300)}, path)
    file = open_file(path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(FILE_ERRORS, match="the file ends 1000 bytes early"):
        file.rows("b", 0, 300)


def test_a_type_that_is_not_known_is_named(tmp_path, monkeypatch):
    save_file({"a": torch.ones(3)}, tmp_path / "x.safetensors")
    monkeypatch.setattr("peft_hoe.experts.weight_files.DTYPES", {})
    with pytest.raises(ValueError, match="tensor 'a' is of type 'F32'"):
        SafetensorsFile(tmp_path / "x.safetensors").dtype("a")
