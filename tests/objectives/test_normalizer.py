"""The scale of rewards: a payoff table, and whether its spread is more than chance."""

from __future__ import annotations

import json
import re
import warnings

import numpy as np
import pytest

from peft_hoe import HoEWarning
from peft_hoe.errors import RewardError
from peft_hoe.objectives import RewardNormalizer


def test_normalising_by_hand():
    normalizer = RewardNormalizer([[0.8, 2.0], [0.3, 6.0]], ["a", "b"], {"do_sample": False})
    np.testing.assert_array_equal(normalizer.ideal, [0.8, 6.0])
    np.testing.assert_array_equal(normalizer.nadir, [0.3, 2.0])
    np.testing.assert_allclose(normalizer.normalize([0.55, 8.0]), [0.5, 1.5])
    np.testing.assert_allclose(normalizer.normalize(np.asarray([[[0.3, np.nan]]])), [[[0.0, np.nan]]])
    with pytest.raises(RewardError, match="do not end in the 2"):
        normalizer.normalize([1.0, 2.0, 3.0])


def test_state_survives_json():
    normalizer = RewardNormalizer([[0.8, 2.0], [0.3, 6.0]], ["a", "b"], {"do_sample": False})
    again = RewardNormalizer.from_state_dict(json.loads(json.dumps(normalizer.state_dict())))
    assert again.state_dict() == normalizer.state_dict()


@pytest.mark.parametrize(
    ("payoff", "match"),
    [
        ([[0.8, 2.0], [0.3, 2.0]], "'b' is constant: every expert's mean reward is 2,"),
        ([[0.0, 2.0], [0.0, 3.0]], "'a' is constant"),
        ([[0.8, 2.0]], "2 x 2"),
        ([[0.8, np.nan], [0.3, 1.0]], "2 x 2 finite"),
    ],
)
def test_bad_tables(payoff, match):
    with pytest.raises(RewardError, match=match):
        RewardNormalizer(payoff, ["a", "b"])


def told(rewards) -> list[str]:
    """What is said about a table that is measured from rewards."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        RewardNormalizer.measured(rewards, list("abcde")[: len(rewards)])
    assert all(issubclass(item.category, HoEWarning) for item in caught)
    return [str(item.message) for item in caught]


def test_tables_of_drawn_prompts_by_hand():
    """Prompt 0 twice gives its own rewards; both once give the means; a missing reward is left out."""
    rewards = np.asarray([[[[1.0, 0.0]], [[3.0, np.nan]]], [[[0.0, 2.0]], [[0.0, 4.0]]]])  # (N, P, T, N)
    found = RewardNormalizer.measured(rewards, ["a", "b"]).drawn([[0, 0], [0, 1]])
    np.testing.assert_allclose(found, [[[1, 0], [0, 2]], [[2, 0], [0, 3]]])
    with pytest.raises(RewardError, match="given as numbers"):
        RewardNormalizer(np.eye(2), ["a", "b"]).drawn([[0]])


def test_the_errors_of_the_spreads_by_hand():
    """Experts answer the same prompts, so that what prompts differ in does not count; texts of a prompt are averaged."""
    good = np.array([[4.0, 6.0], [8.0, 8.0], [1.0, 5.0]])  # (P, T) of the better expert; means 5, 8, 3
    poor = np.array([[1.0, 5.0], [6.0, 6.0], [1.0, 1.0]])  # means 3, 6, 1
    rewards = np.stack([np.stack([good, poor], -1), np.stack([poor, good + np.array([[0.0], [1.0], [-1.0]])], -1)])
    found = RewardNormalizer.measured(rewards, ["a", "b"], {"do_sample": True}, {"prompts": 3})
    np.testing.assert_allclose(found.payoff, [[16 / 3, 10 / 3], [10 / 3, 16 / 3]])
    # Differences by prompt: 2, 2, 2 in a; 2, 3, 1 in b, of deviation 1.
    np.testing.assert_allclose(found.measurement["spread_errors"], [0.0, 1 / np.sqrt(3)], atol=1e-12)
    assert found.measurement["prompts"] == 3
    again = RewardNormalizer.from_state_dict(json.loads(json.dumps(found.state_dict())))
    assert again.measurement == found.measurement


def test_the_error_of_normalised_rewards_by_hand():
    """In a the worst expert earns 0 and 2, the best 4 and 2: a spread of 2. Half of each earns 2 on both prompts."""
    table = RewardNormalizer.measured([[[[4.0, 0.0]], [[2.0, 0.0]]], [[[0.0, 3.0]], [[2.0, 5.0]]]], ["a", "b"])
    np.testing.assert_allclose(table.errors([0.0, 0.0]), [1 / 2, 0])  # ± 1 of means, in spreads of 2 and 4
    np.testing.assert_allclose(table.errors([1.0, 1.0]), [1 / 2, 1 / 4])
    np.testing.assert_allclose(table.errors([0.5, 0.5]), [0, 1 / 8])
    assert np.isnan(RewardNormalizer(np.eye(2), ["a", "b"]).errors([0.0, 1.0])).all()


def test_the_error_of_normalised_rewards_is_that_of_drawn_tables():
    generator = np.random.default_rng(0)
    apart = np.asarray([[1.0, 0.0], [0.0, 1.0]])[:, None, None]
    table = RewardNormalizer.measured(apart + generator.normal(0, 0.5, (2, 400, 1, 2)), ["a", "b"])
    at = np.asarray([0.3, 1.2])
    raw = table.nadir + at * (table.ideal - table.nadir)
    tables = table.drawn(generator.integers(0, 400, (2000, 400)))
    nadir, ideal = tables.min(1), tables.max(1)
    np.testing.assert_allclose(((raw - nadir) / (ideal - nadir)).std(0), table.errors(at), rtol=0.1)


@pytest.mark.filterwarnings("default:the experts hardly differ")
def test_a_spread_that_may_be_chance_is_told():
    """A reward that does not depend on the expert would become noise of a standard deviation of many units."""
    generator = np.random.default_rng(0)
    noise = generator.random((2, 128, 1, 1))
    sure = np.array([[1.0], [0.0]])[:, None, None] + generator.normal(0, 0.5, (2, 128, 1, 1))
    found = told(np.concatenate([noise, sure], axis=3))
    assert len(found) == 1
    said = re.search(
        r"in objective 'a': .* spread by ([\d.]+) ± ([\d.]+), which is ([\d.]+) standard errors on these 128", found[0]
    )
    assert said is not None
    assert float(said[1]) == pytest.approx(abs(noise[0].mean() - noise[1].mean()), rel=0.01)
    assert float(said[2]) == pytest.approx((noise[0] - noise[1]).std(ddof=1) / np.sqrt(128), rel=0.05)
    assert float(said[3]) < 3
    assert "Measure on more prompts (payoff_prompts of a trainer)" in found[0]
    few = told(
        np.concatenate([sure[:, :4] / 10, sure[:, :4]], axis=3)
    )  # differ by 10 times their noise, on 128 prompts only
    assert all("on these 4 prompts" in text for text in few)


def test_how_often_chance_is_taken_for_a_difference():
    """Of 2,500 rewards that none of five experts has learnt, on 64 prompts, at most 1 in 250 passes in silence.

    Within three standard errors some 75 would: the best and the worst of five differ by more than two do.
    """
    generator = np.random.default_rng(1)
    silent = sum(5 - len(told(generator.normal(size=(5, 64, 1, 5)))) for _ in range(500))
    assert silent <= 10


def test_missing_rewards_are_left_out_of_means_and_errors():
    rewards = np.zeros((2, 4, 1, 2))
    rewards[0, :, 0, 0], rewards[1, :, 0, 1] = [1, 2, 3, np.nan], [5, 5, 5, 5]
    found = RewardNormalizer.measured(rewards, ["a", "b"])
    np.testing.assert_allclose(found.payoff, [[2, 0], [0, 5]])
    np.testing.assert_allclose(found.measurement["spread_errors"], [1 / np.sqrt(3), 0])
    one = RewardNormalizer.measured(rewards[:, :1], ["a", "b"])
    assert one.measurement["spread_errors"] == [None, None]  # one prompt says nothing about chance
    rewards[1, :, 0, 1] = np.nan
    with pytest.raises(RewardError, match="2 x 2 finite"):
        RewardNormalizer.measured(rewards, ["a", "b"])
