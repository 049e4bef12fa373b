"""A calibrated dial: arc length for two objectives, no fold for more, and what it holds for."""

import numpy as np
import pytest
import torch
from peft import PeftModel

from peft_hoe import Decoding, HoEConfig, HoEError, HoEWarning, PreferenceError, das_dennis, demo, sweep
from peft_hoe.evaluation import calibrate
from peft_hoe.evaluation.front.calibrate import _lengths
from peft_hoe.metrics import gap_variation
from peft_hoe.triangulation import triangulate

from .test_front import sweep_of


def renamed(sweep):
    sweep.objectives = ("cheerful", "vivid")
    return sweep


def config(n=2, **others):
    return HoEConfig(objectives=list("abcde"[:n]), **others)


def test_positions_are_arc_lengths():
    # Steps of 1 and 3 (a quarter and three quarters of the way).
    made = config()
    report = calibrate(made, sweep_of([[0, 4], [1, 4], [4, 4]], [[0, 1], [0.5, 0.5], [1, 0]]))
    # Scaled by each objective's range; b has none.
    np.testing.assert_allclose(report.calibration.positions, [[0, 1], [0.25, 0.75], [1, 0]], rtol=0, atol=1e-12)
    dial = report.calibration
    np.testing.assert_allclose(dial.preference(np.asarray([0.25, 0.75])), [0.5, 0.5], atol=1e-12)
    np.testing.assert_allclose(dial.preference(np.asarray([0.5, 0.5])), [2 / 3, 1 / 3], atol=1e-12)
    assert report.variation == pytest.approx(0.5, abs=0.1)
    assert report.calibrated == pytest.approx(0, abs=1e-9)
    assert made.calibration == dial.to_dict()


def test_steps_along_a_curved_front_become_equal():
    preferences = das_dennis(2, 20)
    angle = np.pi / 2 * preferences[:, 0] ** 3
    points = np.stack([np.sin(angle), np.cos(angle)], axis=1)
    report = calibrate(config(), sweep_of(points, preferences))
    steps = das_dennis(2, 10)
    reached = np.asarray([report.calibration.preference(step) for step in steps])
    angles = np.pi / 2 * reached[:, 0] ** 3
    found = gap_variation(np.stack([np.sin(angles), np.cos(angles)], axis=1), steps)
    raw = gap_variation(
        np.stack([np.sin(np.pi / 2 * steps[:, 0] ** 3), np.cos(np.pi / 2 * steps[:, 0] ** 3)], 1), steps
    )
    assert found < raw / 4
    middle = report.calibration.preference(np.asarray([0.5, 0.5]))
    assert np.pi / 2 * middle[0] ** 3 == pytest.approx(np.pi / 4, abs=0.05)


@pytest.mark.parametrize("n", [3, 4])
def test_more_objectives_keep_corners_and_faces_and_never_fold(n):
    preferences = das_dennis(n, 4)
    points = preferences**3
    made = config(n)
    report = calibrate(made, sweep_of(points, preferences))
    positions = report.calibration.positions
    np.testing.assert_array_equal(positions > 1e-9, preferences > 1e-9)  # corners, edges and faces stay
    np.testing.assert_allclose(positions.sum(axis=1), 1, atol=1e-9)
    simplices = triangulate(preferences)
    signs = np.sign(np.linalg.det(positions[simplices])) * np.sign(np.linalg.det(preferences[simplices]))
    assert (signs > 0).all()
    assert report.calibrated < report.variation
    rng = np.random.default_rng(0)
    for point in rng.dirichlet(np.ones(n), size=50):
        found = report.calibration.preference(point)
        assert found.min() >= 0
        assert found.sum() == pytest.approx(1, abs=1e-12)


def test_noise_is_taken_off_the_steps():
    # A step of (3, 4) whose replicates have a variance of 9 is sqrt(25 - 9) long; one below its noise counts as the shortest.
    points = np.asarray([[0.0, 0.0], [3.0, 4.0], [3.0, 6.0]])
    drawn = np.stack([points, points])
    drawn[:, 1, 0] += [3.0, -3.0]
    drawn[:, 2, 0] += [3.0, -3.0]
    lengths = _lengths(points, drawn, np.asarray([[0, 1], [0, 2], [1, 2]]))
    np.testing.assert_allclose(lengths, [4.0, 6.0, 2.0], rtol=1e-12)
    drawn[:, 2, 0] = [3 + 60.0, 3 - 60.0]
    lengths = _lengths(points, drawn, np.asarray([[0, 1], [0, 2], [1, 2]]))
    np.testing.assert_allclose(lengths[1:], 0.05 * (5 + 45**0.5 + 2) / 3, rtol=1e-12)


def test_a_stretch_that_falls_is_told():
    with pytest.warns(HoEWarning, match=r"a falls by 0.3 from \[0.25, 0.75\] to \[0.5, 0.5\], though its weight grows"):
        report = calibrate(
            config(),
            sweep_of([[0, 1], [0.6, 0.8], [0.3, 0.7], [0.9, 0.3], [1, 0]], das_dennis(2, 4)[::-1], spread=0.01),
        )
    assert len(report.stretches) == 1
    assert "dial -> preference" in report.table()


def test_it_is_used_saved_and_loaded(tmp_path):
    model, tokenizer = demo.load_demo_adapter().double(), demo.load_tokenizer()
    batch = tokenizer(["Once upon a time", "One day there was"], return_tensors="pt", padding=True)
    report = calibrate(model, renamed(sweep_of([[0, 1], [0.1, 0.9], [1, 0]], [[0, 1], [0.5, 0.5], [1, 0]])))
    model.set_preference([0.05, 0.95], calibrated=True)
    wanted = report.calibration.preference(np.asarray([0.05, 0.95]))
    assert model.preference["cheerful"] == pytest.approx(wanted[0], abs=1e-12)
    assert wanted[0] > 0.2  # a tenth of the way along the front is at half of the weight
    with torch.no_grad(), model.use_preference([[0.1, 0.9], [1, 0]], calibrated=True):
        rows = model(**batch).logits
    positions = [report.calibration.preference(np.asarray(row)).tolist() for row in ([0.1, 0.9], [1.0, 0.0])]
    with torch.no_grad():
        torch.testing.assert_close(rows, model(**batch, preference=positions).logits, rtol=0, atol=1e-10)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(demo.load_base(), tmp_path)
    again.set_preference([0.05, 0.95], calibrated=True)
    assert again.preference["cheerful"] == pytest.approx(wanted[0], abs=1e-12)


def test_it_holds_for_its_experts_and_trained_routers():
    model = demo.load_demo_adapter(routers=[[0.75, 0.25]])
    with pytest.raises(PreferenceError, match="has no calibration"):
        model.set_preference([0.5, 0.5], calibrated=True)
    calibrate(model, renamed(sweep_of([[0, 1], [1, 0]], [[0, 1], [1, 0]])))
    before = dict(model.preference)
    model.mark_trained()
    with pytest.raises(PreferenceError, match="made for other experts or routers"):
        model.set_preference([0.9, 0.1], calibrated=True)
    assert dict(model.preference) == before


@pytest.mark.parametrize(
    "given",
    [
        {"positions": [[1, 0]]},
        {"positions": [[1, 0]], "preferences": [[1, 0]], "simplices": [[0, 3]], "made_for": {}},
        "0.5",
    ],
)
def test_a_calibration_that_is_none(given):
    with pytest.raises(PreferenceError, match="is no calibration of 2 objectives"):
        config(calibration=given)


def test_a_calibration_is_assigned_to_a_model_in_use():
    model = demo.load_demo_adapter()
    made = config()
    calibrate(made, sweep_of([[0, 1], [1, 0]], [[0, 1], [1, 0]]))
    given = {**made.calibration, "made_for": model.peft_config["default"].calibrates()}
    model.peft_config["default"].calibration = given
    model.set_preference([0.25, 0.75], calibrated=True)
    assert model.preference["cheerful"] == pytest.approx(0.25, abs=1e-12)
    with pytest.raises(PreferenceError, match="is no calibration of 2 objectives"):
        model.peft_config["default"].calibration = {"positions": [[1, 0]]}
    assert model.peft_config["default"].calibration == given


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (sweep_of([[0, 0, 1], [1, 0, 0], [0, 1, 0]], np.eye(3)), "of another adapter: its objectives are"),
        (sweep_of([[0, 1], [1, 0]], [[0, 1], [0.9, 0.1]]), r"lacks the preferences of \['a'\] alone"),
        (sweep_of([[0, np.nan], [1, 0]], [[0, 1], [1, 0]]), "is empty, or lacks rewards"),
        (sweep_of(np.zeros((0, 2)), np.zeros((0, 2))), "is empty, or lacks rewards"),
        (sweep_of([[1, 1], [1, 1]], [[0, 1], [1, 0]]), "the rewards are the same at all preferences"),
        ("out", "sweep is 'out'; give what peft_hoe.sweep returned, or read its directory"),
    ],
)
def test_sweeps_that_do_not_fit(given, message):
    made = config()
    with pytest.raises(HoEError, match=message):
        calibrate(made, given)
    assert made.calibration is None


@pytest.mark.slow
def test_a_sweep_of_a_model_with_other_weights_or_without_its_routers():
    model, tokenizer = demo.load_demo_adapter(routers=[[0.75, 0.25]]), demo.load_tokenizer()
    model.mark_trained()

    def swept(**options):
        return sweep(
            model, tokenizer, demo.load_prompts()[:4], demo.REWARDS, [[1, 0], [0.7, 0.3], [0, 1]],
            decoding=Decoding(16), progress=False, **options,
        )  # fmt: skip

    with pytest.raises(HoEError, match="made with routers='static', but the adapter has trained routers"):
        calibrate(model, swept(routers="static"))
    found = swept()
    with torch.no_grad():
        next(weight for name, weight in model.named_parameters() if "hoe_router" in name).add_(0.1)
    with pytest.raises(HoEError, match="its base or its adapter has other weights"):
        calibrate(model, found)
    assert model.peft_config["default"].calibration is None


def test_a_sweep_of_another_adapter():
    given = sweep_of([[0, 1], [1, 0]], [[0, 1], [1, 0]])
    for other in (config(routers=[[0.25, 0.75]]), config(interpolation="norm")):
        given.runs = [{"calibrates": other.calibrates()}]
        with pytest.raises(HoEError, match="its experts or trained routers are not these"):
            calibrate(config(), given)
    given.runs = [{"calibrates": config().calibrates()}]
    calibrate(config(), given)
