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
    "the first process failed", "this trainer has run", "nothing was recorded", "the server is stopping",
}  # fmt: skip
DATA = {"argument", "value", "allowed", "path", "tensor", "module", "routers", "shape"}

# The modules of no room are ".".
ROOMS = (
    "training rewards objectives generation tuner policies serving placing person demo experts reproduce "
    "evaluation metrics commands recipes ."
).split()
PACKAGE = Path(errors.__file__).parent


def find_classes() -> set[str]:
    """HoEError and all that derive from it, wherever they are defined."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")]
    bases = {
        node.name: {getattr(base, "id", "") for base in node.bases}
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    found = {"HoEError"}
    while more := {name for name in bases if bases[name] & found} - found:
        found |= more
    return found


CLASSES = find_classes()


def errors_made(source: str) -> list[tuple[ast.Call, bool]]:
    """Each error of ours that a module makes, also of a class that a function is given; whether because an import failed."""
    tree = ast.parse(source)
    given = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg) and _is_error_class(node.annotation)}
    handlers = [node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler) and node.type]
    imports = [node for node in handlers if ast.unparse(node.type) == "ImportError"]
    of_imports = {id(inner) for node in imports for inner in ast.walk(node)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [(node, id(node) in of_imports) for node in calls if getattr(node.func, "id", "") in CLASSES | given]


def _is_error_class(annotation: ast.expr | None) -> bool:
    return annotation is not None and ast.unparse(annotation) == "type[HoEError]"


@pytest.mark.parametrize("room", ROOMS)
def test_errors_of_a_room_carry_data(room):
    """One without an attribute can only be read as text by a program.

    What is not installed is no argument's fault: such an error says the pip line, or is the text of one that does.
    """
    paths = list(PACKAGE.glob("*.py") if room == "." else (PACKAGE / room).rglob("*.py"))
    assert paths
    for path in paths:
        source = path.read_text(encoding="utf-8")
        for call, import_failed in errors_made(source):
            if {keyword.arg for keyword in call.keywords} & {*DATA, None}:  # None for **data
                continue
            said = ast.get_source_segment(source, call.args[0])
            enough = "pip install" in said or said == "str(error)" if import_failed else any(x in said for x in BARE)
            assert enough, f"{path}:{call.lineno}: {said}"


def test_no_exception_from_that_rule_is_out_of_date():
    sources = [path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")]
    texts = [ast.unparse(call.args[0]) for source in sources for call, _ in errors_made(source) if not call.keywords]
    assert {text for text in BARE if not any(text in each for each in texts)} == set()
