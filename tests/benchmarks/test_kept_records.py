"""What a benchmark keeps, so that it goes on where it was stopped."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("kept_records")


def test_what_was_measured_is_not_measured_again_unless_told(kept, tmp_path):
    made: list[int] = []

    def measure() -> list[int]:
        made.append(1)
        return list(made)

    for _ in range(2):
        assert kept.Records(tmp_path / "records", again=False).get("a", measure) == [1]
    assert kept.Records(tmp_path / "records", again=True).get("a", measure) == [1, 1]


def test_a_measurement_that_was_stopped_leaves_no_record(kept, tmp_path):
    records = kept.Records(tmp_path, again=False)
    with pytest.raises(KeyboardInterrupt):
        records.get("a", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert records.get("a", lambda: 3) == 3
