"""Directories that are written whole: places that are refused, and what an interruption leaves."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from peft_hoe import CheckpointError, unfinished
from peft_hoe.output_directory import check_output, complete_directory

NAMES = ("README.md", "adapter_config.json", "adapter_model.safetensors", "report.json")


@pytest.fixture
def adapter(tmp_path):
    """What looks like an adapter."""
    (tmp_path / "out").mkdir()
    for name in NAMES:
        (tmp_path / "out" / name).write_text(json.dumps({"peft_type": "HOE"}))
    return tmp_path / "out"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_new_directory_appears_when_it_is_complete(tmp_path):
    os.umask(old := os.umask(0o022))
    with complete_directory(tmp_path / "a" / "new") as building:
        (building / "sub").mkdir()
        (building / "sub" / "file").write_text("x")
        assert not (tmp_path / "a" / "new").exists()
    assert contents(tmp_path / "a") == {"new/sub/file": b"x"}
    assert (tmp_path / "a" / "new").stat().st_mode & 0o777 == 0o777 & ~old
    assert (tmp_path / "a" / "new" / "sub" / "file").stat().st_mode & 0o777 == 0o666 & ~old


def test_only_an_adapter_of_the_type_is_replaced(adapter):
    check_output(adapter, True)
    with pytest.raises(
        CheckpointError, match="holds an adapter of type 'HOE', not 'LORA', so it will not be overwritten"
    ):
        check_output(adapter, True, replaces="LORA")


def test_a_directory_in_the_place_of_a_file_and_a_broken_card_are_refused(adapter):
    (adapter / "README.md").write_text("---\na: [\n---\n")
    with pytest.raises(CheckpointError, match="has a header that is no YAML"):
        check_output(adapter, True, names=NAMES)
    (adapter / "README.md").unlink()
    (adapter / "README.md").mkdir()
    with pytest.raises(CheckpointError, match=r"has a directory 'README.md' where a file will be written"):
        check_output(adapter, True, names=NAMES)


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(unfinished.tempfile, "mkdtemp", full)
    with (
        pytest.raises(CheckpointError, match=r"nothing can be written to '.*out': .*No space left"),
        complete_directory(tmp_path / "out"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def replace_all(adapter, rename, monkeypatch):
    """Give an adapter new files; each move goes through `rename`."""
    with complete_directory(adapter) as building:
        for name in NAMES:
            (building / name).write_text("new")
        monkeypatch.setattr(Path, "rename", rename)


@pytest.mark.parametrize("moves", range(8))
def test_an_interruption_while_files_are_put_in_place_puts_all_of_them_back(adapter, monkeypatch, moves):
    before, real, calls = contents(adapter), Path.rename, []

    def rename(path, target):
        calls.append(path)
        if len(calls) == moves + 1:
            raise KeyboardInterrupt
        return real(path, target)

    with pytest.raises(KeyboardInterrupt):
        replace_all(adapter, rename, monkeypatch)
    assert contents(adapter) == before


@pytest.mark.parametrize("moves", range(1, 8))
def test_a_kill_while_files_are_put_in_place_leaves_no_adapter_of_two_builds(adapter, monkeypatch, moves):
    # The configuration is taken away first and comes last, so that nothing loads what does not belong together.
    real, calls, seen = Path.rename, [], []

    def rename(path, target):
        if len(calls) == moves:
            seen.append(contents(adapter))
        calls.append(path)
        return real(path, target)

    replace_all(adapter, rename, monkeypatch)
    assert len(calls) == 8
    assert "adapter_config.json" not in seen[0]
    assert {(adapter / name).read_text() for name in NAMES} == {"new"}
