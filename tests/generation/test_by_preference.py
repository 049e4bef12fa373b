"""Rows of different preferences, together or one preference at a time: the same results in the rows' order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from peft_hoe import PreferenceError, RowsError
from peft_hoe.generation.by_preference import by_preference, joined

PREFERENCES = np.array([[0.5, 0.5], [1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])


def test_rows_come_back_in_their_order() -> None:
    calls = []

    def call(rows: Any, wanted: Any) -> list[str]:
        calls.append((rows.tolist(), wanted.ndim))
        if wanted.ndim == 2 and refused:
            raise RowsError("rows are not samples here")
        return [f"{row} {np.broadcast_to(wanted, (len(rows), 2))[i, 0]}" for i, row in enumerate(rows)]

    expected = ["0 0.5", "1 1.0", "2 0.5", "3 0.0"]
    refused = False
    assert by_preference(call, PREFERENCES, joined) == (expected, True)
    refused = True
    assert by_preference(call, PREFERENCES, joined) == (expected, False)
    assert calls[1:] == [([0, 1, 2, 3], 2), ([3], 1), ([0, 2], 1), ([1], 1)]
    calls.clear()
    assert by_preference(call, PREFERENCES, joined, mixed=False) == (expected, False)
    assert len(calls) == 3


def test_other_errors_about_preferences_are_no_reason_to_try_again() -> None:
    def call(rows: Any, wanted: Any) -> list[str]:
        raise PreferenceError("not a point of the simplex")

    with pytest.raises(PreferenceError, match="simplex"):
        by_preference(call, PREFERENCES, joined)
