"""λ from choices: the belief is the formula, simulated people are found, and slips are told."""

import numpy as np
import pytest

from peft_hoe import HoEError, PreferenceError, PreferenceEstimate

KAPPA = np.log(9) / 0.3  # errs in 10 % of the choices at a difference of 0.3


def answer(estimate, preference, texts, choices, rng):
    """Let somebody with that preference choose between proposed texts."""
    for _ in range(choices):
        first, second = estimate.propose(texts)
        prefers = 1 / (1 + np.exp(-KAPPA * preference @ (texts[first] - texts[second])))
        if rng.random() > prefers:
            first, second = second, first
        estimate.choose(texts[first], texts[second])


def test_the_belief_is_bayes_rule():
    # One choice at a known sharpness: posterior density sigmoid(κ (2λ − 1)) on the grid of 401 points.
    estimate = PreferenceEstimate(["a", "b"], sharpness=2.0)
    estimate.choose(better=[1, 0], worse=[0, 1])
    weights = np.linspace(1, 0, 401)
    density = 1 / (1 + np.exp(-2.0 * (2 * weights - 1)))
    mean = (density * weights).sum() / density.sum()
    np.testing.assert_allclose(estimate.mean, [mean, 1 - mean], rtol=0, atol=1e-12)
    error = (density * abs(weights - mean)).sum() / density.sum()
    np.testing.assert_allclose(estimate.expected_error, error, rtol=0, atol=1e-12)


def test_an_unknown_sharpness_is_averaged_out():
    unknown, parts = PreferenceEstimate(["a", "b"]), []
    unknown.choose([0.9, 0.1], [0.2, 0.7])
    for kappa in unknown._kappa:
        known = PreferenceEstimate(["a", "b"], sharpness=kappa)
        known.choose([0.9, 0.1], [0.2, 0.7])
        parts.append(np.exp(known._likelihood[:, 0]))
    density = np.sum(parts, axis=0)
    np.testing.assert_allclose(unknown._share(), density / density.sum(), rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "choices"), [(2, 20), (3, 40)])
def test_simulated_people_are_found(n, choices):
    # benchmarks/person_choices.py has 200 of them.
    rng = np.random.default_rng(0)
    errors = []
    for seed in range(12):
        wanted, texts = rng.dirichlet(np.ones(n)), rng.random((60, n))
        estimate = PreferenceEstimate([f"o{i}" for i in range(n)], seed=seed)
        answer(estimate, wanted, texts, choices, rng)
        errors.append(abs(estimate.mean - wanted).max())
    assert np.median(errors) < 0.1


def test_proposals_tell_more_than_random_pairs():
    estimate = PreferenceEstimate(["a", "b"], sharpness=KAPPA)
    rng = np.random.default_rng(0)
    answer(estimate, np.asarray([0.8, 0.2]), rng.random((40, 2)), 5, rng)
    texts = np.asarray([[0.5, 0.5], [0.51, 0.5], [0.2, 0.9], [0.5, 0.0]])
    first, second = estimate.propose(texts)
    assert {first, second} != {0, 1}  # whose choice is a coin's for everybody


def test_a_region_holds_its_share_of_the_belief():
    rng = np.random.default_rng(0)
    estimate = PreferenceEstimate(["a", "b", "c"], seed=0)
    answer(estimate, np.asarray([0.6, 0.3, 0.1]), rng.random((40, 3)), 10, rng)
    share, region = estimate._share(), estimate.region(0.8)
    inside = np.asarray([region.contains(point) for point in estimate._points])
    assert len(region.points) == inside.sum()
    assert 0.8 <= share[inside].sum() < 0.8 + share.max() + 1e-12
    assert share[inside].min() >= share[~inside].max() - 1e-12
    low, high = region.intervals["a"]
    assert (low, high) == (region.points[:, 0].min(), region.points[:, 0].max())
    before = estimate.mean.tolist()
    estimate.choose([1, 0, 0], [0, 0, 1])  # a region stays what it was
    assert all(region.contains(point) for point in region.points)
    assert estimate.mean.tolist() != before


def test_choices_can_be_taken_back():
    estimate = PreferenceEstimate(["a", "b"])
    estimate.choose([0.9, 0.1], [0.2, 0.7])
    once = estimate.mean.tolist()
    estimate.choose([0.1, 0.9], [0.2, 0.3])
    estimate.forget()
    assert len(estimate) == 1
    np.testing.assert_allclose(estimate.mean, once, rtol=0, atol=1e-15)
    estimate.forget(1)
    np.testing.assert_allclose(estimate.mean, [0.5, 0.5], rtol=0, atol=1e-12)


def test_rewards_by_name():
    by_name, by_place = PreferenceEstimate(["a", "b"]), PreferenceEstimate(["a", "b"])
    by_name.choose({"b": 0.1, "a": 0.9}, {"a": 0.2, "b": 0.7})
    by_place.choose([0.9, 0.1], [0.2, 0.7])
    assert by_name.preference == by_place.preference
    assert sum(by_name.preference.values()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("call", "message", "argument"),
    [
        (lambda e: e.choose([0.5, 0.5], [0.5, 0.5]), "both texts have the same rewards", "better"),
        (lambda e: e.choose([0.2, 0.7], [0.9, 0.1]), "contradicts an earlier one", "better"),
        (lambda e: e.choose([0.2], [0.9, 0.1]), r"better is \[0.2\]; give a finite reward for each of", "better"),
        (lambda e: e.choose([0.2, 0.1], {"a": 1}), r"worse is .*give a finite reward", "worse"),
        (lambda e: e.choose([0.2, float("nan")], [0, 0]), "give a finite reward", "better"),
        (lambda e: e.forget(2), "there are 1 choices", "choices"),
        (lambda e: e.region(1.0), "level is 1.0", "level"),
        (lambda e: e.propose([[0.5, 0.5]]), "no two texts differ", "texts"),
        (lambda e: e.propose([[0.9, 0.1], [0.2, 0.7]]), "were not shown before", "texts"),
        (lambda e: e.choose({"a": 1, "b": 0, "c": 3}, [0, 0]), "give a finite reward for each of", "better"),
        (lambda e: e.forget(-1), "there are 1 choices", "choices"),
        (lambda e: e.forget(0.5), "give a whole number", "choices"),
        (lambda e: e.forget("all"), "give a whole number", "choices"),
        (lambda e: e.region("most"), "level is 'most'", "level"),
        (lambda e: e.propose([[0.9, 0.1, 0.0]]), r"texts has \[0.9, 0.1, 0.0\]; give finite rewards", "texts"),
        (lambda e: e.propose([[0.9, 0.1], [0.3]]), r"texts has \[0.3\]", "texts"),
        (lambda e: e.propose([[0.9, float("inf")], [0.3, 0]]), r"texts has \[0.9, inf\]", "texts"),
        (lambda e: e.propose(["a text", "another"]), "texts has 'a text'", "texts"),
        (lambda e: e.propose([]), r"texts has \[\]", "texts"),
        (lambda e: e.propose(None), "texts has None", "texts"),
    ],
)
def test_bad_input_is_told_and_nothing_is_learnt(call, message, argument):
    estimate = PreferenceEstimate(["a", "b"])
    estimate.choose([0.9, 0.1], [0.2, 0.7])
    before = estimate._likelihood.copy()
    with pytest.raises(HoEError, match=message) as refused:
        call(estimate)
    assert refused.value.argument == argument
    np.testing.assert_array_equal(estimate._likelihood, before)
    assert len(estimate) == 1


def test_a_person_may_waver():
    estimate = PreferenceEstimate(["a", "b"])
    estimate.choose([0.9, 0.1], [0.2, 0.7])
    estimate.choose([0.2, 0.7], [0.9, 0.1], again=True)
    assert len(estimate) == 2


def test_texts_by_name():
    estimate = PreferenceEstimate(["a", "b"])
    rows = [[0.9, 0.1], [0.2, 0.7]]
    assert estimate.propose([{"b": b, "a": a} for a, b in rows]) == PreferenceEstimate(["a", "b"]).propose(rows)


@pytest.mark.parametrize("objectives", [[], "kind", ["a", "a"], None, 2, [1, 2], [["a"], "b"]])
def test_objectives_that_are_none(objectives):
    with pytest.raises(HoEError, match="give a list of names"):
        PreferenceEstimate(objectives)


@pytest.mark.parametrize("sharpness", [0, -1.0, float("inf"), float("nan"), "high", [1, 2]])
def test_a_sharpness_that_is_none(sharpness):
    with pytest.raises(HoEError, match="give a positive number"):
        PreferenceEstimate(["a", "b"], sharpness=sharpness)


def test_a_region_takes_preferences_only():
    with pytest.raises(PreferenceError, match="sums to"):
        PreferenceEstimate(["a", "b"]).region().contains([0.9, 0.9])


def test_six_objectives():
    estimate = PreferenceEstimate(list("abcdef"), sharpness=KAPPA)
    estimate.choose([1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0])
    assert estimate.preference["a"] > 1 / 6 > estimate.preference["b"]
