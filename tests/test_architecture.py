"""The floor plan: which part of the package may import which, read from the source."""

from __future__ import annotations

import ast
from collections.abc import Callable
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import peft_hoe

SOURCE = Path(peft_hoe.__file__).parent
GROUND = {
    "errors",
    "preference",
    "router_recipe",
    "versions",
    "tasks",
    "peft_type",
    "files",
    "output_directory",
    "patterns",
    "unfinished",
    "base_sample",
    "adapter_sample",
}
# Top to bottom: a part imports what stands below it. Parts on one line know nothing of each other.
FLOORS = [
    {"cli"},
    {"commands"},
    {"reproduce", "demo"},
    {"serving"},
    {"recipes", "policies", "person", "placing"},
    {"evaluation"},
    {"training"},
    {"objectives"},
    {"rewards"},
    {"generation"},
    {"experts", "inputs", "metrics"},
    {"registration"},
    {"tuner"},
    {"growth"},
    {"config"},
    {"configured_experts"},
    {"resolution", "contents"},
    {"routing", "specs", "model_card", "calibration"},
    {"triangulation"},
    GROUND,
]


def modules() -> dict[str, Path]:
    """Every module of the package by dotted name, without the package's own name."""
    found = {}
    for path in SOURCE.rglob("*.py"):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str) -> set[str]:
    """The modules of ours that a module imports anywhere: at the top, late, or for types only."""
    path = MODULES[name]
    parts = name.split(".") if name else []
    package = parts if path.name == "__init__.py" else parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "peft_hoe":
            base = node.module.split(".")[1:]
        elif (given := _imported_by_name(node)) is not None:
            base = (
                given[len("peft_hoe") :].strip(".").split(".")
                if given.startswith("peft_hoe")
                else [*package, given[1:]]
            )
            found.add(".".join(base))
            continue
        else:
            continue
        for alias in node.names:
            submodule = ".".join([*base, alias.name])
            found.add(submodule if submodule in MODULES else ".".join(base))
    return found - {name}


def _imported_by_name(node: ast.AST) -> str | None:
    """What `import_module("peft_hoe.x")` or `import_module(".x", __name__)` imports, where it says so in letters."""
    if not isinstance(node, ast.Call) or not node.args:
        return None
    called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    given = node.args[0].value if isinstance(node.args[0], ast.Constant) else None
    ours = called in {"import_module", "__import__"} and isinstance(given, str) and given.startswith(("peft_hoe", "."))
    return given if ours else None


GRAPH = {name: imports(name) for name in MODULES}


def test_every_import_leads_to_a_module():
    unknown = {name: missing for name, found in GRAPH.items() if (missing := found - set(MODULES))}
    assert unknown == {}


def test_there_is_no_circle_of_imports_not_even_of_late_or_type_only_ones():
    # Raises CycleError, which names the circle.
    order = list(TopologicalSorter(GRAPH).static_order())
    assert set(order) == set(MODULES)


def test_imports_go_down():
    floor = {part: height for height, parts in enumerate(FLOORS) for part in parts}
    wrong = []
    for name, found in GRAPH.items():
        here = name.split(".")[0]
        if not here or here == "bootstrap":
            continue
        for other in found:
            there = other.split(".")[0]
            if there != here and floor[there] <= floor[here] and not {here, there} <= GROUND:
                wrong.append(f"{name} -> {other}")
    assert wrong == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "absent"),
    [
        (
            "peft_hoe",
            ("trl", "datasets", "moocore", "matplotlib", "evaluate", "peft_hoe.training", "peft_hoe.evaluation"),
        ),
        ("peft_hoe.evaluation", ("trl", "datasets", "moocore", "matplotlib", "evaluate", "peft_hoe.training")),
        ("peft_hoe.policies", ("moocore", "matplotlib", "peft_hoe.training")),
    ],
)
def test_importing_a_part_leaves_others_alone(
    imported_by: Callable[[str], set[str]], module: str, absent: tuple[str, ...]
) -> None:
    assert not imported_by(module) & set(absent)
