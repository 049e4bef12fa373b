"""Errors carry what their text says as attributes, and travel between processes."""

from __future__ import annotations

import ast
import pickle
from pathlib import Path

import pytest

from peft_hoe import CheckpointError, HoEError, StaticMergeError, errors
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


# Errors that have nothing to say but their text.
BARE = {
    "the first process failed", "this trainer has run", "nothing was recorded", "plots need matplotlib",
    "GGUF files need", "a model uses this configuration", "the server needs packages", "prompts of recipes need",
    "str(error)",
}  # fmt: skip

# The modules of no room are ".".
ROOMS = (
    "training rewards objectives generation tuner policies serving placing person demo experts reproduce "
    "evaluation metrics commands recipes ."
).split()


@pytest.mark.parametrize("room", ROOMS)
def test_errors_of_a_room_carry_data(room):
    """A `raise` of ours without an attribute is one that a program can only read as text."""
    kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, HoEError)}
    package = Path(errors.__file__).parent
    paths = list(package.glob("*.py") if room == "." else (package / room).rglob("*.py"))
    assert paths
    for path in paths:
        source = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)):
                continue
            if getattr(node.exc.func, "id", "") in kinds and not node.exc.keywords:
                said = ast.get_source_segment(source, node.exc.args[0])
                assert any(text in said for text in BARE), f"{path}:{node.lineno}: {said}"
