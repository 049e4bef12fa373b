"""README's snippet runs as it stands and prints what README shows; its picture can be drawn again."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def block(mark: str) -> str:
    """The code block that follows a comment."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    match = re.search(rf"^<!-- {mark} -->\n```\w+\n(.*?)^```$", text, re.M | re.S)
    assert match, f"README.md has no block after <!-- {mark} -->"
    return match[1]


@pytest.mark.slow
def test_the_snippet_prints_what_readme_shows(tmp_path: Path) -> None:
    found = subprocess.run([sys.executable, "-c", block("snippet")], cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout == block("snippet-output")
    assert [path.name for path in tmp_path.iterdir()] == ["my-adapter"]


def test_commands_of_the_checks_are_there() -> None:
    """`.ci/run` takes them from README."""
    assert block("demo-command").split() == ["make", "demo"]
    assert block("test-command").split() == ["make", "test"]


@pytest.mark.slow
def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("moocore")
    script = [sys.executable, str(ROOT / "scripts" / "draw_front.py"), "--prompts", "4"]
    subprocess.run([*script, "--output", str(tmp_path / "front.png")], check=True, capture_output=True)
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
