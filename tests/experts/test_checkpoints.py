from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from peft_hoe import CheckpointError
from peft_hoe.experts.checkpoints import Checkpoint, fetch


def test_shards_are_found_by_their_index(tmp_path):
    save_file({"a": torch.ones(2, 3)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.arange(4.0)}, tmp_path / "model-00002-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = Checkpoint(tmp_path, "the base")
    assert checkpoint.names == ["a", "b"]
    assert checkpoint.shape("a") == (2, 3)
    assert checkpoint.rows("b", 1, 3).tolist() == [1.0, 2.0]
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"the base: .*model-00002-of-00002.safetensors is missing"):
        Checkpoint(tmp_path, "the base")


@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_damaged_files_are_named(tmp_path, damage):
    save_file({"a": torch.ones(64, 64)}, tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    damaged = {"truncated": content[:-100], "text": b"{} not safetensors", "empty": b""}[damage]
    (tmp_path / "model.safetensors").write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"policy 'x': .*model.safetensors is not a readable .safetensors file"):
        Checkpoint(tmp_path, "policy 'x'")


@pytest.mark.parametrize("sharded", [False, True])
def test_pickles_are_read_only_when_asked_for(tmp_path, sharded):
    name = "pytorch_model-00001-of-00001.bin" if sharded else "pytorch_model.bin"
    torch.save({"a": torch.ones(2, 3)}, tmp_path / name)
    if sharded:
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match=r"holds only pickled weights .*--allow-pickle"):
        Checkpoint(tmp_path, "the base")
    checkpoint = Checkpoint(tmp_path, "the base", allow_pickle=True)
    assert checkpoint.shape("a") == (2, 3)
    assert torch.equal(checkpoint.tensor("a"), torch.ones(2, 3))


def test_pickles_cannot_run_code(tmp_path):
    class Payload:
        def __reduce__(self):
            return print, ("executed",)

    torch.save({"a": Payload()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"not a readable .bin file"):
        Checkpoint(tmp_path, "the base", allow_pickle=True)


def test_nothing_to_read_is_said(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no weights; expected model.safetensors"):
        Checkpoint(tmp_path, "the base")
    with pytest.raises(CheckpointError, match="'/nowhere' is not a directory"):
        fetch("/nowhere", weights=True)
    with pytest.raises(CheckpointError, match="'nobody/nothing' is neither a directory nor a Hub repository"):
        fetch("nobody/nothing", weights=True)
