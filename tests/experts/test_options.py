"""All settings of a build together: defaults, short forms, refusals."""

from __future__ import annotations

import pytest
import torch

from peft_hoe import ExpertError, Merging, Pruning, Ranks, TaskSVD
from peft_hoe.experts.options import BuildOptions


def options(**changes):
    given = {
        "r": "auto", "pruning": Pruning(), "merging": Merging(), "svd": TaskSVD(), "rescale": "norm",
        "interpolation": "norm", "capture": (), "seed": 0, "dtype": None,
    }  # fmt: skip
    return BuildOptions.checked(**{**given, **changes})


def test_defaults_are_those_that_were_measured():
    assert options().to_dict() == {
        "r": {"rank": "auto", "energy": None, "maximum": 128, "modules": {}},
        "pruning": {"share": 0.4, "scope": "global"}, "merging": {"method": "ties", "options": {"density": 0.6}, "experts": {}},
        "svd": {"solver": "randomized", "tolerance": 1e-4}, "rescale": "norm", "interpolation": "norm", "capture": (),
        "seed": 0, "dtype": None, "device": "cpu",
    }  # fmt: skip


def test_short_forms_are_the_groups():
    short = options(pruning=0.6, merging="pcb", svd="exact", r=None, rescale="none", dtype="bfloat16")
    assert short.pruning == Pruning(0.6, "global")
    assert short.merging == Merging("pcb", {"density": 0.2})
    assert short.svd == TaskSVD("exact")
    assert (short.r, short.rescale, short.dtype) == (Ranks("full"), None, torch.bfloat16)
    assert options(pruning=None).pruning == options(pruning="none").pruning == Pruning(0.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: options(interpolation="cubic"), "interpolation is 'cubic'"),
        (lambda: options(r=0), "r is 0; allowed are"),
        (lambda: options(dtype="int8"), "dtype is 'int8'; allowed are"),
    ],
)
def test_what_is_not_allowed_is_named(make, message):
    with pytest.raises(ExpertError, match=message):
        make()
