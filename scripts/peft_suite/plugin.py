"""A pytest plugin that runs PEFT's own tests with HoEConfig as the config class.

Nothing of PEFT's is edited. At collection, tables of configs shrink to LoRA's rows, and HoEConfig takes LoraConfig's
place in them (`cases`). Tests that write LoraConfig(...) in their body get HoEConfig under that name, and lora_A becomes
hoe_A in their code. Tests of other methods, and of what only LoRA has (`skips`), are deselected and counted.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from types import CodeType, ModuleType
from typing import Any

import cases
import pytest
import skips
from peft import LoraConfig, PeftConfig

from peft_hoe import versions

OURS = "peft_hoe: "
_translated: set[str] = set()
_foreign: dict[str, str] = {}
_renamed: set[Callable[..., Any]] = set()
_left_out: Counter[str] = Counter()


# -- collection --------------------------------------------------------------------------------------------------------


def pytest_configure() -> None:
    """Stand in for diffusers, of which the tests import one class that no test here uses."""
    if "diffusers" not in sys.modules:
        stand_in = ModuleType("diffusers")
        stand_in.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})  # type: ignore[attr-defined]
        sys.modules["diffusers"] = stand_in


def pytest_collection_finish() -> None:
    """Take the stand-in away, so that nobody believes diffusers to be installed."""
    if getattr(sys.modules.get("diffusers"), "__spec__", None) is None:
        sys.modules.pop("diffusers", None)


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Swap the rows of parametrize before pytest reads them."""
    definition = metafunc.definition
    test = _base(definition.nodeid)
    swapped = [_swap(mark) for mark in definition.own_markers]
    marks = [mark for mark in swapped if mark is not None]
    if len(marks) < len(swapped):
        _foreign[test] = "other methods"
        return
    if all(mark is old for mark, old in zip(marks, definition.own_markers, strict=True)):
        if not _mentions_lora(metafunc.cls, metafunc.module, metafunc.function):
            _foreign[test] = "other methods"
            return
        _translated.add(test)
    elif any(_has_translated(mark) for mark in marks):
        _translated.add(test)
    definition.own_markers = marks
    if test in _translated:
        for function in _functions(metafunc.cls, metafunc.module, metafunc.function):
            if function not in _renamed:
                _renamed.add(function)
                function.__code__ = cases.rename(function.__code__, dir(metafunc.cls))


def _base(nodeid: str) -> str:
    return nodeid.split("[")[0]


def _columns(mark: pytest.Mark) -> list[str]:
    names = mark.args[0] if mark.args else mark.kwargs["argnames"]
    return [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)


def _swap(mark: pytest.Mark) -> pytest.Mark | None:
    """The mark with our rows; itself if it holds no configs; None if it holds only configs that are not LoRA's."""
    if mark.name != "parametrize":
        return mark
    names, values = _columns(mark), list(mark.args[1] if len(mark.args) > 1 else mark.kwargs["argvalues"])
    if {"config_cls", "config_class"} & set(names):
        found = list(cases.rows(names, values))
        ids = [variant if "test_name" not in names else row[names.index("test_name")] for variant, row in found]
        return pytest.mark.parametrize(names, [row for _, row in found], ids=ids).mark if found else None
    rows = [cases.cells(names, value) for value in values]
    if not any(isinstance(cell, PeftConfig) for row in rows for cell in row.values()):
        return mark
    kept = []
    for row in rows:
        try:
            configs = {name: _instance(cell) for name, cell in row.items() if isinstance(cell, PeftConfig)}
        except cases.Untranslatable:
            continue
        kept.append(tuple((row | configs).values()))
    return pytest.mark.parametrize(names, kept).mark if kept else None


def _instance(config: PeftConfig) -> PeftConfig:
    if type(config) is not LoraConfig:
        raise cases.Untranslatable(type(config).__name__)
    return cases.translate_instance(config)


def _has_translated(mark: pytest.Mark) -> bool:
    if mark.name != "parametrize":
        return False
    cells = [cell for row in mark.args[1] for cell in (row if isinstance(row, tuple) else ())]
    return cases.Translated in cells or any(isinstance(cell, PeftConfig) for cell in cells)


def _functions(cls: type | None, module: ModuleType, function: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """The test, and those methods and fixtures of its class that it uses by name."""
    seen: set[Any] = set()
    pending = [getattr(function, "__func__", function)]
    while pending:
        function = pending.pop()
        if function in seen or not hasattr(function, "__code__") or function.__module__ != module.__name__:
            continue
        seen.add(function)
        yield function
        for name in {*_names(function.__code__), *function.__code__.co_varnames}:
            member = vars(cls).get(name) if cls else None
            pending.append(getattr(member, "__wrapped__", member))  # a fixture keeps the function that it wraps


def _names(code: CodeType) -> set[str]:
    nested = [_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*nested)


def _mentions_lora(cls: type | None, module: ModuleType, function: Callable[..., Any]) -> bool:
    return any("LoraConfig" in _names(found.__code__) for found in _functions(cls, module, function))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests of other methods; skip what `skips` names."""
    kept, left_out = [], []
    for item in items:
        about = _foreign.get(_base(item.nodeid)) or skips.lora_only(item.nodeid)
        if about:
            left_out.append(item)
            _left_out[about] += 1
            continue
        kept.append(item)
        why = skips.skipped(item.nodeid)
        if why:
            item.add_marker(pytest.mark.skip(reason=OURS + why))
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


# -- running -----------------------------------------------------------------------------------------------------------


class _Everything(Counter[str]):
    """Upstream's record of models that have been fetched, saying that all of them have."""

    def __contains__(self, model: object) -> bool:
        return True


class _RestMerges(Exception):
    """A test has shown what it is about; the rest of it merges."""


@pytest.fixture(autouse=True)
def hoe_as_lora(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a test that writes LoraConfig(...), let that make a HoEConfig; serve the Hub from the cache only."""
    package = request.module.__package__
    common, utilities = (sys.modules.get(f"{package}.testing_{name}") for name in ("common", "utils"))
    monkeypatch.setattr(utilities, "_HUB_MODEL_ACCESSES", _Everything(), raising=False)
    # HoE adapts Conv1D; upstream's list of methods that do cannot know.
    monkeypatch.setattr(common, "_skip_if_conv1d_not_supported", lambda *_: None, raising=False)

    def refuse_merge(*_: Any) -> None:
        """What upstream's tests call before they merge; methods without a merge skip here."""
        if any("routers" in cell for name, cell in request.node.callspec.params.items() if "kwargs" in name):
            if request.function.__name__.startswith("test_forward"):
                raise _RestMerges
            pytest.skip(OURS + skips.MERGE)

    # Meant for BEFT, which trains biases; upstream's test for it is True for every method.
    monkeypatch.setattr(request.module, "check_beft_config", lambda *_: None, raising=False)
    for module in (common, request.module):
        monkeypatch.setattr(module, "_skip_if_merging_not_supported", refuse_merge, raising=False)
    if hasattr(request.module, "PREFIXES"):  # up to PEFT 0.18
        monkeypatch.setitem(request.module.PREFIXES, cases.HoEConfig, "hoe_")
    if _base(request.node.nodeid) in _translated:
        monkeypatch.setattr(request.module, "LoraConfig", cases.Translated)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """A forward test with a trained router passes once its forwards have; upstream would skip it there.

    And a test that meets transformers' own check of PEFT's version is skipped where the two are known not to go together.
    """
    try:
        return (yield)
    except _RestMerges:
        return True
    except ValueError as error:
        refused = versions.refused_without_peft_model()
        if refused is None or "The version of PEFT you are using is not compatible" not in str(error):
            raise
        pytest.skip(OURS + refused)


# -- reporting ---------------------------------------------------------------------------------------------------------


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Send what a worker left out to where the summary is written."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = dict(_left_out)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Every worker collects everything, so one worker's word is enough."""
    _left_out.update({about: n - _left_out[about] for about, n in node.workeroutput.get("left_out", {}).items()})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Counts, and the reason of every test that was not run."""
    reasons: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reason = re.sub(r"<class '[\w.]*\.(\w+)'>", r"\1", reason.removeprefix("Skipped: "))
        reasons[reason if reason.startswith(OURS) else f"PEFT: {reason}"] += 1
    counts = {name: len(terminalreporter.stats.get(name, [])) for name in ("passed", "failed", "error", "skipped")}
    terminalreporter.section("PEFT's tests with HoEConfig")
    terminalreporter.write_line(", ".join(f"{n} {name}" for name, n in counts.items()))
    _table(terminalreporter, "skipped", reasons)
    _table(terminalreporter, "left out, about other things than HoE", _left_out)


def _table(terminalreporter: pytest.TerminalReporter, title: str, counts: Counter[str]) -> None:
    terminalreporter.write_line(f"\n{title}: {sum(counts.values())}")
    for reason, n in counts.most_common():
        terminalreporter.write_line(f"{n:6d}  {reason}")
