"""The examples run as they stand, on fewer prompts and updates."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", [arguments[0], *arguments[1:]])
    runpy.run_path(str(EXAMPLES / arguments[0]), run_name="__main__")


@pytest.mark.slow
def test_steering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, tmp_path, "steer.py", "--prompts", "6")
    printed = capsys.readouterr().out
    assert "{'cheerful': 0.25, 'vivid': 0.75}" in printed
    assert "hypervolume" in printed
    assert sorted(path.name for path in (tmp_path / "steered").iterdir()) == ["adapter", "front.png"]


def test_training_a_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trl")
    run(monkeypatch, tmp_path, "train_policy.py", "--updates", "1")
    assert "update 1 of 1: cheerful " in capsys.readouterr().out
    assert (tmp_path / "mixture" / "adapter_config.json").is_file()


@pytest.mark.slow
def test_training_routers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, tmp_path, "train_router.py", "--updates", "1", "--batch-size", "8")
    printed = capsys.readouterr().out
    assert all(f"router {name!r}: hypervolume around it" in printed for name in ("r0", "r1"))
    config = json.loads((tmp_path / "trained" / "adapter_config.json").read_text())
    helped = [router["name"] for router in config["routers"] if router["trained"]]  # perhaps none after one update
    assert f"trained {helped}, the others did not help; saved in trained" in printed
