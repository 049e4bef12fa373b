"""The version check at import."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest

from peft_hoe import versions


def installed(monkeypatch: pytest.MonkeyPatch, peft: str, transformers: str) -> None:
    found = {"peft": peft, "transformers": transformers}
    monkeypatch.setattr(metadata, "version", lambda name: found[name])


@pytest.mark.parametrize(
    ("peft", "transformers"),
    [
        ("0.18.0", "4.57.1"),
        ("0.19.1", "4.57.6"),
        ("0.20.0", "5.0.0"),
        ("0.20.0.dev0", "5.0.0rc1"),
        ("0.21.2", "5.23.0"),
        ("1.0", "6.0"),
    ],
)
def test_supported_versions_pass(monkeypatch: pytest.MonkeyPatch, peft: str, transformers: str) -> None:
    installed(monkeypatch, peft, transformers)
    assert versions.check() is None


@pytest.mark.parametrize(
    ("peft", "transformers", "minimum"),
    [
        ("0.17.1", "4.57.1", "0.18.0"),
        ("0.9.0", "4.57.1", "0.18.0"),
        ("0.17.1", "5.0.0", "0.20.0"),
        ("0.19.1", "5.0.0", "0.20.0"),
        ("0.19.1", "5.23.0.dev0", "0.20.0"),
    ],
)
def test_unsupported_versions_name_both_and_the_pip_line(
    monkeypatch: pytest.MonkeyPatch, peft: str, transformers: str, minimum: str
) -> None:
    installed(monkeypatch, peft, transformers)
    with pytest.raises(ImportError) as error:
        versions.check()
    message = str(error.value)
    assert f"peft {peft} " in message
    assert f"transformers {transformers} " in message
    assert message.endswith(f'pip install --upgrade "peft>={minimum}"')


@pytest.mark.parametrize(
    ("peft", "transformers"),
    [("0.21.2", "5.23.0"), ("0.22.0", "5.24.0"), ("0.18.0", "4.57.1"), ("1.0", "6.0"), ("0.21.2", "5.24.0.dev0")],
)
def test_pairs_that_save_what_transformers_loaded(
    monkeypatch: pytest.MonkeyPatch, peft: str, transformers: str
) -> None:
    installed(monkeypatch, peft, transformers)
    assert versions.refused_without_peft_model() is None


@pytest.mark.parametrize(("peft", "transformers"), [("0.21.2", "5.24.0"), ("0.22.0.dev0", "5.25.1"), ("0.20.0", "6.0")])
def test_pairs_that_do_not_name_both_and_the_pip_line(
    monkeypatch: pytest.MonkeyPatch, peft: str, transformers: str
) -> None:
    installed(monkeypatch, peft, transformers)
    message = versions.refused_without_peft_model()
    assert message is not None
    assert message.startswith(f"transformers {transformers} asks for peft>=0.22.0 ")
    assert f"peft {peft} is installed" in message
    assert 'pip install "transformers<5.24.0"' in message


def test_installed_versions_pass() -> None:
    assert versions.check() is None


ROOT = Path(__file__).resolve().parents[1]


def requirements(*extras: str) -> list[str]:
    """The lines of pyproject.toml, extras included, that name other packages than this one."""
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    return [line for line in lines if not line.startswith("peft-hoe[")]


def pins(name: str) -> dict[str, str]:
    """Version by package; of the last line where Pythons need different ones."""
    text = (ROOT / "constraints" / f"{name}.txt").read_text()
    return dict(re.findall(r"^([\w.-]+)==([\w.]+)", text, re.MULTILINE))


def canonical(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement).group().lower().replace("_", "-")


@pytest.mark.parametrize("name", ["trl-1.12", "newest-trl"])
def test_every_dependency_is_pinned(name: str) -> None:
    """`make lock` writes the pins: a dependency that was added without it is found here."""
    wanted = {canonical(line) for line in requirements("train", "eval", "dev")}
    wanted.discard("triton")  # each build of torch for CUDA names its own exactly
    assert wanted - pins(name).keys() - pins("torch").keys() == set()


def test_lower_bounds_are_the_pins_of_their_run() -> None:
    """`make lock` writes the pins from the bounds: a bound that was changed without it is found here."""
    bounds = {canonical(line): line.partition(">=")[2] for line in requirements("train", "eval")}
    assert bounds == {name: pins("lower-bounds")[name] for name in bounds}
    assert bounds["peft"] == versions.PEFT_MINIMUM
