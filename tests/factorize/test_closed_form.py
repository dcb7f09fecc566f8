"""The factors are the optimum: against dropped eigenvalues, plain SVD, and SVD-LLM's whitening."""

from __future__ import annotations

import pytest
import torch

from fsvd_compile.factorize.closed_form import best_factors, rank_for, weighted_error

SHAPES = [(24, 24), (40, 16), (16, 40), (7, 33), (33, 7)]
pytestmark = pytest.mark.parametrize("m,n", SHAPES, ids=[f"{m}x{n}" for m, n in SHAPES])


def _problem(m, n, tokens=200):
    weight = torch.randn(m, n, dtype=torch.float64)
    mix = torch.randn(n, n, dtype=torch.float64) * torch.logspace(0, -3, n, dtype=torch.float64)
    x = torch.randn(tokens, n, dtype=torch.float64) @ mix
    return weight, x, x.T @ x


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_error_is_the_sum_of_dropped_eigenvalues(m, n, rank):
    weight, x, covariance = _problem(m, n)
    factors = best_factors(weight, covariance, rank)
    loss = (x @ (weight - factors.u @ factors.v).T).square().sum()
    values = torch.linalg.eigvalsh(weight @ covariance @ weight.T)
    atol = 1e-13 * values.sum().item()
    torch.testing.assert_close(loss, values[:-rank].sum(), rtol=1e-9, atol=atol)
    relative = (loss / (x @ weight.T).square().sum()).sqrt().item()
    assert factors.error == pytest.approx(relative, rel=1e-6)
    measured = weighted_error(weight, factors.u @ factors.v, covariance)
    assert measured == pytest.approx(relative, rel=1e-6)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_is_svd_llm_whitening(m, n, rank):
    weight, _, covariance = _problem(m, n)
    factor = torch.linalg.cholesky(covariance)
    u, s, vh = torch.linalg.svd(weight @ factor, full_matrices=False)
    whitened = (u[:, :rank] * s[:rank]) @ vh[:rank] @ torch.linalg.inv(factor)
    ours = best_factors(weight, covariance, rank)
    torch.testing.assert_close(ours.u @ ours.v, whitened, rtol=0, atol=1e-6 * weight.abs().max())


def test_beats_plain_svd_on_its_data(m, n):
    weight, _, covariance = _problem(m, n)
    ours, plain = best_factors(weight, covariance, 4), best_factors(weight, None, 4)
    plain_error = weighted_error(weight, plain.u @ plain.v, covariance)
    assert weighted_error(weight, ours.u @ ours.v, covariance) < 0.9 * plain_error


def test_without_covariance_is_the_truncated_svd(m, n):
    weight, _, _ = _problem(m, n)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    ours = best_factors(weight, None, 5)
    torch.testing.assert_close(ours.u @ ours.v, (u[:, :5] * s[:5]) @ vh[:5])
    assert ours.error == pytest.approx((s[5:].norm() / s.norm()).item(), rel=1e-8)


def test_columns_of_u_are_orthonormal(m, n):
    weight, _, covariance = _problem(m, n)
    u = best_factors(weight, covariance, 6).u
    assert u.is_contiguous()
    torch.testing.assert_close(u.T @ u, torch.eye(6, dtype=torch.float64))


def test_singular_covariance(m, n):
    """Fewer tokens than rank: the calibration tokens themselves come through exactly."""
    weight, x, covariance = _problem(m, n, tokens=3)
    factors = best_factors(weight, covariance, 5)
    torch.testing.assert_close(x @ (factors.u @ factors.v).T, x @ weight.T)
    assert factors.error < 1e-6
    assert torch.isfinite(factors.v).all()


@pytest.mark.parametrize("told", [False, True])
def test_what_few_samples_leave_open_comes_from_the_weight(m, n, told):
    """Of all factors that are exact on three samples, one of them twice, those nearest to the weight itself."""
    weight, x, _ = _problem(m, n, tokens=3)
    x = torch.cat((x, x[:1]))
    u, v, error = best_factors(weight, x.T @ x, 6, len(x) if told else None)
    torch.testing.assert_close(u.T @ u, torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(x @ (u @ v).T, x @ weight.T)
    seen = torch.linalg.qr(weight @ x[:3].T)[0]
    left = torch.linalg.svdvals(weight - seen @ (seen.T @ weight))[3:]
    assert error < 1e-6
    assert (weight - u @ v).norm().item() == pytest.approx(left.norm().item(), rel=1e-9)


def test_equal_samples_count_once(m, n):
    """As in a first layer, whose inputs are those of ten kinds of tokens; nobody says how many are different."""
    weight, x, _ = _problem(4 * m, 4 * n, tokens=10)
    x = x.repeat(50, 1)
    rank = 4 * min(m, n) - 4
    u, v, _ = best_factors(weight, x.T @ x, rank, len(x))
    seen = torch.linalg.qr(weight @ x[:10].T)[0]
    left = torch.linalg.svdvals(weight - seen @ (seen.T @ weight))[rank - 10 :]
    assert (weight - u @ v).norm().item() == pytest.approx(left.norm().item(), rel=1e-9)


def test_zero_weight_and_zero_covariance(m, n):
    weight, _, covariance = _problem(m, n)
    for w, c in ((weight * 0, covariance), (weight, covariance * 0)):
        factors = best_factors(w, c, 3)
        assert factors.error == 0
        assert torch.isfinite(factors.u).all() and torch.isfinite(factors.v).all()


def test_full_rank_is_exact(m, n):
    weight, _, covariance = _problem(m, n)
    rank = min(m, n)
    factors = best_factors(weight, covariance, rank)
    torch.testing.assert_close(factors.u @ factors.v, weight)


def test_rank_saves_parameters(m, n):
    for keep in (0.2, 0.5, 0.8, 0.999):
        rank = rank_for(keep, m, n)
        assert rank is None or rank * (m + n) <= keep * m * n
    assert rank_for(1.0, m, n) is None
