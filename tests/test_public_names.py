"""The door of the package: its names are listed, complete, and loaded when they are used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import peft_hoe
from peft_hoe import training


@pytest.mark.parametrize("module", [peft_hoe, training], ids=lambda module: module.__name__)
def test_dir_and_all_hold_every_public_name(module):
    assert set(module.__all__) <= set(dir(module))
    assert sorted(module.__all__) == sorted(set(module.__all__))
    for name in module.__all__:
        assert getattr(module, name) is not None
    assert set(module._LAZY) <= set(module.__all__)


def test_a_misspelt_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'HoERouterTrainerr'"):
        _ = peft_hoe.HoERouterTrainerr


def test_a_name_that_has_been_used_is_there_at_once():
    code = (
        "import peft_hoe; before = 'Sweep' in vars(peft_hoe); peft_hoe.Sweep; print(before, 'Sweep' in vars(peft_hoe))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "True"]
