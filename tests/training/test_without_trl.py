from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest

from peft_hoe.training import trl_versions


def test_importing_the_package_imports_no_trl() -> None:
    code = "import sys, peft_hoe, peft_hoe.training; print('trl' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "False"


@pytest.mark.parametrize(
    ("version", "said"),
    [
        (None, "not installed"),
        ("1.8.0", "1.8.0 is installed"),
        ("1.13.0", "1.13.0 is installed"),
        ("1.12.3", None),
        ("1.9", None),
    ],
)
def test_the_reason_names_version_and_remedy(
    version: str | None, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def installed(name: str) -> str:
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", installed)
    reason = trl_versions.missing_ppo()
    if said is None:
        assert reason is None
    else:
        assert reason is not None
        assert said in reason
        assert "peft-hoe[ppo]" in reason


def test_using_the_class_says_what_is_missing() -> None:
    stand_in = trl_versions.unavailable("HoERouterTrainer", "install it")
    with pytest.raises(ImportError, match="install it"):
        stand_in(model=None)


@pytest.mark.parametrize(
    ("version", "said"), [(None, "not installed"), ("1.8.0", "1.8.0 is installed"), ("1.9", None), ("1.16.0", None)]
)
def test_trainers_of_newer_trl(version: str | None, said: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl_versions, "_installed", lambda: version)
    reason = trl_versions.missing_trl("HoEDPOTrainer")
    if said is None:
        assert reason is None
    else:
        assert reason is not None
        assert said in reason
        assert "HoEDPOTrainer needs trl>=1.9" in reason
        assert "peft-hoe[train]" in reason


def test_without_trl_the_name_is_there_and_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import peft_hoe

    monkeypatch.setattr(trl_versions, "_installed", lambda: None)
    for name in ("HoEDPOConfig", "HoEDPOTrainer"):
        monkeypatch.delitem(vars(peft_hoe.training), name, raising=False)
        stand_in = getattr(peft_hoe, name)
        monkeypatch.delitem(vars(peft_hoe.training), name)
        with pytest.raises(ImportError, match=r"peft-hoe\[train\]"):
            stand_in(model=None)
