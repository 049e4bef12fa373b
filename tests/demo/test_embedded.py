"""The embedded models as anyone loads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import peft_hoe
from peft_hoe import demo
from peft_hoe.errors import HoEError


def test_an_adapter_is_built_from_them_and_steered(tmp_path: Path) -> None:
    report = demo.build_demo_adapter(tmp_path / "adapter", experts=[], routers=[[0.75, 0.25]])
    assert [expert["name"] for expert in report.experts] == ["cheerful", "vivid"]
    assert [router["preference"] for router in report.routers] == [[0.75, 0.25]]
    model, tokenizer, prompts = demo.load_demo_adapter(), demo.load_tokenizer(), demo.load_prompts()[:8]
    assert not model.training
    corners = [[1.0, 0.0], [0.0, 1.0]]
    found = peft_hoe.sweep(
        model, tokenizer, prompts, demo.REWARDS, corners, decoding={"max_new_tokens": 24}, progress=False
    )
    assert found.objectives == ("cheerful", "vivid")
    assert found.points[0, 0] > found.points[1, 0]
    assert found.points[1, 1] > found.points[0, 1]


def test_options_are_those_of_build_adapter() -> None:
    assert demo.load_demo_adapter(r=2).peft_config["default"].r == 2
    with pytest.raises(TypeError, match="no_such_option"):
        demo.load_demo_adapter(no_such_option=1)
    with pytest.raises(HoEError, match="rescale is -1"):
        demo.load_demo_adapter(rescale=-1)


@pytest.mark.slow
def test_loading_them_needs_no_extra_and_no_trainer(imported_by: Callable[[str], set[str]]) -> None:
    absent = {"trl", "datasets", "moocore", "matplotlib", "evaluate", "peft_hoe.training", "peft_hoe.evaluation"}
    assert not imported_by("peft_hoe.demo") & absent
