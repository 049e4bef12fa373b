"""What a full set of weights must have to be a base or a policy."""

from __future__ import annotations

import pytest
import torch

from peft_hoe import CheckpointError


def test_wrong_shapes_show_both(opened):
    *_, change = opened
    with pytest.raises(
        CheckpointError, match=r"'model.layers.0.mlp.up_proj.weight' has shape \(23, 16\), but .*\(24, 16\)"
    ):
        change(lambda name, tensor: tensor[:-1].clone() if name.endswith("up_proj.weight") else tensor)


def test_integer_weights_are_refused(opened):
    *_, change = opened
    with pytest.raises(CheckpointError, match=r"stored as torch.int8, which means nothing without its quantiser"):
        change(lambda _, tensor: tensor.to(torch.int8))
