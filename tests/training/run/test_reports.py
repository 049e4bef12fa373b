"""Where metrics go: `report_to` in all trainers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers.integrations import integration_utils

from peft_hoe import HoEError
from peft_hoe.training.run.reports import check_reports

Make = Callable[..., Any]
TRAINERS = ["make_trainer", "make_grpo", "make_dpo_trainer", "make_distillation"]


@pytest.fixture(params=TRAINERS)
def make(request: pytest.FixtureRequest) -> Make:
    """A trainer of each kind on the toy."""
    found: Make = request.getfixturevalue(request.param)
    return found


def test_metrics_are_plain_numbers(make: Make) -> None:
    """TensorBoard drops anything else, and others write it as text."""
    trainer = make(logging_steps=1)
    trainer.train()
    history = trainer.state.log_history
    assert any("router/entropy" in entry for entry in history)
    assert {type(value) for entry in history for value in entry.values()} <= {int, float}


def test_tensorboard(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = make(logging_steps=1, report_to=["tensorboard"])
    trainer.train()
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    written = [event.value for event in events.Scalars("train/router/entropy")]
    logged = [entry["router/entropy"] for entry in trainer.state.log_history if "router/entropy" in entry]
    assert written == pytest.approx(logged[: len(written)])
    assert len(written) >= 2


def test_trackio(make: Make, trackio: Any) -> None:
    make(logging_steps=1, report_to=["trackio"]).train()
    assert [name for name, _ in trackio.calls][:2] == ["init", "log"]
    assert trackio.calls[-1][0] == "finish"
    assert any("train/router/entropy" in metrics for name, metrics in trackio.calls if name == "log")
    assert trackio.config["router"] == "r0"


def test_reports_that_cannot_be_made_are_named() -> None:
    check_reports([])
    with pytest.raises(HoEError, match=r"reported to 'tensorbord'; use one of .*tensorboard"):
        check_reports(["tensorbord"])


def test_a_report_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: False)
    with pytest.raises(HoEError, match="needs a package that is not installed: pip install wandb"):
        check_reports(["wandb"])
