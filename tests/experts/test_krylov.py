"""The randomised solver against the full decomposition, on spectra of every kind."""

from __future__ import annotations

import pytest
import torch

from peft_hoe.experts.krylov import leading_triplets


def matrix_of(singular_values, rows, columns, seed=0):
    """A float32 matrix with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    size = len(singular_values)
    u, _ = torch.linalg.qr(torch.randn(rows, size, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(columns, size, generator=generator, dtype=torch.float64))
    return ((u * singular_values) @ v.T).float()


def powers(exponent, size=120):
    return torch.arange(1, size + 1, dtype=torch.float64) ** -exponent


SPECTRA = {
    "steep": powers(3),
    "decaying": powers(0.7),
    "slow": powers(0.3),
    "flat": torch.ones(120, dtype=torch.float64),
    "steps": torch.tensor([100.0] * 5 + [10.0] * 20 + [1.0] * 95, dtype=torch.float64),
    "plateau and noise": torch.cat([torch.ones(30, dtype=torch.float64), 1e-3 * powers(0.1, 90)]),
    "low rank": torch.cat([powers(0.5, 12), torch.zeros(108, dtype=torch.float64)]),
}


def solve(matrix, rank, tolerance=1e-4, seed=0):
    return leading_triplets(matrix, rank, float(matrix.double().norm()), tolerance=tolerance, seed=seed)


@pytest.mark.parametrize("shape", [(120, 200), (200, 120), (120, 120)])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("rank", [1, 8, 30])
def test_the_energy_is_within_the_tolerance_of_the_optimum(shape, spectrum, rank):
    expected = SPECTRA[spectrum]
    matrix = matrix_of(expected, *shape)
    u, s, vh, directions = solve(matrix, rank)
    optimum = expected[:rank].square().sum().item()
    assert (1 - 1e-4) * optimum <= s.square().sum().item() <= (1 + 1e-5) * optimum
    # What the triplets say they hold is what their product holds.
    lost = (matrix.double() - (u.double() * s) @ vh.double()).square().sum().item()
    whole = expected.square().sum().item()
    assert lost == pytest.approx(whole - s.square().sum().item(), abs=1e-5 * whole)
    held = int((s > 1e-5 * s[0]).sum())  # a direction without energy may point anywhere
    for product in (u.T @ u, vh @ vh.T):
        torch.testing.assert_close(product[:held, :held], torch.eye(held), atol=1e-4, rtol=0)
    assert rank <= directions <= 120


def test_a_tighter_tolerance_takes_more_directions_and_comes_closer():
    expected = powers(0.4, 300)
    matrix = matrix_of(expected, 300, 400)
    optimum = expected[:16].square().sum().item()
    missed, taken = [], []
    for tolerance in (1e-2, 1e-4, 1e-6):
        _, s, _, directions = solve(matrix, 16, tolerance)
        missed.append(1 - s.square().sum().item() / optimum)
        taken.append(directions)
        assert missed[-1] <= tolerance
    assert missed == sorted(missed, reverse=True)
    assert taken[0] < taken[2]


def test_a_flat_spectrum_takes_more_directions_than_a_steep_one():
    steep, flat = (solve(matrix_of(spectrum, 120, 150), 8)[-1] for spectrum in (powers(3), powers(0.1)))
    assert steep < flat


def test_the_whole_space_is_exact():
    matrix = torch.randn(40, 60, generator=torch.Generator().manual_seed(0))
    u, s, vh, directions = solve(matrix, 40)
    assert directions == 40
    torch.testing.assert_close((u * s.float()) @ vh, matrix, atol=1e-4, rtol=0)


def test_a_seed_decides_and_the_global_generator_is_left_alone():
    matrix = matrix_of(powers(0.3), 120, 150)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first, second, other = solve(matrix, 4, seed=1), solve(matrix, 4, seed=1), solve(matrix, 4, seed=2)
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(a, b) for a, b in zip(first[:3], second[:3], strict=True))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_an_error_of_linear_algebra(value):
    matrix = torch.ones(50, 60)
    matrix[3, 4] = value
    with pytest.raises(torch.linalg.LinAlgError):
        leading_triplets(matrix, 4, 1.0, tolerance=1e-4, seed=0)
