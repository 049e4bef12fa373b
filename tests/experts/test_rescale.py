from __future__ import annotations

import pytest

from peft_hoe import ExpertError
from peft_hoe.experts.rescale import check_rescale, rescale_factor


def test_factors_by_hand():
    norms = {"kept": 2.0, "norm": 3.0, "policy_norm": 5.0}
    assert rescale_factor("norm", **norms) == 1.5
    assert rescale_factor("policy_norm", **norms) == 2.5
    assert rescale_factor(1.9, **norms) == 1.9
    assert rescale_factor(None, **norms) == 1.0


def test_factors_are_at_most_three_and_nothing_stays_nothing():
    assert rescale_factor("norm", kept=0.1, norm=3.0, policy_norm=5.0) == 3.0
    assert rescale_factor("policy_norm", kept=0.0, norm=0.0, policy_norm=1.0) == 1.0


@pytest.mark.parametrize(
    ("given", "expected"), [("none", None), (None, None), ("1.5", 1.5), (2, 2.0), ("norm", "norm")]
)
def test_what_is_understood(given, expected):
    assert check_rescale(given) == expected


@pytest.mark.parametrize("given", ["norms", 0, -1, float("nan"), float("inf"), True, [1]])
def test_what_is_refused(given):
    with pytest.raises(ExpertError, match=r"rescale is .*; allowed are"):
        check_rescale(given)
