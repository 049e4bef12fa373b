"""Whether a router helped, and what becomes of one that did not."""

from __future__ import annotations

import logging
import sys

import numpy as np
import pytest
from transformers import TrainerCallback

from peft_hoe import HoEError, HoEWarning, RewardNormalizer
from peft_hoe.training.run import verdict as verdicts


def rewards(first, second, prompts=50):
    """Normalised rewards `(P, 2)`, the same for all prompts."""
    return np.tile([first, second], (prompts, 1)).astype(float)


def judge(untrained, trained, merged=(), texts=1, normalizer=None, own_prompts=False):
    """Of one preference, or several; on a table of given numbers that leaves rewards as they are, where no other is said."""
    dials = [np.reshape(one, (-1, *np.shape(one)[-2:])) for one in (untrained, trained)]
    n = dials[0].shape[2]
    experts = np.reshape(merged, (len(merged), *dials[0].shape[1:]))
    scale = RewardNormalizer(np.eye(n), list("abcdefgh")[:n]) if normalizer is None else normalizer
    return verdicts.judge("r0", *dials, experts, texts=texts, normalizer=scale, own_prompts=own_prompts)


def table(best, worst):
    """A payoff table of two objectives on prompts `(P,)`: in both the one's own expert earns `best`, the other's `worst`."""
    cells = np.asarray([[best, worst], [worst, best]], dtype=float)  # (expert, objective, P)
    return RewardNormalizer.measured(
        np.moveaxis(cells, 2, 1)[:, :, None], ["a", "b"], measurement={"prompts": len(best)}
    )


# Above -0.1 the points (1, 0) and (0, 1) enclose 0.1 * 1.1 + 0.1 * 1 = 0.21, and a point (a, b) between them a * b more.


def test_it_compares_hypervolumes_with_the_objectives_own_experts():
    verdict = judge(rewards(0.4, 0.6), rewards(0.5, 0.7), texts=4)
    assert (verdict.untrained, verdict.trained) == pytest.approx((0.21 + 0.24, 0.21 + 0.35))
    assert (verdict.low, verdict.high, verdict.share) == pytest.approx((0.11, 0.11, 1.0))
    assert verdict.helps
    assert "0.560 trained, 0.450 untrained" in str(verdict)
    assert "4 texts each; larger by 0.110 [0.110, 0.110]" in str(verdict)


def test_merged_experts_are_part_of_the_front():
    """Beside (0.8, 0.8) the points (0.9, 0.5) and (0.85, 0.75) add 0.1 * 0.5 and 0.05 * 0.75."""
    slid = judge(rewards(0.9, 0.5), rewards(0.85, 0.75), merged=[rewards(0.8, 0.8)])
    assert (slid.untrained, slid.trained) == pytest.approx((0.21 + 0.64 + 0.05, 0.21 + 0.64 + 0.0375))
    assert not slid.helps
    assert judge(rewards(0.9, 0.5), rewards(0.85, 0.75)).helps  # without it there would be something to gain


def test_sliding_along_a_front_wins_next_to_nothing():
    """On a straight front even steps enclose most, so that a dial that slides towards an end loses a little."""
    even, slid, outward = ([rewards(a, level - a) for a in at] for at, level in (
        ((0.625, 0.75, 0.875), 1), ((0.6, 0.7, 0.8), 1), ((0.625, 0.75, 0.875), 1.1)))  # fmt: skip
    middle = [rewards(0.5, 0.5)]
    by_hand = 0.21 + 0.5 * 0.5 + 0.125 * (0.375 + 0.25 + 0.125)
    assert judge(even, slid, middle).untrained == pytest.approx(by_hand)
    assert judge(even, slid, middle).trained == pytest.approx(0.21 + 0.5 * 0.5 + 0.1 * (0.4 + 0.3 + 0.2))
    assert not judge(even, slid, middle).helps
    assert judge(even, outward, middle).helps


@pytest.mark.parametrize("n", [2, 3, 5])
def test_what_an_expert_dominates_is_no_gain(n):
    """Not by rounding either."""
    inside = np.full((4, n), 1 / 7)
    found = judge(inside, inside + 1e-3, merged=[np.full((4, n), 0.31)])
    assert (found.trained, found.share) == (pytest.approx(found.untrained), 0)


def test_chance_is_no_help():
    generator = np.random.default_rng(0)
    before, after = generator.normal(0.5, 0.3, (2, 50, 2))
    verdict = judge(before, after)
    assert verdict.low < 0 < verdict.high
    assert verdict.helps == (verdict.share >= 0.9)


def test_missing_rewards_are_left_out():
    known = rewards(0.4, 0.6)
    lacking = known.copy()
    lacking[::2, 0] = np.nan
    assert judge(lacking, known).untrained == pytest.approx(0.45)


def test_the_interval_holds_the_gain():
    """Also of three objectives and few prompts, whose replicates are biased."""
    before, after = np.random.default_rng(0).normal(0.5, 1, (2, 20, 3))
    verdict = judge(before, after)
    assert verdict.low <= verdict.trained - verdict.untrained <= verdict.high


def test_replicates_without_a_reward_are_told_and_are_no_help():
    """One prompt in two has a reward: a quarter of the draws of two have none, and the others the same gain."""
    before, after = rewards(0.4, 0.6, 2), rewards(0.5, 0.7, 2)
    before[0, 1] = after[0, 1] = np.nan
    verdict = judge(before, after)
    assert (verdict.low, verdict.high) == pytest.approx((0.11, 0.11))
    assert verdict.undefined / 1000 == pytest.approx(0.25, abs=0.04)
    assert verdict.share == pytest.approx(1 - verdict.undefined / 1000)
    assert f"undefined in {verdict.undefined} of 1000 replicates" in str(verdict)


def test_a_front_below_the_reference_point_has_no_volume_and_warns_of_nothing():
    lowest = RewardNormalizer([[1.0, -1.0], [-1.0, 1.0]], ["a", "b"])
    found = judge(rewards(-9, -9), rewards(-8, -8), normalizer=lowest)
    assert (found.untrained, found.trained, found.helps) == (pytest.approx(0.21), pytest.approx(0.21), False)


# In the next four, two prompts are drawn twice: one of them alone in a quarter of the replicates each, both in half of them.


@pytest.mark.parametrize("own_prompts", [True, False])
def test_the_prompts_of_the_payoff_table_are_drawn_too(own_prompts):
    """The router earns 1 more of both; spreads of 2 and 4 make that 1/2, 1/4, and 1/3 where both are drawn."""
    found = judge(rewards(0, 0, 2), rewards(1, 1, 2), normalizer=table([2, 4], [0, 0]), own_prompts=own_prompts)
    assert found.trained - found.untrained == pytest.approx(1 / 9)
    assert (found.low, found.high, found.payoff_prompts) == pytest.approx((1 / 16, 1 / 4, 2))
    assert "given numbers" not in str(found)


def test_one_draw_serves_the_table_and_the_verdict_where_their_prompts_are_the_same():
    """1 more on a spread of 2 and 2 more on one of 4 is 1/2 in every draw; drawn apart, from 1/4 to 2/2."""
    before, after = rewards(0, 0, 2), np.asarray([[1.0, 1.0], [2.0, 2.0]])
    one, two = (
        judge(before, after, normalizer=table([2, 4], [0, 0]), own_prompts=own_prompts) for own_prompts in (True, False)
    )
    assert (one.low, one.high) == pytest.approx((1 / 4, 1 / 4))
    assert (two.low, two.high) == pytest.approx((1 / 16, 1))


def test_given_numbers_are_taken_as_exact_and_that_is_said():
    exact = RewardNormalizer([[3.0, 0.0], [0.0, 3.0]], ["a", "b"])
    found = judge(rewards(0, 0, 2), rewards(1, 1, 2), normalizer=exact, own_prompts=True)
    assert (found.low, found.high, found.payoff_prompts) == pytest.approx((1 / 9, 1 / 9, 0))
    assert "larger by 0.111 [0.111, 0.111], the payoff table of given numbers taken as exact" in str(found)


def test_a_table_without_a_spread_in_a_replicate_is_told_and_is_no_help():
    """All experts earn the same of the second prompt; drawn twice, it is no scale."""
    found = judge(rewards(0, 0, 2), rewards(1, 1, 2), normalizer=table([2, 1], [0, 1]), own_prompts=True)
    assert found.undefined / 1000 == pytest.approx(0.25, abs=0.04)
    assert found.share == pytest.approx(1 - found.undefined / 1000)
    assert not found.helps


@pytest.mark.parametrize("kind", ["make_trainer", "make_grpo_trainer"])
@pytest.mark.parametrize("given", [False, True])
def test_a_trainer_knows_whether_its_table_is_of_the_prompts_of_the_verdict(kind, given, toys, tmp_path, monkeypatch):
    """Its own is; one of other prompts, as many, is not."""
    if kind == "make_grpo_trainer":
        pytest.importorskip("trl")
    asked, shapes, real = [], [], verdicts.judge

    def judge(name, untrained, trained, merged, *others, own_prompts):
        asked.append(own_prompts)
        shapes.append([untrained.shape, trained.shape, merged.shape])
        return real(name, untrained, trained, merged, *others, own_prompts=own_prompts)

    monkeypatch.setattr("peft_hoe.training.run.verdict.judge", judge)
    make = getattr(toys, kind)
    held_out, others = ({"eval_dataset": [{"prompt": text} for text in toys.WORDS[at : at + 8]]} for at in (4, 12))
    scale = make(toys.make_policy(), tmp_path / "other", others).measure_payoff() if given else None
    trainer = make(toys.make_policy(), tmp_path / "run", held_out | {"normalizer": scale}, verdict_texts=1)
    trainer.train()
    assert asked == [not given]
    # The router and halfway to a corner and to the centroid; the expert at the centroid.
    assert shapes == [[(3, 8, 2), (3, 8, 2), (1, 8, 2)]]
    assert trainer.verdict.payoff_prompts == 8


@pytest.mark.parametrize("kind", ["make_trainer", "make_grpo_trainer"])
@pytest.mark.filterwarnings("default:the experts hardly differ")
def test_a_given_scale_that_may_be_chance_is_told(kind, toys, tmp_path):
    if kind == "make_grpo_trainer":
        pytest.importorskip("trl")
    table = RewardNormalizer([[0.65, 0.45], [0.45, 0.65]], ["low", "high"], measurement={"spread_errors": [0.1, 0.01]})
    with pytest.warns(HoEWarning, match="hardly differ in objective 'low'.* 2.0 standard errors"):
        getattr(toys, kind)(None, tmp_path, {"normalizer": table}).train()


@pytest.mark.parametrize("kind", ["make_trainer", "make_grpo_trainer"])
@pytest.mark.parametrize("share", [-1.0, 2.0])  # of replicates: any is enough, or none
def test_a_router_that_did_not_help_is_left_untrained(kind, share, toys, tmp_path, monkeypatch, caplog):
    if kind == "make_grpo_trainer":
        pytest.importorskip("trl")
    monkeypatch.setattr("peft_hoe.training.run.verdict.SURE", share)
    caplog.set_level(logging.INFO, logger="peft_hoe")
    constructor = {"eval_dataset": [{"prompt": prompt} for prompt in toys.WORDS[4:12]]}
    model = toys.make_policy()
    trainer = getattr(toys, kind)(model, tmp_path, constructor, verdict_texts=2)
    trainer.train()
    helps = share < 0
    assert toys.is_trained(model) == helps
    assert (trainer.verdict.prompts, trainer.verdict.texts) == (8, 2)
    assert ("left untrained" in caplog.text) != helps
    trainer.save_model(str(tmp_path / "adapter"))
    assert toys.is_trained(model) == helps


def test_that_moocore_is_missing_is_told_before_the_first_update(toys, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("peft_hoe.metrics")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "moocore", None)
    trainer = toys.make_trainer(None, tmp_path, {"eval_dataset": [{"prompt": toys.WORDS[4]}]}, verdict_texts=1)
    with pytest.raises(HoEError, match=r"peft-hoe\[eval\].* verdict_texts=0"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_there_is_none_without_held_out_prompts(toys, tmp_path):
    trainer = toys.make_trainer(None, tmp_path, {}, verdict_texts=2)
    trainer.train()
    assert trainer.verdict is None


@pytest.mark.parametrize("kind", ["make_trainer", "make_grpo_trainer"])
@pytest.mark.filterwarnings("default:the experts hardly differ")
def test_a_measured_scale_that_may_be_chance_is_told_before_the_first_update(kind, toys, tmp_path):
    if kind == "make_grpo_trainer":
        pytest.importorskip("trl")

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **others):
            raise RuntimeError("no update is made")

    trainer = getattr(toys, kind)(None, tmp_path, {"normalizer": None}, payoff_prompts=3)
    trainer.add_callback(Stop())
    with (
        pytest.raises(RuntimeError, match="no update is made"),
        pytest.warns(
            HoEWarning, match=r"spread by [\d.]+ ± [\d.]+, .* on these 3 prompts .*\(payoff_prompts of a trainer\)"
        ),
    ):
        trainer.train()
