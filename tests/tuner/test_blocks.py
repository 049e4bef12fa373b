"""`use_preference` blocks of a thread or task."""

from __future__ import annotations

import pytest

from peft_hoe import HoEConfig, PreferenceError
from peft_hoe.tuner.blocks import Block, innermost, opened


def test_blocks_of_another_steering_are_not_seen():
    mine, other = object(), object()
    outer, inner = Block(mine, {"default": [1, 0]}, "keep"), Block(other, {}, "drop")
    assert innermost(mine).preferences == {}
    with opened(outer), opened(inner):
        assert innermost(mine) is outer
        assert innermost(other) is inner
    assert innermost(mine).preferences == {}


def test_blocks_are_left_in_order():
    owner = object()
    outer, inner = opened(Block(owner, {}, "keep")), opened(Block(owner, {}, "drop"))
    outer.__enter__()
    inner.__enter__()
    with pytest.raises(RuntimeError, match="left out of order"):
        outer.__exit__(None, None, None)
    inner.__exit__(None, None, None)
    assert innermost(owner).routers == "keep"


def test_a_block_that_cannot_be_entered_leaves_nothing_behind(hoe_llama, randomise):
    """It stayed open for the rest of the thread: every later call failed by it."""
    model = hoe_llama()
    model.add_adapter("other", HoEConfig(objectives=["a", "b"], r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    randomise(model, seed=3)
    before = dict(model.preference)
    rows = {"default": [[1, 0], [0, 1]], "other": [[1, 0]]}
    with pytest.raises(PreferenceError, match="different numbers of rows"), model.use_preference(rows):
        pass
    assert dict(model.preference) == before
    with model.use_preference([0, 1]):
        assert dict(model.preference) == {"a": 0.0, "b": 1.0}
