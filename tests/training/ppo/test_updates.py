from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from peft_hoe.generation.prompt_rows import prompt_rows
from peft_hoe.generation.responses import response_mask
from peft_hoe.training.ppo import updates
from peft_hoe.training.ppo.updates import policy_loss, value_loss
from peft_hoe.training.run.steered_policy import steered
from peft_hoe.training.run.votes import vote_statistics

Make = Callable[..., Any]


def test_clipped_policy_loss_by_hand() -> None:
    logprobs = torch.log(torch.tensor([[1.5, 0.5, 1.1]]))
    loss, clipped, ratio = policy_loss(logprobs, torch.zeros(1, 3), torch.tensor([[2.0, -1.0, 1.0]]), 0.2)
    assert ratio.tolist()[0] == pytest.approx([1.5, 0.5, 1.1])
    assert loss.tolist()[0] == pytest.approx([-2.4, 0.8, -1.1])  # -2 * 1.2, 1 * 0.8 and no clipping
    assert clipped.tolist() == [[True, True, False]]


def test_clipped_value_loss_by_hand() -> None:
    loss, clipped = value_loss(torch.tensor([1.0, 0.1]), torch.zeros(2), torch.tensor([1.0, 1.0]), 0.2)
    assert loss.tolist() == pytest.approx([0.5 * 0.8**2, 0.5 * 0.9**2])
    assert clipped.tolist() == [True, False]


def test_response_ends_with_its_stop_token() -> None:
    ids = torch.tensor([[5, 2, 7, 2], [5, 6, 7, 8], [2, 2, 2, 2]])
    mask, ended = response_mask(ids, 2)
    assert mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert ended.tolist() == [True, False, True]
    assert response_mask(ids, None)[0].all()


def test_votes_are_averaged_over_modules_and_responses() -> None:
    """B = 2, S = 4, T = 2: the token before the response and its first one predict; each module weighs the same."""
    mask = torch.tensor([[True, True], [True, False]])
    seen = torch.full((2, 4, 2), torch.nan)
    seen[:, 1:3] = torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [torch.nan, torch.nan]]])
    half = (0.5, math.log(2) / 3)  # of the three votes above: mean share and mean entropy
    for shape in ((2, 4, 2), (8, 2)):
        usage, entropy = vote_statistics({"attention": seen.reshape(shape)}, mask, 4)
        assert usage.tolist() == pytest.approx([half[0], 0.5])
        assert entropy == pytest.approx(half[1], rel=1e-5)
    votes = {
        "attention": seen,
        "shared": torch.tensor([0.2, 0.8]),
        "expert 0": torch.tensor([[0.4, 0.6], [0.6, 0.4], [1.0, 0.0]]),  # three tokens: no multiple of the rows
        "expert 1": torch.tensor([[0.0, 1.0], [0.0, 1.0]]),  # a multiple, but no positions
        "expert 2": torch.empty(0, 2),
    }
    usage, _ = vote_statistics(votes, mask, 4)
    assert usage.tolist() == pytest.approx([(0.5 + 0.2 + 2 / 3 + 0.0) / 4, (0.5 + 0.8 + 1 / 3 + 1.0) / 4])


def test_prompts_follow_from_the_position_alone() -> None:
    stream = prompt_rows(5, 0, 15, seed=3)
    assert sorted(stream[:5]) == sorted(stream[5:10]) == list(range(5))
    assert prompt_rows(5, 4, 7, seed=3) == stream[4:11]
    assert prompt_rows(5, 0, 15, seed=4) != stream


def test_accumulated_gradient_equals_the_large_batch(make_trainer: Make, toys: ModuleType) -> None:
    """Responses of unequal length: micro-batches of 2 give the parameters that one batch of 16 gives."""
    policies = [toys.make_policy().double() for _ in range(2)]
    large = make_trainer(model=policies[0], per_device_train_batch_size=16, stop_token="eos", num_ppo_epochs=1)
    small = make_trainer(
        model=policies[1], per_device_train_batch_size=2, gradient_accumulation_steps=8, num_ppo_epochs=1
    )
    with steered(large.policy_model, large.router):
        prompts = large.next_prompts()
        rollout = large.ppo.rollout(prompts)
        lengths = torch.arange(16) % 6 + 1
        rollout.responses.mask = torch.arange(6) < lengths.unsqueeze(1)
        raw = large.ppo.score(rollout)
        raw[3, 0] = np.nan
        rewards = large.ppo.normalize(raw)
        targets = large.ppo.advantages(rollout, rewards, large.ppo.weigh(rewards))
        assert not targets.known[3, 0]
        large.ppo.update(rollout, targets)
    with steered(small.policy_model, small.router):
        small.ppo.update(rollout, targets)
    for x, y in zip(large.router.parameters(), small.router.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-7)
    for x, y in zip(large.ppo.critic.parameters(), small.ppo.critic.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-7)


def test_ratio_mean_and_variance_over_mini_batches(make_trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the mini-batches' means, unbiased: 2, 4, 6 and 8 have mean 5 and variance 20/3."""
    ratios = iter([2.0, 4.0, 6.0, 8.0, 3.0])
    monkeypatch.setattr(
        updates,
        "update_minibatch",
        lambda *arguments: {"loss": torch.tensor(1.0), "val/ratio": torch.tensor(next(ratios))},
    )
    trainer = make_trainer(num_ppo_epochs=2, num_mini_batches=2)
    with steered(trainer.policy_model, trainer.router):
        rollout = trainer.ppo.rollout(trainer.next_prompts())
        assert trainer.ppo.update(rollout, None) == pytest.approx(
            {"loss": 1.0, "val/ratio": 5.0, "val/ratio_var": 20 / 3}
        )
        trainer.ppo.settings = dataclasses.replace(trainer.ppo.settings, num_ppo_epochs=1, mini_batch=8)
        assert trainer.ppo.update(rollout, None) == {"loss": 1.0, "val/ratio": 3.0, "val/ratio_var": 0.0}


def test_values_do_not_move_the_router(make_trainer: Make) -> None:
    """The heads read a detached state: without advantage and divergence the router has no gradient."""
    trainer = make_trainer(kl_coef=0.0, num_ppo_epochs=1)
    before = [parameter.detach().clone() for parameter in trainer.router.parameters()]
    with steered(trainer.policy_model, trainer.router):
        rollout = trainer.ppo.rollout(trainer.next_prompts())
        targets = trainer.ppo.advantages(rollout, np.ones((8, 2)), np.array([0.5, 0.5]))
        targets.advantages.zero_()
        trainer.ppo.update(rollout, targets)
    assert all(torch.equal(x, y) for x, y in zip(before, trainer.router.parameters(), strict=True))
    assert trainer.ppo.critic.heads.weight.abs().max() > 0
