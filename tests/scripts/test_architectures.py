"""Architectures whose layers are reached in ways of their own; `scripts/architectures/run.py` has all of them."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "architectures"
# Conv1D; flattened rows; a flat shared expert beside dispatched ones; an encoder; no attention; pictures, whole and in patches.
SOME = ("GPT-2", "OPT", "Qwen2-MoE", "T5, gated", "Mamba", "Llava", "Qwen2-VL")


@pytest.fixture(scope="module")
def run() -> ModuleType:
    pytest.importorskip("transformers", minversion="5.0", reason="configurations are those of transformers 5")
    sys.path.insert(0, str(SCRIPTS))
    try:
        import run as module
    finally:
        sys.path.remove(str(SCRIPTS))
    return module


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME)
def test_right_or_refused_by_name(run: ModuleType, name: str):
    architecture = run.ARCHITECTURES[name]
    found = {check: run.outcome(architecture, check) for check in run.CHECKS}
    assert {check: said for check, (state, said) in found.items() if state == run.WRONG} == {}
    for check in ("forward", "save, load", "merge", "disable"):
        assert found[check][0] == run.RIGHT
    for state, said in found.values():
        assert state != run.REFUSED or "preference" in said


def test_a_wrong_number_and_a_bare_error_are_told(run: ModuleType, monkeypatch: pytest.MonkeyPatch):
    """A check that could not fail would say nothing about the table."""
    architecture = run.ARCHITECTURES["GPT-2"]
    from peft_hoe import HoELayer

    monkeypatch.setattr(HoELayer, "measure_lengths", lambda *unused: None)  # lengths of no experts: c(w) = 1
    state, said = run.outcome(architecture, "forward")
    assert state == run.WRONG
    assert said.startswith("Wrong: forward: off by")


def test_the_table_names_what_is_refused_once(run: ModuleType):
    cells = {"forward": (run.RIGHT, ""), "rows": (run.REFUSED, "rows are not samples"), "generate": (run.ABSENT, "")}
    lines = run.table({"A": cells, "B": cells})
    assert lines[2:4] == ["| A | ✓ | refused (1) | – |", "| B | ✓ | refused (1) | – |"]
    assert lines[-1] == "1. rows are not samples"
