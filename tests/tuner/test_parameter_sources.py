"""What was made from a Parameter is out of date once another one, or other values, are in its place."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft_hoe.tuner.parameter_sources import Source, are_unchanged, is_plain, is_there


def write(parts):
    with torch.no_grad():
        parts["default"].weight.mul_(2)


def replace(parts):
    parts["default"].weight = nn.Parameter(parts["default"].weight.detach().clone())


def swap(parts):
    parts["default"].weight.data = parts["default"].weight.data.clone()


def renew(parts):
    parts["default"] = nn.Linear(3, 2)


def hook(parts):
    parts["default"].register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("change", "stays", "views_stay"),
    [
        (lambda parts: None, True, True),
        (write, False, True),  # views have the new values
        (replace, False, False),
        (swap, False, False),
        (renew, False, False),
        (hook, False, False),
    ],
)
def test_each_change_of_a_parameter_is_seen(change, stays, views_stay):
    parts = nn.ModuleDict({"default": nn.Linear(3, 2)})
    copied, viewed = (Source.of(parts, "default", "weight", viewed=viewed) for viewed in (False, True))
    change(parts)
    assert (are_unchanged([copied]), are_unchanged([viewed])) == (stays, views_stay)
    assert are_unchanged([copied, viewed]) == (stays and views_stay)


def test_values_without_a_version_are_never_taken_for_unchanged():
    with torch.inference_mode():
        parts = nn.ModuleDict({"default": nn.Linear(3, 2)})
    assert not are_unchanged([Source.of(parts, "default", "weight", viewed=False)])
    assert are_unchanged([Source.of(parts, "default", "weight", viewed=True)])


def test_what_a_hook_fetches_is_read_by_a_call_only():
    linear, other = nn.Linear(3, 2), nn.Bilinear(3, 3, 2)
    assert (is_there(linear), is_plain(linear), is_there(other), is_plain(other)) == (True, True, True, False)
    linear.register_forward_pre_hook(lambda *_: None)
    assert (is_there(linear), is_plain(linear)) == (False, False)
