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


def test_lower_bounds_are_the_pins_of_their_run() -> None:
    """`make lock` writes the pins from the bounds: a bound that was changed without it is found here."""
    tomllib = pytest.importorskip("tomllib")
    root = Path(__file__).resolve().parents[1]
    with (root / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)$", (root / "constraints/lower-bounds.txt").read_text(), re.MULTILINE))
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["train"], *extras["eval"]]
    found = (re.match(r"([\w-]+)>=([\w.]+)", line).groups() for line in wanted)
    bounds = {name.replace("_", "-"): version for name, version in found}
    assert bounds == {name: pins[name] for name in bounds}
    assert bounds["peft"] == versions.PEFT_MINIMUM
