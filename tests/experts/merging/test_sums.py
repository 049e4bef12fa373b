from __future__ import annotations

import pytest
import torch

from peft_hoe.experts.merging.sums import linear, model_stock

X, Y = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 2.0])


def test_linear_by_hand():
    assert linear([X, Y], [0.25, 0.75]).tolist() == [0.75, 1.5]


def test_model_stock_is_the_papers_for_equal_weights():
    # Two policies of cosine 1/2: t = 2 c / (1 + c) = 2/3. Three of cosine 1/2: 3 c / (1 + 2 c) = 3/4.
    first, second = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.75**0.5])
    expected = (first + second) / 2 * (2 / 3)
    torch.testing.assert_close(model_stock([first, second], [0.5, 0.5]), expected, rtol=1e-5, atol=1e-6)
    corners = [torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0.0, 1.0, 1.0])]
    merged = model_stock(corners, [1 / 3] * 3)
    torch.testing.assert_close(merged, torch.full((3,), 2 / 3 * 3 / 4), rtol=1e-5, atol=1e-6)


def test_model_stock_is_nearest_to_what_the_policies_share():
    """t minimises the distance of the point on the line to mu, where tau_i = mu + orthogonal noise of one length."""
    mu, size = torch.zeros(5), 2.0
    mu[0] = 1.0
    deltas = [mu + size * torch.eye(5)[i + 1] for i in range(3)]
    weights = [0.5, 0.3, 0.2]
    average = linear(deltas, weights)
    t = float(average @ mu / (average @ average))
    torch.testing.assert_close(model_stock(deltas, weights), t * average, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("second", [Y, -X, torch.zeros(2)])
def test_model_stock_of_policies_that_share_nothing_is_the_base(second):
    assert model_stock([X, second], [0.5, 0.5]).abs().tolist() == [0.0, 0.0]
