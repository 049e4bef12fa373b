"""README and the pages of docs/ against the repository: links lead somewhere, and names, arguments and options exist."""

from __future__ import annotations

import ast
import inspect
import pkgutil
import re
import shlex
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from peft_hoe.cli import _COMMANDS, build_parser

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("src/**/*.md")])
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


@pytest.fixture(params=PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def page(request: pytest.FixtureRequest) -> Path:
    return request.param  # type: ignore[no-any-return]


# -- links -------------------------------------------------------------------------------------------------------------


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ +(.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def test_links_lead_to_files_and_headings(page: Path) -> None:
    lost = []
    for link in LINK.findall(prose(page)):
        if re.match(r"https?:|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or not target.is_relative_to(ROOT) or (anchor and anchor not in anchors(target)):
            lost.append(link)
    assert lost == []


def test_every_page_of_docs_is_reached_from_readme() -> None:
    reached, left = set(), [ROOT / "README.md"]
    while left:
        here = left.pop()
        links = [link.partition("#")[0] for link in LINK.findall(prose(here)) if not link.startswith("http")]
        found = {(here.parent / link).resolve() for link in links if link.endswith(".md")}
        left += found - reached
        reached |= found
    assert [page for page in ROOT.glob("docs/**/*.md") if page not in reached] == []


def test_files_of_the_repository_that_are_named_exist(page: Path) -> None:
    if page.name == "CHANGELOG.md":
        pytest.skip("it names what there was")
    named = re.findall(
        r"`((?:tests|benchmarks|scripts|examples|constraints|src)/[\w./-]+)", page.read_text(encoding="utf-8")
    )
    assert [path for path in named if not (ROOT / path).exists()] == []


# -- Python ------------------------------------------------------------------------------------------------------------


def resolve(name: str) -> Any:
    """What a dotted name stands for; None for nothing."""
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return None


class Block(ast.NodeVisitor):
    """Follows the names of a page's code blocks that are ours, as far as one can without running it."""

    def __init__(self) -> None:
        self.known: dict[str, Any] = {}  # names in the code: our objects, or the classes of which they are instances
        self.instances: set[str] = set()
        self.wrong: list[str] = []

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name.startswith("peft_hoe"):
                self.known[alias.asname or "peft_hoe"] = resolve(alias.name if alias.asname else "peft_hoe")

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if (node.module or "").startswith("peft_hoe"):
            for alias in node.names:
                found = resolve(f"{node.module}.{alias.name}")
                self.known[alias.asname or alias.name] = found
                if found is None:
                    self.wrong.append(f"from {node.module} import {alias.name}")

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        made = self._made(node.value)
        for target in node.targets:
            if isinstance(target, ast.Name):
                self.known.pop(target.id, None)
                self.instances.discard(target.id)
                if inspect.isclass(made) and made.__module__.startswith("peft_hoe"):
                    self.known[target.id] = made
                    self.instances.add(target.id)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        self._object(node)

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        called = self._object(node.func)
        starred = any(isinstance(value, ast.Starred) for value in node.args) or any(not k.arg for k in node.keywords)
        if called is None or not callable(called) or starred:
            return
        method = isinstance(node.func, ast.Attribute) and self._is_instance(node.func.value)
        if self._is_instance(node.func):
            called, method = called.__call__, True
        try:
            inspect.signature(called).bind_partial(
                *([None] * method + [None] * len(node.args)), **{word.arg: None for word in node.keywords if word.arg}
            )
        except TypeError as error:
            self.wrong.append(f"{ast.unparse(node.func)}(...): {error}")

    def _is_instance(self, node: ast.expr) -> bool:
        return isinstance(node, ast.Call) or (isinstance(node, ast.Name) and node.id in self.instances)

    def _made(self, node: ast.expr) -> Any:
        """The class of a call's result."""
        called = self._object(node.func) if isinstance(node, ast.Call) else None
        if inspect.isfunction(called) or inspect.ismethod(called):
            try:
                return typing.get_type_hints(called).get("return")
            except NameError:  # of a type that is imported for type checkers only
                return None
        return called if inspect.isclass(called) else None

    def _object(self, node: ast.expr) -> Any:
        """What of ours a name, a dotted name, or a call's result is; None where that is not known."""
        if isinstance(node, ast.Name):
            return self.known.get(node.id)
        if isinstance(node, ast.Call):
            return self._made(node)
        owner = self._object(node.value) if isinstance(node, ast.Attribute) else None
        if owner is None or not isinstance(node, ast.Attribute):
            return None
        fields = {name for kind in getattr(owner, "__mro__", ()) for name in getattr(kind, "__annotations__", {})}
        if hasattr(owner, node.attr) or node.attr in fields:
            return getattr(owner, node.attr, None)
        if inspect.ismodule(owner) and not owner.__name__.startswith("peft_hoe"):
            return None
        self.wrong.append(ast.unparse(node))
        return None


def test_code_blocks_name_what_there_is(page: Path) -> None:
    """Imports, attributes and arguments; a block that does not parse is wrong as well."""
    text, block = page.read_text(encoding="utf-8"), Block()
    if "peft_hoe.training" in text or "Trainer" in text:
        pytest.importorskip("trl")
    for language, code in FENCE.findall(text):
        if language == "python":
            block.visit(ast.parse(code))
    assert block.wrong == []


def test_dotted_names_in_the_text_exist(page: Path) -> None:
    if page.name == "CHANGELOG.md":
        pytest.skip("it names what there was")
    names = re.findall(r"`(peft_hoe(?:\.\w+)+)", prose(page))
    assert [name for name in names if resolve(name) is None] == []


# -- commands ----------------------------------------------------------------------------------------------------------


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each command line of ours: in bash blocks, in indented lines, and between backticks."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for language, code in FENCE.findall(text) if language == "bash" for line in code.splitlines()]
    lines += re.findall(r"^    (.+)$", text, re.M) + re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    for line in lines:
        match = re.match(
            r"(?:\w+=\S+ )*((?:(?:peft-hoe|make)(?= |$)|python3? (?:benchmarks|examples|scripts)/).*)", line.strip()
        )
        if match:
            yield shlex.split(re.sub(r"[\[\]]", " ", match[1]), comments=True)


def options(words: list[str]) -> list[str]:
    own = words[: words.index("--")] if "--" in words else words
    return [word.partition("=")[0] for word in own if word.startswith("--")]


def test_commands_have_the_options_that_pages_give_them(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    wrong = []
    for words in commands(page):
        if words[0] == "make":
            known = {word for word in words[1:2] if word in targets or "=" in word}
            wrong += [" ".join(words)] * (len(words) > 1 and not known)
        elif words[0] == "peft-hoe":
            if len(words) > 1 and words[1] not in _COMMANDS:
                wrong.append(" ".join(words))
                continue
            wrong += [f"{' '.join(words[:2])} {name}" for name in options(words) if name not in options_of(words[1])]
        elif not (ROOT / words[1]).is_file():
            wrong.append(words[1])
        else:
            source = with_imports(ROOT / words[1])
            wrong += [f"{words[1]} {name}" for name in options(words) if f'"{name}"' not in source]
    assert wrong == []


def with_imports(script: Path) -> str:
    """The source of a script and of the scripts beside it that it imports, directly or not: its options stand there."""
    found, left = "", [script]
    seen: set[Path] = set()
    while left:
        path = left.pop()
        if path in seen or not path.is_file():
            continue
        seen.add(path)
        source = path.read_text(encoding="utf-8")
        found += source
        left += [path.parent / f"{name}.py" for name in re.findall(r"^\s*(?:from|import) (\w+)", source, re.M)]
    return found


def options_of(command: str) -> set[str]:
    (subparsers,) = (action for action in build_parser([command])._actions if action.dest == "command")
    return {"--help", *subparsers.choices[command]._option_string_actions}  # type: ignore[index, call-overload]
