from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest

from peft_hoe.errors import HoEError
from peft_hoe.training import trl_versions

NEED_TRL = ("HoEGRPOConfig", "HoEGRPOTrainer", "HoEDPOConfig", "HoEDPOTrainer")


def test_importing_the_package_imports_no_trl() -> None:
    code = "import sys, peft_hoe, peft_hoe.training; print('trl' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "False"


@pytest.mark.parametrize(
    ("version", "ppo", "others"),
    [
        (None, "not installed", "not installed"),
        ("1.8.0", "1.8.0 is installed", "1.8.0 is installed"),
        ("1.9", None, None),
        ("1.12.3", None, None),
        ("1.13.0", "1.13.0 is installed", None),
        ("1.16.0", "1.16.0 is installed", None),
    ],
)
def test_the_reason_names_version_and_remedy(
    version: str | None, ppo: str | None, others: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def installed(name: str) -> str:
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", installed)
    expected = [("HoERouterTrainer", ppo, "peft-hoe[ppo]"), *((name, others, "peft-hoe[train]") for name in NEED_TRL)]
    for name, said, remedy in [*expected, ("HoEDistillationTrainer", None, "")]:
        reason = trl_versions.missing(name)
        if said is None:
            assert reason is None
        else:
            assert reason is not None
            assert name in reason
            assert said in reason
            assert remedy in reason


def test_without_trl_the_names_are_there_and_say_what_is_missing() -> None:
    """In a process of its own; distillation works, and `train_routers` says the same."""
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
for name in {("HoERouterConfig", "HoERouterTrainer", *NEED_TRL)!r}:
    try:
        getattr(peft_hoe, name)(output_dir="run")
    except ImportError as error:
        print(name, error)
try:
    peft_hoe.train_routers(None, None, trainer="dpo", train_dataset=[])
except ImportError as error:
    print("train_routers", error)
print(peft_hoe.HoEDistillationTrainer.__name__, peft_hoe.HoEDistillationConfig(output_dir="run").beta)
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.count("trl is not installed: install it with pip install 'peft-hoe[train]'") == len(NEED_TRL) + 1
    assert printed.count("install it with pip install 'peft-hoe[ppo]'") == 2
    assert printed.splitlines()[-1] == "HoEDistillationTrainer 0.0"


def test_train_routers_names_the_trainers() -> None:
    import peft_hoe

    with pytest.raises(HoEError, match="trainer is 'sft'; use one of ppo, grpo, distill, dpo"):
        peft_hoe.train_routers(None, None, trainer="sft", train_dataset=[])
    with pytest.raises(HoEError, match="trainer='distill' takes a HoEDistillationConfig"):
        peft_hoe.train_routers(None, object(), trainer="distill", train_dataset=[])
