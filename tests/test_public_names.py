"""The door of the package: its names are listed, complete, and loaded when they are used."""

from __future__ import annotations

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


def test_a_name_that_has_been_used_is_there_at_once(monkeypatch):
    monkeypatch.delitem(vars(peft_hoe), "Sweep", raising=False)
    assert peft_hoe.Sweep is vars(peft_hoe)["Sweep"]
