"""Which preference reaches what: numbers by hand, and every bound against a search over the simplex."""

import numpy as np
import pytest

from peft_hoe import HoEConfig, HoEError, HoEWarning, PreferenceError, RewardNormalizer, Sweep, das_dennis
from peft_hoe.evaluation import Front, UnreachableError, calibrate, weaknesses


def sweep_of(points, preferences, spread=0.0, prompts=8):
    """A sweep whose mean rewards are the given points."""
    points, rng = np.asarray(points, dtype=float), np.random.default_rng(0)
    noise = spread * rng.standard_normal((len(points), prompts, points.shape[1]))
    values = points[:, None] + noise - noise.mean(axis=1, keepdims=True)
    texts = [[["text"]] * prompts for _ in points]
    names = tuple("abcde"[: points.shape[1]])
    return Sweep(
        name="HoE", objectives=names, preferences=np.asarray(preferences, dtype=float),
        prompts=[f"p{i}" for i in range(prompts)], rewards=values[None, :, :, None], completions=[texts], normalizer=None,
        payoff_source="given", reference_point=-1.0,
    )  # fmt: skip


LINE = sweep_of([[1, 0], [0.8, 0.6], [0, 1]], [[1, 0], [0.5, 0.5], [0, 1]])


def test_between_two_preferences_rewards_are_linear():
    assert Front(LINE).at([0.75, 0.25]) == pytest.approx({"a": 0.9, "b": 0.3}, abs=1e-12)
    assert Front(LINE).at({"a": 0.25, "b": 0.75}) == pytest.approx({"a": 0.4, "b": 0.8}, abs=1e-12)


def test_the_most_of_one_with_the_other_kept():
    found = Front(LINE).solve(maximize="a", at_least={"b": 0.8})
    # b is 0.8 halfway between [0.5, 0.5] and [0, 1], where a is 0.4.
    assert found.preference == pytest.approx({"a": 0.25, "b": 0.75}, abs=1e-9)
    assert found.rewards == pytest.approx({"a": 0.4, "b": 0.8}, abs=1e-9)
    assert found.confidence == 1.0
    assert Front(LINE).solve(maximize="a").preference == pytest.approx({"a": 1.0, "b": 0.0}, abs=1e-9)


def test_a_target_is_exceeded_evenly():
    found = Front(LINE).solve(target=[0.6, 0.4])
    # Between [1, 0] and [0.8, 0.6]: a - 0.6 = b - 0.4 at b = 0.6 on the edge: 0.2 = 0.2, the best there is.
    assert found.preference == pytest.approx({"a": 0.5, "b": 0.5}, abs=1e-9)
    assert min(found.rewards["a"] - 0.6, found.rewards["b"] - 0.4) == pytest.approx(0.2, abs=1e-9)


def test_what_is_out_of_reach_is_said_with_what_is_near():
    with pytest.raises(UnreachableError, match=r"does not reach .*0\.3 short") as refused:
        Front(LINE).solve(target={"a": 1.1, "b": 0.9})
    assert refused.value.reached == pytest.approx({"a": 0.8, "b": 0.6}, abs=1e-9)
    assert refused.value.preference == pytest.approx({"a": 0.5, "b": 0.5}, abs=1e-9)
    with pytest.raises(UnreachableError, match="ask for less"):
        Front(LINE).solve(maximize="a", at_least={"b": 1.01})


def test_three_objectives_against_a_search():
    preferences = das_dennis(3, 4)
    points = np.sqrt(preferences) + 0.1 * np.sin(7 * preferences[:, ::-1])
    front = Front(sweep_of(points, preferences))
    found = front.solve(maximize="a", at_least={"b": 0.5, "c": 0.4})
    fine = np.asarray([list(front.at(point).values()) for point in das_dennis(3, 60)])
    kept = fine[(fine[:, 1] >= 0.5) & (fine[:, 2] >= 0.4)]
    assert found.rewards["b"] >= 0.5 - 1e-9
    assert found.rewards["c"] >= 0.4 - 1e-9
    assert kept[:, 0].max() - 1e-9 <= found.rewards["a"] <= kept[:, 0].max() + 0.05
    assert front.at(found.preference) == pytest.approx(found.rewards, abs=1e-9)
    even = front.solve(target=[0.4, 0.4, 0.4])
    assert min(even.rewards.values()) >= fine.min(axis=1).max() - 1e-9


def test_intervals_hold_the_prediction_and_confidence_counts_replicates():
    front = Front(
        sweep_of([[1, 0], [0.8, 0.6], [0, 1]], [[1, 0], [0.5, 0.5], [0, 1]], spread=0.5, prompts=40), level=0.9
    )
    found = front.solve(maximize="a", at_least={"b": 0.7})
    for name, (low, high) in found.intervals.items():
        assert low < found.rewards[name] < high
    assert 0.3 < found.confidence < 0.7  # the bound is met exactly: about half of the replicates fall short
    assert found.level == 0.9


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "say either maximize="),
        ({"maximize": "a", "target": [1, 1]}, "say either maximize="),
        ({"at_least": {"a": 1}}, "say either maximize="),
        ({"maximize": "c"}, r"maximize is 'c'; the objectives are \['a', 'b'\]"),
        ({"maximize": "a", "at_least": {"c": 0.1}}, r"at_least names \['c'\]"),
        ({"maximize": "a", "at_least": {"b": float("nan")}}, "give finite rewards"),
        ({"target": [0.1]}, "give a reward for each of"),
        ({"target": "ab"}, "give a reward for each of"),
        ({"target": {"a": "much"}}, "give finite rewards"),
        ({"target": [-float("inf"), 1]}, "give finite rewards"),
        ({"target": {}}, "give finite rewards"),
        ({"maximize": "a", "at_least": {"b": -float("inf")}}, "give finite rewards"),
    ],
)
def test_questions_that_are_none(asked, message):
    with pytest.raises(HoEError, match=message):
        Front(LINE).solve(**asked)


def test_on_a_measured_scale_intervals_hold_the_scales_error():
    """The sweep has no noise, so that all that there is comes from the table's prompts; a table of numbers is exact."""
    noise = np.random.default_rng(0).normal(0, 0.5, (2, 16, 1, 2))
    scale = RewardNormalizer.measured(np.eye(2)[:, None, None] + noise - noise.mean(1, keepdims=True), ["a", "b"])
    widths = []
    for normalizer in (RewardNormalizer(scale.payoff, ["a", "b"]), scale):
        sweep = sweep_of(LINE.points, LINE.preferences)
        sweep.normalizer = normalizer
        found = Front(sweep, normalized=True).solve(maximize="a", at_least={"b": 0.5})
        low, high = found.intervals["b"]
        assert low <= found.rewards["b"] <= high
        widths.append(high - low)
    assert widths[0] == pytest.approx(0)
    assert widths[1] > 0.1


def test_an_interval_holds_its_prediction():
    """One prompt in nine has all of the reward, so that a single replicate mostly misses the mean."""
    sweep = sweep_of([[1, 0], [0, 1]], [[1, 0], [0, 1]], prompts=9)
    sweep.rewards[:] = 0.0
    sweep.rewards[0, :, 0] = 9.0
    for seed in range(5):
        found = Front(sweep, replicates=1, seed=seed).solve(maximize="a")
        assert found.intervals["a"][0] <= found.rewards["a"] <= found.intervals["a"][1]


@pytest.mark.parametrize("level", [0, 1.0, 95, "most"])
def test_a_level_that_is_none(level):
    with pytest.raises(HoEError, match=f"level is {level!r}; give a share between 0 and 1"):
        Front(LINE, level=level)


@pytest.mark.filterwarnings("default:the experts hardly differ")
@pytest.mark.parametrize(
    "read",
    [
        lambda sweep: Front(sweep, normalized=True),
        weaknesses,
        lambda sweep: calibrate(HoEConfig(objectives=["a", "b"]), sweep),
    ],
)
def test_a_scale_that_may_be_chance_is_told(read):
    sweep = sweep_of(LINE.points, LINE.preferences)
    sweep.normalizer = RewardNormalizer(np.eye(2), ["a", "b"], measurement={"spread_errors": [0.1, 0.5]})
    with pytest.warns(HoEWarning, match="hardly differ in objective 'b'.* 2.0 standard errors"):
        read(sweep)


def test_sweeps_that_say_too_little():
    for read in (Front, weaknesses):
        with pytest.raises(HoEError, match=r"sweep is 'out'; give what peft_hoe.sweep returned"):
            read("out")
    with pytest.raises(HoEError, match="the one objective"):
        Front(sweep_of([[1]], [[1]]))
    with pytest.raises(PreferenceError, match="lie on fewer than 1 dimensions"):
        Front(sweep_of([[1, 0]], [[1, 0]]))
    with pytest.raises(HoEError, match="no payoff table"):
        Front(LINE, normalized=True)
    with pytest.raises(HoEError, match="do not surround"):
        Front(sweep_of([[1, 0], [0.8, 0.6]], [[1, 0], [0.5, 0.5]])).at([0, 1])
    with pytest.raises(HoEError, match="has no reward at"):
        Front(sweep_of([[1, np.nan], [0, 1]], [[1, 0], [0, 1]]))
