"""Whether a router helped, and what becomes of one that did not."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from peft_hoe import HoEWarning, RewardNormalizer
from peft_hoe.training.run.verdict import judge

AT = np.asarray([0.25, 0.75])


def rewards(first, second, prompts=50):
    """Normalised rewards `(P, 2)`, the same for all prompts."""
    return np.tile([first, second], (prompts, 1)).astype(float)


def test_it_compares_worst_gaps():
    """0.75 (1.05 - 0.65) = 0.3 is the worst before, 0.25 (1.05 - 0.25) = 0.2 after; 0.75 (1.05 - 0.85) = 0.15 is not."""
    verdict = judge("r0", rewards(0.45, 0.65), rewards(0.25, 0.85), AT, 1.05, texts=4)
    assert (verdict.untrained, verdict.trained) == pytest.approx((0.3, 0.2))
    assert (verdict.low, verdict.high, verdict.share) == pytest.approx((0.1, 0.1, 1.0))
    assert verdict.helps
    assert "smaller by 0.100 [0.100, 0.100]" in str(verdict)


def test_an_objective_without_weight_has_no_gap():
    assert judge("r0", rewards(-9, 0.5), rewards(-99, 0.6), np.asarray([0.0, 1.0]), 1.05, texts=1).helps


def test_chance_is_no_help():
    generator = np.random.default_rng(0)
    before, after = generator.normal(0.5, 0.3, (2, 50, 2))
    verdict = judge("r0", before, after, AT, 1.05, texts=1)
    assert verdict.low < 0 < verdict.high
    assert verdict.helps == (verdict.share >= 0.9)


def test_missing_rewards_are_left_out():
    known = rewards(0.45, 0.65)
    lacking = known.copy()
    lacking[::2, 0] = np.nan
    assert judge("r0", lacking, known, AT, 1.05, texts=1).untrained == pytest.approx(0.3)


def test_replicates_without_a_reward_are_told_and_are_no_help():
    """One prompt in two has a reward: a quarter of the draws of two have none, and the others the same gain."""
    before, after = rewards(0.45, 0.65, 2), rewards(0.25, 0.85, 2)
    before[0, 1] = after[0, 1] = np.nan
    verdict = judge("r0", before, after, AT, 1.05, texts=1)
    assert (verdict.low, verdict.high) == pytest.approx((0.1, 0.1))
    assert verdict.undefined / 1000 == pytest.approx(0.25, abs=0.04)
    assert verdict.share == pytest.approx(1 - verdict.undefined / 1000)
    assert f"undefined in {verdict.undefined} of 1000 replicates" in str(verdict)


def test_the_interval_holds_the_gain():
    """Twelve objectives of equal mean: the worst gap of every draw is larger than that of the data."""
    noise = np.random.default_rng(0).normal(0, 1, (20, 12))
    before, after = noise - noise.mean(0), np.zeros((20, 12))
    verdict = judge("r0", before, after, np.full(12, 1 / 12), 1.05, texts=1)
    assert verdict.low <= verdict.untrained - verdict.trained == pytest.approx(0, abs=1e-12)


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


def test_there_is_none_without_held_out_prompts(toys, tmp_path):
    trainer = toys.make_trainer(None, tmp_path, {}, verdict_texts=2)
    trainer.train()
    assert trainer.verdict is None
