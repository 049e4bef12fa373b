"""Where a build may write, and what it leaves alone there."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from peft_hoe import CheckpointError, output_directory
from peft_hoe.experts import build_adapter, builder, checkpoints, module_work, weight_writer
from peft_hoe.experts.adapter_files import WRITTEN

QUIET = {"progress": False}


@pytest.fixture
def adapter(llama, policies, tmp_path):
    """A built adapter of rank 2."""
    build_adapter(llama, policies, tmp_path / "out", r=2, **QUIET)
    return tmp_path / "out"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def no_work(monkeypatch):
    """From here on a build that reads a policy fails."""

    def fail(*arguments, **options):
        raise AssertionError("the work began")

    monkeypatch.setattr(builder, "open_inputs", fail)


def test_existing_output_needs_overwrite_and_an_adapter_of_hoe(llama, policies, adapter, tmp_path, tiny, monkeypatch):
    build_adapter(llama, policies, adapter, r=4, overwrite=True, **QUIET)
    assert tiny.config(adapter)["r"] == 4
    assert not [path for path in (*adapter.iterdir(), *tmp_path.iterdir()) if path.name.startswith(".")]
    no_work(monkeypatch)
    with pytest.raises(CheckpointError, match="is not empty; give another path, or pass overwrite=True"):
        build_adapter(llama, policies, adapter, r=4, **QUIET)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "x").write_text("x")
    with pytest.raises(CheckpointError, match="holds no adapter, so it will not be overwritten"):
        build_adapter(llama, policies, tmp_path / "letters", overwrite=True, **QUIET)
    (tmp_path / "letters" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(
        CheckpointError, match="holds an adapter of type 'LORA', not 'HOE', so it will not be overwritten"
    ):
        build_adapter(llama, policies, tmp_path / "letters", overwrite=True, **QUIET)


def test_overwriting_touches_nothing_that_no_build_wrote(llama, policies, adapter):
    # It deleted whatever else lay in the folder, a training run's checkpoints among it.
    (adapter / "checkpoint-10").mkdir()
    (adapter / "checkpoint-10" / "optimizer.pt").write_text("x")
    (adapter / "notes.txt").write_text("mine")
    before, folder = contents(adapter), adapter.stat().st_ino
    build_adapter(llama, policies, adapter, r=4, overwrite=True, **QUIET)
    after = contents(adapter)
    assert set(after) == set(before)
    assert {name for name in before if after[name] != before[name]} == set(WRITTEN)
    assert adapter.stat().st_ino == folder


def test_what_else_is_written_on_the_model_card_stays(llama, policies, adapter):
    card = adapter / "README.md"
    card.write_text(card.read_text() + "\nTrained with care.\n")
    build_adapter(llama, policies, adapter, r=5, overwrite=True, **QUIET)
    assert "Trained with care." in card.read_text()
    assert card.read_text().count("## Steering this adapter") == 1
    assert "| kind | 1 | 0 | 5 |" in card.read_text()


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_a_link_and_its_target_gets_the_adapter(llama, policies, tmp_path, exists):
    # The link was replaced by a directory, and the target stayed empty.
    (tmp_path / "link").symlink_to(tmp_path / "real")
    if exists:
        (tmp_path / "real").mkdir()
    for _ in range(2):
        build_adapter(llama, policies, tmp_path / "link", r=2, overwrite=True, **QUIET)
        assert (tmp_path / "link").is_symlink()
        assert set(contents(tmp_path / "real")) == set(WRITTEN)


def test_a_file_that_is_a_link_is_replaced_and_its_target_left_alone(llama, policies, adapter, tmp_path):
    weights = adapter / "adapter_model.safetensors"
    weights.rename(tmp_path / "blob")
    weights.symlink_to(tmp_path / "blob")
    before = (tmp_path / "blob").read_bytes()
    build_adapter(llama, policies, adapter, r=4, overwrite=True, **QUIET)
    assert not weights.is_symlink()
    assert (tmp_path / "blob").read_bytes() == before


@pytest.mark.parametrize("written", [".", "x/..", "../here", "./"])
def test_the_current_directory_by_any_name(llama, policies, tmp_path, monkeypatch, written):
    (tmp_path / "here" / "x").mkdir(parents=True)
    (tmp_path / "here" / "x").rmdir() if written != "x/.." else None
    monkeypatch.chdir(tmp_path / "here")
    if written == "x/..":
        with pytest.raises(CheckpointError, match="is not empty"):
            build_adapter(llama, policies, written, r=2, **QUIET)
        (tmp_path / "here" / "x").rmdir()
    build_adapter(llama, policies, written, r=2, **QUIET)
    assert set(contents(tmp_path / "here")) == set(WRITTEN)
    build_adapter(llama, policies, written, r=4, overwrite=True, **QUIET)


def test_an_existing_directory_is_never_moved(llama, policies, tmp_path, monkeypatch):
    # A mount point cannot be renamed: the error came after the whole build.
    (tmp_path / "volume" / "lost+found").mkdir(parents=True)
    real = Path.rename

    def rename(path, target):
        assert path != tmp_path / "volume"
        assert Path(target) != tmp_path / "volume"
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    for rank in (2, 4):
        build_adapter(llama, policies, tmp_path / "volume", r=rank, overwrite=True, **QUIET)
    assert (tmp_path / "volume" / "lost+found").is_dir()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_text("x"), "is a file; give another path"),
        (lambda path: path.symlink_to(path), "leads nowhere|cannot be used"),
        (
            lambda path: path.parent.joinpath("file").write_text("x") and path.symlink_to("file/out"),
            "lies in the file|used",
        ),
    ],
)
def test_places_that_will_not_do_are_refused_before_the_work(llama, policies, tmp_path, monkeypatch, make, message):
    make(tmp_path / "out")
    no_work(monkeypatch)
    with pytest.raises(CheckpointError, match=message):
        build_adapter(llama, policies, tmp_path / "out", **QUIET)


def test_names_that_are_too_long_are_refused_before_the_work(llama, policies, tmp_path, monkeypatch):
    no_work(monkeypatch)
    with pytest.raises(CheckpointError, match=r"cannot be used: .*File name too long"):
        build_adapter(llama, policies, tmp_path / ("x" * 300), **QUIET)


def test_places_that_cannot_be_written_to_are_refused_before_the_work(llama, policies, tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    monkeypatch.setattr(output_directory.os, "access", lambda path, mode: Path(path) != tmp_path / "closed")
    no_work(monkeypatch)
    for output in (tmp_path / "closed", tmp_path / "closed" / "a" / "new"):
        with pytest.raises(CheckpointError, match=r"cannot be written to|is not writable"):
            build_adapter(llama, policies, output, **QUIET)


def test_a_source_is_never_written_to(llama, policies, adapter):
    # An adapter may have been built into the base's own directory.
    for path in adapter.iterdir():
        path.rename(llama / path.name)
    before = contents(llama)
    with pytest.raises(CheckpointError, match="is a source of this build; give another path"):
        build_adapter(llama, policies, llama, overwrite=True, **QUIET)
    assert contents(llama) == before


def test_a_disk_that_fills_up_is_said_and_leaves_nothing(llama, policies, adapter, tmp_path, monkeypatch):
    written, before = [], contents(adapter)

    def full(writer, tensor):
        written.append(tensor)
        if len(written) > 5:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(weight_writer.WeightWriter, "_write", full)
    for output in (adapter, tmp_path / "new"):
        written.clear()
        with pytest.raises(CheckpointError, match=f"nothing can be written to '{output}': .*No space left on device"):
            build_adapter(llama, policies, output, r=4, overwrite=True, **QUIET)
    assert contents(adapter) == before
    assert not (tmp_path / "new").exists()
    assert not [path for path in (*tmp_path.iterdir(), *adapter.iterdir()) if path.name.startswith(".")]


def test_a_shard_that_is_cut_off_while_it_is_read_is_said_and_leaves_nothing(llama, policies, tmp_path, monkeypatch):
    real, made = module_work.ModuleWork.make, []

    def make(work, index, *rest):
        made.append(index)
        if len(made) == 3:
            (policies["brief"] / "model.safetensors").write_bytes(b"")
        return real(work, index, *rest)

    monkeypatch.setattr(module_work.ModuleWork, "make", make)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(
        CheckpointError, match=r"policy 'brief': tensor .* cannot be read \(the file ends .* bytes early"
    ):
        build_adapter(llama, policies, tmp_path / "out", **QUIET)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_shard_that_another_process_does_not_find_is_said(llama, tmp_path):
    found = pickle.loads(pickle.dumps(checkpoints.Checkpoint(llama, "the base")))
    name = found.names[0]
    (llama / "model.safetensors").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"the base: tensor .* cannot be read \(.*No such file"):
        found.tensor(name)
