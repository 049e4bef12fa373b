from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from peft_hoe.errors import HoEError
from peft_hoe.training.ppo.advantages import (
    estimate_advantages,
    kl_loss,
    leave_one_out,
    masked_mean,
    mix_advantages,
    place_rewards,
)

B, T, N = 5, 7, 3


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([7, 1, 4, 6, 3])
    mask = torch.arange(T) < lengths[:, None]
    rewards = torch.randn(B, T, N, generator=generator)
    values = torch.randn(B, T, N, generator=generator)
    return rewards, values, mask


def test_rewards_stand_on_the_last_generated_token():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]]).bool()
    placed = place_rewards(torch.tensor([[1.0, 2.0], [3.0, float("nan")], [5.0, 6.0]]), mask)
    expected = torch.zeros(3, 3, 2)
    expected[0, 1] = torch.tensor([1.0, 2.0])
    expected[1, 2, 0] = 3.0
    assert torch.equal(placed, expected)


def test_gae_by_hand():
    mask = torch.tensor([[True, True, False]])
    rewards = torch.tensor([[[0.0], [1.0], [9.0]]])
    values = torch.tensor([[[0.5], [0.25], [9.0]]])
    advantages, returns = estimate_advantages(rewards, values, mask, gamma=0.5, lam=0.5)
    # δ_1 = 1 - .25 = .75; δ_0 = 0 + .5 * .25 - .5 = -.375; Â_0 = -.375 + .25 * .75 = -.1875
    torch.testing.assert_close(advantages, torch.tensor([[[-0.1875], [0.75], [0.0]]]))
    torch.testing.assert_close(returns, torch.tensor([[[0.3125], [1.0], [0.0]]]))


def test_gae_equals_the_naive_sum(batch):
    rewards, values, mask = batch
    advantages, _ = estimate_advantages(rewards, values, mask, gamma=0.9, lam=0.8)
    for b, length in enumerate(mask.sum(1).tolist()):
        for t in range(length):
            total = torch.zeros(N)
            for s in range(t, length):
                following = values[b, s + 1] if s + 1 < length else torch.zeros(N)
                total += (0.9 * 0.8) ** (s - t) * (rewards[b, s] + 0.9 * following - values[b, s])
            torch.testing.assert_close(advantages[b, t], total, atol=1e-5, rtol=0)
    assert not advantages[~mask].any()


def test_the_mixed_advantage_is_gae_of_the_mixed_reward(batch):
    rewards, values, mask = batch
    u = torch.tensor([0.2, 0.5, 0.3])
    advantages, _ = estimate_advantages(rewards, values, mask)
    mixed = mix_advantages(advantages, u, mask, scaling="none")
    single, _ = estimate_advantages((rewards @ u).unsqueeze(-1), (values @ u).unsqueeze(-1), mask)
    torch.testing.assert_close(mixed, single.squeeze(-1), atol=1e-5, rtol=0)  # float32 inside; sums of some 20 terms


def test_joint_scaling_by_hand():
    mask = torch.tensor([[True, True], [True, False]])
    advantages = torch.tensor([[[0.0, 10.0], [1.0, 40.0]], [[2.0, 10.0], [99.0, 99.0]]])
    mixed = mix_advantages(advantages, torch.tensor([0.5, 0.5]), mask)
    # centred: [-1, 0, 1] and [-10, 20, -10]; sum / 2: [-5.5, 10, -4.5], of mean 0 and mean square (30.25 + 100 + 20.25) / 3
    sigma = (150.5 / 3) ** 0.5
    torch.testing.assert_close(mixed, torch.tensor([[-5.5, 10.0], [-4.5, 0.0]]) / sigma)


def test_objective_scaling_by_hand():
    mask = torch.ones(1, 3).bool()
    advantages = torch.tensor([[[0.0, 10.0], [1.0, 40.0], [2.0, 10.0]]])
    mixed = mix_advantages(advantages, torch.tensor([1.0, 1.0]), mask, scaling="objective")
    own = torch.tensor([-1.0, 0.0, 1.0]) / (2 / 3) ** 0.5 + torch.tensor([-10.0, 20.0, -10.0]) / 200**0.5
    torch.testing.assert_close(mixed[0], own / own.std(correction=0))


def test_joint_scaling_keeps_the_weights_and_objective_scaling_does_not(batch):
    rewards, _, mask = batch
    scaled = rewards * torch.tensor([1.0, 10.0, 1.0])
    u = torch.tensor([0.4, 0.3, 0.3])
    joint = mix_advantages(scaled, u, mask)
    centred = (scaled - scaled[mask].mean(0)) @ u
    ratio = joint[mask] / centred[mask]
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-4, atol=0)
    torch.testing.assert_close(joint[mask].std(correction=0), torch.tensor(1.0))
    torch.testing.assert_close(
        mix_advantages(scaled, u, mask, scaling="objective"), mix_advantages(rewards, u, mask, scaling="objective")
    )


def test_a_sample_without_a_reward_is_left_out_of_its_objective():
    mask = torch.ones(3, 1).bool()
    scored = torch.tensor([[True, True], [True, False], [True, True]])
    advantages = torch.tensor([[[1.0, 4.0]], [[2.0, 777.0]], [[3.0, 2.0]]])
    u = torch.tensor([1.0, 2.0])
    torch.testing.assert_close(
        mix_advantages(advantages, u, mask, scaling="none", scored=scored), torch.tensor([[9.0], [2.0], [7.0]])
    )
    mixed = mix_advantages(advantages, u, mask, scored=scored)
    # centred: [-1, 0, 1] and [1, -, -1]; sums: -1 + 2, 0, 1 - 2
    torch.testing.assert_close(mixed, torch.tensor([[1.0], [0.0], [-1.0]]) / (2 / 3) ** 0.5)


@pytest.mark.parametrize("scaling", ["joint", "objective"])
def test_a_constant_advantage_becomes_zero(scaling):
    mask = torch.ones(2, 3).bool()
    constant = torch.full((2, 3, 2), 0.1)
    assert torch.equal(mix_advantages(constant, torch.tensor([0.3, 0.7]), mask, scaling=scaling), torch.zeros(2, 3))


@pytest.mark.parametrize("scaling", ["joint", "objective", "none"])
def test_two_processes_scale_as_one(batch, scaling):
    advantages, _, mask = batch
    u = torch.tensor([0.2, 0.5, 0.3])
    whole = mix_advantages(advantages, u, mask, scaling=scaling)
    barrier, totals = threading.Barrier(2), [torch.empty(0)] * 2

    def process(rank):
        def all_reduce(total):
            totals[rank] = total
            barrier.wait()
            summed = totals[0] + totals[1]
            barrier.wait()
            return summed

        rows = slice(0, 2) if rank == 0 else slice(2, B)
        return mix_advantages(advantages[rows], u, mask[rows], scaling=scaling, reduce=all_reduce)

    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(process, range(2)))
    torch.testing.assert_close(torch.cat(parts), whole)


def test_kl_loss_by_hand():
    log_probabilities = torch.tensor([[-1.0, -2.0, 0.0]], requires_grad=True)
    reference = torch.tensor([[-1.0, -1.0, float("inf")]])
    mask = torch.tensor([[True, True, False]])
    loss = kl_loss(log_probabilities, reference, mask)
    e = torch.e
    torch.testing.assert_close(loss, torch.tensor((0 + (e - 1 - 1)) / 2))  # d = 0 and 1
    loss.backward()
    # d/d log π of exp(d) - 1 - d with d = log π_ref - log π: 1 - exp(d)
    torch.testing.assert_close(log_probabilities.grad, torch.tensor([[0.0, (1 - e) / 2, 0.0]]))


def test_k3_estimates_the_kl():
    generator = torch.Generator().manual_seed(0)
    policy = torch.tensor([0.5, 0.3, 0.2]).log()
    reference = torch.tensor([0.2, 0.4, 0.4]).log()
    tokens = torch.multinomial(policy.exp(), 200_000, replacement=True, generator=generator).unsqueeze(0)
    estimate = kl_loss(policy[tokens], reference[tokens], torch.ones_like(tokens).bool())
    assert estimate.item() == pytest.approx((policy.exp() * (policy - reference)).sum().item(), abs=3e-3)


def test_an_empty_mask_means_zero():
    assert masked_mean(torch.ones(2, 2), torch.zeros(2, 2)) == 0


def test_bad_shapes():
    with pytest.raises(HoEError, match=r"must both be \(B, T, N\)"):
        estimate_advantages(torch.zeros(2, 3, 1), torch.zeros(2, 3, 2), torch.ones(2, 3))
    with pytest.raises(HoEError, match="differ in objectives"):
        mix_advantages(torch.zeros(2, 3, 2), torch.ones(3), torch.ones(2, 3))
    with pytest.raises(HoEError, match="'joint', 'objective', 'none'"):
        mix_advantages(torch.zeros(2, 3, 2), torch.ones(2), torch.ones(2, 3), scaling="own")


def test_leave_one_out_by_hand():
    """A group of 1, 2, 6: against 4, 3.5 and 1.5. A missing reward counts in no mean; alone, nothing can be compared."""
    nan = float("nan")
    rewards = torch.tensor([[1.0, 1.0], [2.0, nan], [6.0, 3.0], [5.0, nan], [5.0, nan], [nan, 2.0]])
    expected = torch.tensor([[-3.0, -2.0], [-1.5, 0.0], [4.5, 2.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(leave_one_out(rewards, 3), expected)
