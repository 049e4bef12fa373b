"""Every public name has an example in its docstring, and every example runs."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import sys
from pathlib import Path
from typing import Any

import pytest

import peft_hoe

SOURCE = Path(peft_hoe.__file__).parent


def _says_what_is_public(path: Path) -> bool:
    assigned = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.Assign)]
    return any(isinstance(target, ast.Name) and target.id == "__all__" for node in assigned for target in node.targets)


EXTRAS = {"fastapi", "gradio", "uvicorn"}


def _public() -> dict[str, Any]:
    """Public functions and classes, each by the first dotted name that it has; constants and modules have no examples."""
    found: dict[str, Any] = {}
    for path in filter(_says_what_is_public, sorted(SOURCE.rglob("*.py"))):
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        try:
            module = importlib.import_module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
        except ModuleNotFoundError as error:  # of an extra that is not installed
            if error.name in EXTRAS:
                continue
            raise
        for name in module.__all__:
            thing = getattr(module, name)
            if (inspect.isclass(thing) or inspect.isroutine(thing)) and thing not in found.values():
                found[f"{module.__name__}.{name}"] = thing
    return found


PUBLIC = _public()


@pytest.mark.parametrize("name", PUBLIC)
def test_the_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    thing = PUBLIC[name]
    assert ">>> " in (thing.__doc__ or ""), f"{name} has no example in its docstring"
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    example = doctest.DocTestParser().get_doctest(
        thing.__doc__, dict(vars(sys.modules[thing.__module__])), name, None, 0
    )
    report: list[str] = []
    runner.run(example, out=report.append)
    assert runner.failures == 0, "".join(report)
