"""What refuses a build refuses one that goes on too: nothing half-written under the final name, and what was done is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from peft_hoe import CheckpointError, output_directory
from peft_hoe.experts import build_adapter
from peft_hoe.experts.journal import Journal
from peft_hoe.experts.module_work import ModuleWork
from peft_hoe.experts.weight_writer import WeightWriter

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
SETTINGS = {"r": 2, "progress": False}
MODULES = 7


@pytest.fixture
def stopped(llama, policies, tmp_path, monkeypatch):
    """A function that builds again, after a build that was interrupted when four of seven modules were done."""
    shard(policies["brief"])
    real, made = Journal.add, []

    def interrupt(journal, record):
        made.append(record)
        if len(made) > 4:
            raise KeyboardInterrupt
        return real(journal, record)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build_adapter(llama, policies, tmp_path / "out", **SETTINGS)
    assert len(hidden(tmp_path)) == 1
    return lambda **settings: build_adapter(llama, policies, tmp_path / "out", **{**SETTINGS, **settings})


def shard(folder: Path) -> None:
    """A checkpoint's file as two and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, places = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def hidden(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(".peft_hoe-")]


def of_lora(output: Path) -> None:
    output.mkdir()
    (output / "adapter_config.json").write_text('{"peft_type": "LORA"}')


def of_somebody(output: Path) -> None:
    output.mkdir()
    (output / "thesis.txt").write_text("mine")


OUTPUTS = [
    (lambda output: output.write_text("x"), {}, "is a file; give another path"),
    (lambda output: output.symlink_to(output), {}, "leads nowhere|cannot be used"),
    (of_somebody, {}, "is not empty; give another path, or pass overwrite=True"),
    (of_lora, {"overwrite": True}, "holds an adapter of type 'LORA', not 'HOE', so it will not be overwritten"),
]


@pytest.mark.parametrize(("make", "settings", "message"), OUTPUTS, ids=["file", "link to itself", "somebody's", "LoRA"])
def test_an_output_that_will_not_do_any_more(stopped, tmp_path, monkeypatch, make, settings, message):
    make(tmp_path / "out")
    before = (
        {path: path.read_bytes() for path in (tmp_path / "out").rglob("*")} if (tmp_path / "out").is_dir() else None
    )
    with pytest.raises(CheckpointError, match=message):
        stopped(**settings)
    if before is not None:
        assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*")} == before
    (tmp_path / "out").rename(tmp_path / "away")
    goes_on(stopped, tmp_path, monkeypatch)


def test_a_place_that_has_become_read_only(stopped, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(output_directory.os, "access", lambda path, mode: Path(path) != tmp_path)
        with pytest.raises(CheckpointError, match=r"cannot be written to|is not writable"):
            stopped()
    goes_on(stopped, tmp_path, monkeypatch)


def goes_on(stopped, tmp_path, monkeypatch):
    """When what is in the way has gone, only what is missing is made."""
    made, real = [], ModuleWork.make
    monkeypatch.setattr(ModuleWork, "make", lambda work, index, *rest: made.append(index) or real(work, index, *rest))
    stopped()
    assert made == list(range(4, MODULES))
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("method", ["_write", "finish"])
def test_a_disk_that_is_full_now(stopped, tmp_path, monkeypatch, method):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(WeightWriter, method, full)
        with pytest.raises(CheckpointError, match=r"nothing can be written to '.*out': .*No space left on device"):
            stopped()
    assert not (tmp_path / "out").exists()
    assert hidden(tmp_path) == []  # a full disk is not kept full
    stopped()
    assert (tmp_path / "out" / "adapter_config.json").is_file()


def test_a_journal_that_cannot_be_written_is_said_as_a_full_disk_is(stopped, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Journal, "add", full)
    with pytest.raises(CheckpointError, match=r"nothing can be written to '.*out': .*No space left on device"):
        stopped()
    assert not (tmp_path / "out").exists()


def change_index(folder: Path, place: str) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = {name: place if "up_proj" in name else file for name, file in index["weight_map"].items()}
    path.write_text(json.dumps(index))


INPUTS = [
    (lambda folder: change_index(folder, "../base/model.safetensors"), "index.json.*(outside|leads|folder)"),
    (lambda folder: change_index(folder, "model.bin"), "model.bin.*allow_pickle"),
    (lambda folder: (folder / "model-1.safetensors").unlink(), "model-1.safetensors"),
    (lambda folder: (folder / "model-1.safetensors").write_bytes(b"x" * 40), "model-1.safetensors is not a readable"),
]


@pytest.mark.parametrize(("damage", "message"), INPUTS, ids=["leads out", "pickle", "vanished", "damaged"])
def test_a_source_that_will_not_do_any_more(stopped, policies, tmp_path, damage, message):
    damage(policies["brief"])
    with pytest.raises(CheckpointError, match=message):
        stopped()
    assert not (tmp_path / "out").exists()


def test_a_shard_that_vanishes_while_the_build_goes_on(stopped, policies, tmp_path, monkeypatch):
    real = ModuleWork.make

    def make(work, index, *rest):
        for file in policies["brief"].glob("model-*.safetensors"):
            file.write_bytes(b"")  # whoever has it open reads nothing either
            file.unlink()
        return real(work, index, *rest)

    monkeypatch.setattr(ModuleWork, "make", make)
    with pytest.raises(CheckpointError, match=r"policy 'brief': tensor .* cannot be read"):
        stopped()
    assert not (tmp_path / "out").exists()
    assert hidden(tmp_path) == []
