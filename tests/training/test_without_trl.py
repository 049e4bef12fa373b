from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib import metadata

import pytest

from peft_hoe.errors import HoEError
from peft_hoe.training import trl_versions

NEED_TRL = ("HoEGRPOConfig", "HoEGRPOTrainer", "HoEDPOConfig", "HoEDPOTrainer")


@pytest.mark.slow
def test_importing_the_package_imports_no_trl(imported_by: Callable[[str], set[str]]) -> None:
    assert "trl" not in imported_by("peft_hoe.training")


@pytest.mark.parametrize(
    ("version", "said"),
    [(None, "not installed"), ("1.8.0", "1.8.0 is installed"), ("1.9", None), ("1.13.0", None), ("1.16.0", None)],
)
def test_the_reason_names_version_and_remedy(
    version: str | None, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def installed(name: str) -> str:
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", installed)
    for name in NEED_TRL:
        reason = trl_versions.missing(name)
        expected = said and f"{name} needs trl>=1.9, but trl {'is ' if version is None else ''}{said}"
        assert reason == (expected and f"{expected}: install it with pip install 'peft-hoe[train]'")
    for name in ("HoERouterConfig", "HoERouterTrainer", "HoEDistillationTrainer"):
        assert trl_versions.missing(name) is None


@pytest.mark.parametrize("version", [None, "1.8.0", "1.13.0", "1.16.0"])
def test_trls_without_a_ppo_trainer(version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not even imported."""

    def installed(name: str) -> str:
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", installed)
    monkeypatch.setattr(trl_versions, "import_module", lambda name: pytest.fail(f"{name} is imported"))
    assert trl_versions.trl_ppo.__wrapped__() is None


@pytest.mark.slow
def test_without_trl_the_names_are_there_and_say_what_is_missing() -> None:
    """In a process of its own; PPO and distillation work, and `train_routers` says the same."""
    code = f"""
import sys
sys.modules["trl"] = None  # importing it fails
from importlib import metadata
real = metadata.version
def version(name):
    if name == "trl":
        raise metadata.PackageNotFoundError(name)
    return real(name)
metadata.version = version
import peft_hoe
for name in {NEED_TRL!r}:
    try:
        getattr(peft_hoe, name)(output_dir="run")
    except ImportError as error:
        print(name, error)
try:
    peft_hoe.train_routers(None, None, trainer="dpo", train_dataset=[])
except ImportError as error:
    print("train_routers", error)
print(peft_hoe.HoEDistillationTrainer.__name__, peft_hoe.HoEDistillationConfig(output_dir="run").beta)
print(peft_hoe.HoERouterTrainer.__name__, peft_hoe.HoERouterConfig(output_dir="run", use_cpu=True).cliprange)
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.count("trl is not installed: install it with pip install 'peft-hoe[train]'") == len(NEED_TRL) + 1
    assert printed.splitlines()[-2:] == ["HoEDistillationTrainer 0.0", "HoERouterTrainer 0.2"]


def test_train_routers_names_the_trainers() -> None:
    import peft_hoe

    with pytest.raises(HoEError, match="trainer is 'sft'; use one of 'ppo', 'grpo', 'distill', 'dpo'"):
        peft_hoe.train_routers(None, None, trainer="sft", train_dataset=[])
    with pytest.raises(HoEError, match="trainer='distill' takes a HoEDistillationConfig"):
        peft_hoe.train_routers(None, object(), trainer="distill", train_dataset=[])
