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


def index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("name", ["x.bin", "x.pt", "x"])
def test_an_index_of_safetensors_that_names_a_pickle_is_refused_unless_pickles_are_allowed(tmp_path, name):
    # It was unpickled without being asked for.
    torch.save({"a": torch.ones(2)}, tmp_path / name)
    index(tmp_path, {"a": name})
    with pytest.raises(CheckpointError, match=f"names the file '{name}', which would be unpickled.*--allow-pickle"):
        Checkpoint(tmp_path, "policy 'x'")
    assert Checkpoint(tmp_path, "policy 'x'", allow_pickle=True).tensor("a").tolist() == [1, 1]


@pytest.mark.parametrize("allow_pickle", [False, True])
@pytest.mark.parametrize(
    "place", ["../elsewhere/{}", "{root}/elsewhere/{}", "sub/../../elsewhere/{}", "link/{}", "C:{}"]
)
@pytest.mark.parametrize("name", ["x.safetensors", "x.bin"])
def test_an_index_that_leads_out_of_its_folder_is_always_refused(tmp_path, place, name, allow_pickle):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "here" / "sub").mkdir(parents=True)
    (tmp_path / "here" / "link").symlink_to(tmp_path / "elsewhere")
    save_file({"a": torch.ones(2)}, tmp_path / "elsewhere" / "x.safetensors")
    torch.save({"a": torch.ones(2)}, tmp_path / "elsewhere" / "x.bin")
    index(tmp_path / "here", {"a": place.format(name, root=tmp_path)})
    with pytest.raises(CheckpointError, match="but an index may name files in its own folder only"):
        Checkpoint(tmp_path / "here", "policy 'x'", allow_pickle=allow_pickle)


def test_shards_that_are_links_out_of_the_folder_are_read_as_the_hubs_cache_has_them(tmp_path):
    (tmp_path / "snapshot").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "blob")
    (tmp_path / "snapshot" / "model-1.safetensors").symlink_to("../blob")
    index(tmp_path / "snapshot", {"a": "model-1.safetensors"})
    assert Checkpoint(tmp_path / "snapshot", "the base").names == ["a"]


def test_an_index_decides_between_shards_and_promises_no_more_than_they_have(tmp_path):
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "1.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "2.safetensors")
    for shard, expected in (("1.safetensors", [1, 1]), ("2.safetensors", [0, 0])):
        index(tmp_path, {"a": shard, "b": "1.safetensors"})
        assert Checkpoint(tmp_path, "the base").tensor("a").tolist() == expected
    index(tmp_path, {"a": "1.safetensors", "b": "2.safetensors", "c": "2.safetensors"})
    with pytest.raises(CheckpointError, match=r"2.safetensors lacks 2 of the tensors .*, such as 'b'") as caught:
        Checkpoint(tmp_path, "the base")
    assert (caught.value.path, caught.value.tensor) == (str(tmp_path / "2.safetensors"), "b")


@pytest.mark.parametrize("weight_map", [None, {}, [], {"a": 1}, {"a": None}])
def test_an_index_without_a_map_is_named(tmp_path, weight_map):
    index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match="has no weight_map of tensors to files"):
        Checkpoint(tmp_path, "the base")


def test_nothing_to_read_is_said(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no weights; expected model.safetensors"):
        Checkpoint(tmp_path, "the base")
    with pytest.raises(CheckpointError, match="'/nowhere' is not a directory"):
        fetch("/nowhere", weights=True)
    with pytest.raises(CheckpointError, match="'nobody/nothing' is neither a directory nor a Hub repository"):
        fetch("nobody/nothing", weights=True)
