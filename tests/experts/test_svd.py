from __future__ import annotations

import pytest
import torch

from peft_hoe import ExpertError
from peft_hoe.experts import svd
from peft_hoe.experts.svd import keep_factors, reduce_factors, truncated_svd


def decaying(rows, columns, power=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(rows, rows, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(columns, columns, generator=generator))
    size = min(rows, columns)
    s = torch.arange(1, size + 1).float() ** -power
    return u[:, :size] @ torch.diag(s) @ v[:, :size].T, s


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
def test_exact_keeps_the_leading_singular_values(shape):
    matrix, s = decaying(*shape)
    factors = truncated_svd(matrix, 5, solver="exact")
    assert factors.b.shape == (shape[0], 5)
    assert factors.a.shape == (5, shape[1])
    residual = (matrix - factors.b @ factors.a).norm().item()
    assert residual == pytest.approx(s[5:].norm().item(), rel=1e-4)
    assert factors.residual == pytest.approx(residual, rel=1e-3)
    assert factors.energy == pytest.approx((s[:5].norm() / s.norm()).item() ** 2, rel=1e-4)
    assert factors.norm == pytest.approx((factors.b @ factors.a).norm().item(), rel=1e-5)
    # B = U sqrt(S), A = sqrt(S) V^T: both carry the singular values.
    torch.testing.assert_close(factors.b.T @ factors.b, torch.diag(s[:5]), atol=1e-4, rtol=0)
    torch.testing.assert_close(factors.a @ factors.a.T, torch.diag(s[:5]), atol=1e-4, rtol=0)


def test_randomized_reaches_the_optimum_on_a_decaying_spectrum():
    matrix, s = decaying(120, 90)
    factors = truncated_svd(matrix, 10, solver="randomized")
    assert factors.solver.startswith("randomized")
    optimum = (s[:10].norm() / s.norm()).item() ** 2
    assert optimum - 1e-3 < factors.energy <= optimum + 1e-6
    assert (matrix - factors.b @ factors.a).norm().item() == pytest.approx(factors.residual, rel=1e-3)


def test_randomized_is_deterministic_and_leaves_the_global_generator_alone():
    matrix, _ = decaying(80, 80)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first, second = truncated_svd(matrix, 4, seed=1), truncated_svd(matrix, 4, seed=1)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first.b, second.b)
    assert torch.equal(first.a, second.a)


def test_rank_above_the_true_rank_is_clamped():
    left, right = torch.randn(12, 3), torch.randn(3, 15)
    factors = truncated_svd(left @ right, 10)
    assert factors.rank == 3
    torch.testing.assert_close(factors.b @ factors.a, left @ right, atol=1e-4, rtol=0)
    assert truncated_svd(torch.randn(4, 9), 100).rank == 4


def test_zero_matrix_has_rank_zero():
    factors = truncated_svd(torch.zeros(4, 6), 3)
    assert (factors.b.shape, factors.a.shape, factors.energy) == ((4, 0), (0, 6), 1.0)


def test_full_rank_gives_the_matrix_back():
    matrix = torch.randn(17, 9)
    factors = truncated_svd(matrix, None)
    torch.testing.assert_close(factors.b @ factors.a, matrix, atol=1e-4, rtol=0)


def test_solver_failures_fall_back_and_say_so(monkeypatch):
    real, matrix = torch.linalg.svd, decaying(60, 60)[0]

    def fails_in_float32(values, **options):
        if values.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return real(values, **options)

    def fails(*arguments, **options):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(svd.torch.linalg, "svd", fails_in_float32)
    monkeypatch.setattr(svd, "leading_triplets", fails)
    for solver in ("exact", "randomized"):
        factors = truncated_svd(matrix, 4, solver=solver)
        assert "exact float64 (float32 failed)" in factors.solver
        assert (matrix - factors.b @ factors.a).norm().item() == pytest.approx(factors.residual, rel=1e-3)
    assert factors.solver.endswith("(randomized failed)")


def test_reducing_factors_equals_truncating_their_product():
    b, a = torch.randn(20, 8), torch.randn(8, 30)
    reduced, truncated = reduce_factors(b, a, 3), truncated_svd(b @ a, 3, solver="exact")
    torch.testing.assert_close(reduced.b @ reduced.a, truncated.b @ truncated.a, atol=1e-4, rtol=1e-4)
    assert reduced.energy == pytest.approx(truncated.energy, rel=1e-5)


def test_reducing_factors_of_a_rank_above_the_width():
    b, a = torch.randn(4, 8), torch.randn(8, 30)
    reduced = reduce_factors(b, a, 6)
    assert reduced.rank == 4
    torch.testing.assert_close(reduced.b @ reduced.a, b @ a, atol=1e-4, rtol=1e-4)


def test_kept_factors_are_untouched_and_their_norm_is_known():
    b, a = torch.randn(5, 2), torch.randn(2, 7)
    kept = keep_factors(b, a)
    assert torch.equal(kept.b, b)
    assert torch.equal(kept.a, a)
    assert kept.norm == pytest.approx((b @ a).norm().item(), rel=1e-5)


def test_unknown_solver_is_named():
    with pytest.raises(ExpertError, match="svd is 'fast'; use one of 'randomized', 'exact'"):
        truncated_svd(torch.eye(2), 1, solver="fast")
