"""Training that ends when the worst gap has stopped falling."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from peft_hoe import HoEError
from peft_hoe.router_recipe import COOL_DOWN, MOST_UPDATES
from peft_hoe.training.run import plateau
from peft_hoe.training.run.plateau import WINDOW, Plateau, trend


def follow(gaps, most=200) -> Plateau:
    found = Plateau()
    found.most = most
    for update, gap in enumerate(gaps, 1):
        found.note(gap, update)
        if update == found.last:
            break
    return found


def test_a_straight_line_falls_without_error():
    fall, error = trend(0.5 - 0.01 * np.arange(30))
    assert (fall, error) == pytest.approx((0.29, 0.0))


def test_the_error_is_that_of_least_squares():
    """The covariance of numpy's own fit, of the slope, over W - 1 updates."""
    gaps = np.random.default_rng(0).normal(0.2, 0.05, 40)
    (slope, _), covariance = np.polyfit(np.arange(40), gaps, 1, cov=True)
    assert trend(gaps) == pytest.approx((-39 * slope, 39 * covariance[0, 0] ** 0.5))


def test_what_falls_goes_on_to_the_bound():
    found = follow(1 - 0.001 * np.arange(200))
    assert (found.ends, found.last, len(found.gaps)) == (None, 200, 200)
    assert "so training went on to its bound, 200 updates" in str(found)


@pytest.mark.parametrize("step", [0.0, 0.001])
def test_what_stands_still_or_grows_ends_at_the_first_look(step):
    found = follow(0.2 + step * np.arange(200))
    assert found.ends == len(found.gaps) == WINDOW + COOL_DOWN
    assert "no more than its error, so training cooled down and ended after 40" in str(found)


def test_what_has_fallen_ends_later():
    """A line down to update 60, then none, and noise: the later half no longer falls, which is seen within 60 more updates."""
    noise = np.random.default_rng(1).normal(0, 0.01, 200)
    found = follow(0.3 - 0.2 * np.minimum(np.arange(200), 60) / 60 + noise)
    assert 60 < found.ends <= 120 + COOL_DOWN


def test_the_rate_is_constant_and_then_falls_to_zero():
    found = follow(np.full(100, 0.2))
    assert [found.rate(step) for step in (0, 29, 30, 31, 35, 39, 40)] == pytest.approx([1, 1, 1, 0.9, 0.5, 0.1, 0])
    short = Plateau()
    short.most = 4  # a run of 4 updates cools down in the second half
    assert [short.rate(step) for step in range(4)] == [1, 1, 1, 0.5]


def test_batches_without_rewards_are_not_looked_at():
    assert follow([np.nan, *np.full(60, 0.2)]).ends == 40 + COOL_DOWN  # not at 30, whose window has the first batch


def test_it_continues_where_it_was_saved():
    whole, first, second = follow(np.full(100, 0.2)), Plateau(), Plateau()
    for update in range(1, 36):
        first.note(0.2, update)
    second.load_state_dict(first.state_dict())
    second.most = 200
    assert (second.ends, second.found, second.rate(37)) == (whole.ends, whole.found, whole.rate(37))


def test_its_schedule_can_be_saved():
    """What torch keeps of a schedule of our own is nothing: the plateau is in the trainer's state."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = LambdaLR(optimizer, lambda step: 1.0)
    assert schedule.state_dict()["lr_lambdas"] == [None]


# -- in a trainer ---

AUTO = {"auto_stop": True, "max_steps": 30, "save_strategy": "steps", "save_steps": 5}


@pytest.fixture
def early(monkeypatch):
    """Looks at 5 updates, and every 5; the toy's gaps are noise."""
    monkeypatch.setattr(plateau, "WINDOW", 5)
    monkeypatch.setattr(plateau, "EVERY", 5)
    monkeypatch.setattr(plateau, "COOL_DOWN", 2)


def parameters(trainer):
    return [parameter.detach().clone() for parameter in trainer.router.parameters()]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["make_trainer", "make_grpo_trainer"])
def test_a_run_ends_and_resumes(kind, toys, tmp_path, early):
    if kind == "make_grpo_trainer":
        pytest.importorskip("trl")
    whole = getattr(toys, kind)(toys.make_policy().double(), tmp_path / "whole", {}, **AUTO)
    whole.train()
    found = whole.plateau
    assert len(found.gaps) == whole.state.global_step == found.last == found.ends < 30
    rates = [
        entry.get("lr", entry.get("learning_rate"))
        for entry in whole.state.log_history
        if "loss/policy_avg" in entry or "loss" in entry
    ]
    assert rates[:-1] == pytest.approx([rates[0]] * (len(rates) - 1))
    assert rates[-1] == pytest.approx(rates[0] / 2)
    weights = whole.weights
    assert found.gaps[-1] == max(weights.gap)

    torch.manual_seed(99)
    resumed = getattr(toys, kind)(toys.make_policy().double(), tmp_path / "resumed", {}, **AUTO)
    resumed.train(resume_from_checkpoint=tmp_path / "whole" / f"checkpoint-{found.ends - 2}")
    assert resumed.plateau.gaps == pytest.approx(found.gaps, abs=1e-9)
    assert resumed.state.global_step == found.ends
    for x, y in zip(parameters(whole), parameters(resumed), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-7)


def test_another_schedule_is_refused(toys, tmp_path):
    with pytest.raises(HoEError, match=r"lr_scheduler_type is 'cosine'.*auto_stop"):
        toys.make_trainer(None, tmp_path, {}, auto_stop=True, lr_scheduler_type="cosine")
    with pytest.raises(HoEError, match="warmup_steps is 3"):
        toys.make_trainer(None, tmp_path, {}, auto_stop=True, warmup_steps=3)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = LambdaLR(optimizer, lambda step: 1.0)
    with pytest.raises(HoEError, match="a schedule is given in optimizers"):
        toys.make_trainer(None, tmp_path, {"optimizers": (optimizer, schedule)}, auto_stop=True)


def test_its_bound_is_a_number_of_its_own(tmp_path):
    from peft_hoe import HoERouterConfig

    def most(**settings):
        return HoERouterConfig(output_dir=str(tmp_path), use_cpu=True, **settings).max_steps

    assert (most(), most(auto_stop=True), most(auto_stop=True, max_steps=7)) == (60, MOST_UPDATES, 7)
    assert most(auto_stop=True, num_train_epochs=2) == -1
