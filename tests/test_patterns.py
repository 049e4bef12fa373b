from __future__ import annotations

import pytest

from peft_hoe import ExpertError
from peft_hoe.patterns import matches


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("q_proj", "q_proj", True),
        ("q_proj", "model.q_proj", False),
        (r".*\.layers\.(0|1)\..*_proj", "model.layers.1.self_attn.q_proj", True),
        (r".*\.layers\.(0|1)\..*_proj", "model.layers.10.self_attn.q_proj", False),
    ],
)
def test_whole_names(pattern, name, expected):
    assert matches(pattern, name, "target_modules") is expected


def test_a_pattern_that_backtracks_is_given_up():
    pattern = r"(a|aa)+b"  # the standard library's re takes years
    with pytest.raises(ExpertError, match=r"rank_pattern.*takes more than 1 s.*backtracks") as refused:
        matches(pattern, "a" * 60, "rank_pattern['x']")
    assert (refused.value.argument, refused.value.value) == ("rank_pattern['x']", pattern)


def test_some_patterns_that_backtrack_are_seen_through():
    for pattern in (r"(a+)+b", r"((a*)*)*b", r"(a|a?)+b", r"(([a-z])+.)+[A-Z]([a-z])+"):
        assert not matches(pattern, "a" * 60, "target_modules")


def test_what_is_no_pattern_is_named():
    with pytest.raises(ExpertError, match=r"target_modules: the pattern '\(' is no regular expression"):
        matches("(", "a", "target_modules")
    with pytest.raises(ExpertError, match="20000 characters"):
        matches("a" * 20000, "a", "target_modules")
