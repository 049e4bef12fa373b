"""Errors carry what their text says as attributes, and travel between processes."""

from __future__ import annotations

import pickle

import pytest

from peft_hoe import CheckpointError, HoEError, StaticMergeError
from peft_hoe.errors import RowsError, check_choice


@pytest.mark.parametrize(
    ("error", "data"),
    [
        (HoEError("no", argument="r", value=0, allowed="at least 1"), ("argument", "value", "allowed")),
        (CheckpointError("no", path="a/b", tensor="t", value=1), ("path", "tensor", "value")),
        (StaticMergeError("no", module="m", routers=["r0"]), ("module", "routers")),
        (RowsError("no", module="m", shape=(2, 3)), ("module", "shape")),
        (CheckpointError("a text alone"), ("path", "tensor", "argument")),
    ],
)
def test_attributes_survive_pickling(error, data):
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert [getattr(again, name) for name in data] == [getattr(error, name) for name in data]


def test_what_an_error_does_not_know_is_none():
    error = CheckpointError("no")
    assert {error.argument, error.value, error.allowed, error.path, error.tensor} == {None}


def test_choices():
    check_choice("routers", "keep", ("keep", "drop"))
    with pytest.raises(StaticMergeError, match="routers is 'all'; use one of 'keep', 'drop'") as refused:
        check_choice("routers", "all", ("keep", "drop"), StaticMergeError)
    assert refused.value.allowed == ("keep", "drop")
