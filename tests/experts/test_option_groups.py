"""The groups of a build's settings refuse what is not allowed when they are made; `test_ranks.py` has the ranks."""

from __future__ import annotations

import pytest

from peft_hoe import ExpertError, Merging, Pruning, TaskSVD


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Pruning(1.0), "the share to prune is 1.0; allowed are a number from 0 up to but without 1"),
        (lambda: Pruning(True), "the share to prune is True"),
        (lambda: Pruning(scope="layer"), "the scope of pruning is 'layer'; use one of 'global', 'module'"),
        (lambda: Merging("slerp"), "merge method is 'slerp'"),
        (lambda: Merging("ties", {"densty": 0.1}), r"merge 'ties' has no option \['densty'\]"),
        (lambda: TaskSVD("fast"), "svd is 'fast'"),
        (lambda: TaskSVD(tolerance=0), "the tolerance of svd is 0; it must be a number above 0 and below 1"),
    ],
)
def test_what_is_not_allowed_is_named(make, message):
    with pytest.raises(ExpertError, match=message):
        make()
