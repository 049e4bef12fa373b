from __future__ import annotations

import pytest
import torch

from peft_hoe import HoEError
from peft_hoe.serving.server.sampling import Sampling

LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()


def shares(sampling, draws=4000):
    generator = sampling.generator()
    counts = torch.bincount(torch.tensor([sampling.draw(LOGITS, generator) for _ in range(draws)]), minlength=4)
    return counts / draws


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.79}, [0.625, 0.375, 0, 0]),
        ({"temperature": 0.5}, [0.6849, 0.2466, 0.0616, 0.0068]),  # p^2, normalised
    ],
)
def test_tokens_come_at_their_probabilities(options, expected):
    # Four standard errors of a share of one half in 4000 draws.
    torch.testing.assert_close(shares(Sampling(seed=3, **options)), torch.tensor(expected), atol=0.032, rtol=0)


def test_a_seed_draws_the_same_again_and_each_choice_its_own():
    sampling = Sampling(seed=5)
    drawn = [
        [each.draw(LOGITS, g) for _ in range(20)]
        for each in (sampling, sampling, sampling.of_choice(1))
        for g in [each.generator()]
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert Sampling().of_choice(1) == Sampling()
    assert Sampling(temperature=0).draw(LOGITS, sampling.generator()) == 0


@pytest.mark.parametrize(
    "options", [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 2}, {"top_k": -1}]
)
def test_values_out_of_range_are_named(options):
    with pytest.raises(HoEError, match=next(iter(options))) as caught:
        Sampling(**options)
    assert caught.value.argument == next(iter(options))
