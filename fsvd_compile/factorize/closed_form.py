"""The best rank-r factors of a weight, in closed form: pure functions of tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Factors(NamedTuple):
    """What `best_factors` returns.

    Attributes:
        u: `[out, rank]`, orthonormal columns.
        v: `[rank, in]`.
        error: Relative weighted error of `u @ v`, see `weighted_error`.
    """

    u: torch.Tensor
    v: torch.Tensor
    error: float


def rank_for(keep: float, out_features: int, in_features: int) -> int | None:
    """The rank at which the factors hold the share `keep` of the weight's parameters.

    The formula is SVD-LLM's, `int(m n keep / (m + n))` (arXiv 2403.07378; `whitening` in
    `SVDLLM.py` of AIoT-MLSys-Lab/SVD-LLM).

    Returns:
        The rank; `None` where no rank saves parameters: `keep` is 1, the formula gives 0 (a head
        with one or two outputs), or r (m + n) >= m n.
    """
    m, n = out_features, in_features
    rank = int(m * n * keep / (m + n))
    if keep >= 1 or rank < 1 or rank * (m + n) >= m * n:
        return None
    return rank


def best_factors(
    weight: torch.Tensor,
    covariance: torch.Tensor | None,
    rank: int,
    samples: int | None = None,
) -> Factors:
    """The rank-r factors that minimise ||(W - U V) X||_F over all U, V, given C = X X^T.

    U holds the top eigenvectors of W C W^T and V = U^T W; the squared error is the sum of the
    dropped eigenvalues. It is the optimum of SVD-LLM's whitening (arXiv 2403.07378), reached
    without a Cholesky factor or an inverse.

    Fewer samples than the rank leave columns of U that this error does not determine. Of all optima the one with
    the least ||W - U V||_F is taken, the limit of C + e I for e to 0: they come from the singular vectors of what is
    left of W. (SmolLM2-135M at keep 0.95, calibrated on 64 and 256 tokens: perplexity of other texts 515 and 173,
    and 4429 and 618 with columns as the eigensolver leaves them; `python bench/few_samples.py`.)

    For out > in the m x m problem has rank n at most: with the thin QR W = Q R, W C W^T = Q (R C
    R^T) Q^T, and only the n x n matrix in the middle is decomposed.

    Args:
        weight: W of shape `[out, in]`; its dtype is the dtype of the computation.
        covariance: C of shape `[in, in]`, symmetric, same dtype and device; `None` is the identity,
            which makes this the truncated SVD of W.
        rank: 1 <= rank <= min(out, in).
        samples: How many columns X has; `None` is enough of them.

    Raises:
        torch.linalg.LinAlgError: the eigendecomposition does not converge.
    """
    basis, gram = _problem(weight, covariance)
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp_min(0)  # rounding makes zero eigenvalues slightly negative
    u = vectors[:, -rank:].flip(1)
    known = rank if covariance is None else min(rank, _known(values, samples))
    if known < rank:
        core = weight if basis is None else basis.T @ weight
        u = _completed(u[:, :known], core, rank)
    if basis is not None:
        u = basis @ u
    total = values.sum()
    error = (values[:-rank].sum() / total).sqrt().item() if total > 0 else 0.0
    return Factors(u.contiguous(), u.T @ weight, error)


def _known(values: torch.Tensor, samples: int | None) -> int:
    """How many eigenvalues are those of samples. Equal samples count once (in the first layer of a transformer every
    token of one kind), where rounding is small enough to tell: in float32 it hides real ones."""
    bound = len(values) if samples is None else samples
    if values.dtype == torch.float64:
        least = values[-1] * len(values) * torch.finfo(values.dtype).eps
        bound = min(bound, int((values > least).sum()))
    return bound


def _completed(u: torch.Tensor, weight: torch.Tensor, rank: int) -> torch.Tensor:
    """Orthonormal columns `[out, rank]`: those of u, then the singular vectors of what they leave of the weight."""
    rest = weight - u @ (u.T @ weight)
    gram = rest @ rest.T
    vectors = torch.linalg.eigh((gram + gram.T) / 2)[1]
    both = torch.cat((u, vectors[:, u.shape[1] - rank :].flip(1)), 1)
    # Where nothing is left, the vectors may be those of u once more.
    return torch.linalg.qr(both)[0]


def spectrum(weight: torch.Tensor, covariance: torch.Tensor | None) -> torch.Tensor:
    """The squared error ||(W - U V) X||_F^2 that each rank saves, falling, `[min(out, in)]`; see `best_factors`."""
    _, gram = _problem(weight, covariance)
    return torch.linalg.eigvalsh(gram).clamp_min(0).flip(0)


def _problem(
    weight: torch.Tensor, covariance: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(Q or None, the symmetric matrix whose top eigenvectors, times Q, are U)."""
    m, n = weight.shape
    basis, core = torch.linalg.qr(weight) if m > n else (None, weight)
    gram = core @ core.T if covariance is None else core @ covariance @ core.T
    return basis, (gram + gram.T) / 2


def weighted_error(
    weight: torch.Tensor, approximation: torch.Tensor, covariance: torch.Tensor | None
) -> float:
    """||(W - A) X||_F / ||W X||_F, given C = X X^T (`None`: X = I); all of one dtype."""

    def energy(matrix: torch.Tensor) -> torch.Tensor:
        weighted = matrix if covariance is None else matrix @ covariance
        return (weighted * matrix).sum().clamp_min(0)

    total = energy(weight)
    return (energy(weight - approximation) / total).sqrt().item() if total > 0 else 0.0
