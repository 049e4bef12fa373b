"""What the training of a router leaves in the adapter."""

from __future__ import annotations

import warnings

import pytest

from peft_hoe import HoEWarning
from peft_hoe.training.run.training_state import RouterTrainingState


def calibrated(model):
    """The model with a dial, made for its experts and routers as they are."""
    config = model.peft_config["default"]
    ends = [[0.0, 1.0], [1.0, 0.0]]
    config.calibration = {
        "positions": ends, "preferences": ends, "simplices": [[0, 1]], "made_for": config.calibrates()
    }  # fmt: skip
    model.set_preference([0.5, 0.5], calibrated=True)
    return model


def test_a_router_that_is_trained_again_drops_the_calibration(toys):
    model = toys.make_policy()
    model.mark_trained("r0")
    calibrated(model)
    state = RouterTrainingState(model, "r0")
    with pytest.warns(HoEWarning, match="made before router 'r0' was trained again, so it is dropped"):
        state.put_router()
    assert model.peft_config["default"].calibration is None


def test_also_one_whose_mark_was_taken_away_meanwhile(toys):
    model = toys.make_policy()
    model.mark_trained("r0")
    calibrated(model).mark_trained("r0", trained=False)
    with pytest.warns(HoEWarning, match="trained again"):
        RouterTrainingState(model, "r0").put_router()
    assert model.peft_config["default"].calibration is None


def test_a_router_that_did_not_help_leaves_it(toys):
    model = calibrated(toys.make_policy())
    state = RouterTrainingState(model, "r0")
    state.helps = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state.put_router()
    model.set_preference([0.25, 0.75], calibrated=True)
    assert dict(model.preference) == pytest.approx({"low": 0.25, "high": 0.75})
