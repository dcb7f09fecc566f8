"""Dense weights that are products of two factors: found by their singular values, and taken apart again.

Some repositories multiply their factors out before they save (Swift-SVD's official code writes V V^T W back
into the layer, some LowRankArena exports are merged). Nothing in such a file says so but the spectrum.
"""

from __future__ import annotations

import dataclasses

import torch

from fsvd_compile.errors import CheckpointError
from fsvd_compile.factorize.closed_form import best_factors, rank_for, weighted_error

# Rounding errors are taken for independent, whose spectral norm is what `_noise` computes with 1 here; a product
# that was accumulated in 16 bits, or rounded twice, has more.
_SLACK = 2.0
# The least factor between the last singular value that counts and the first that is rounding. A spectrum that
# only decays through the noise has neighbours much closer than that, and no rank of its own.
_GAP = 4.0
# What weights come in, the coarsest first.
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclasses.dataclass(frozen=True)
class Disguised:
    """A dense weight of low numerical rank.

    Attributes:
        u: `[out, rank]` in the weight's dtype, orthonormal columns before rounding.
        v: `[rank, in]` in the weight's dtype.
        error: ||W - u v||_F / ||W||_F, of the factors as they are, in fp64.
        gap: The last singular value that counts over the first that does not; inf if that is 0.
    """

    u: torch.Tensor
    v: torch.Tensor
    error: float
    gap: float

    @property
    def rank(self) -> int:
        return self.v.shape[0]


@torch.no_grad()
def undisguised(name: str, weight: torch.Tensor) -> Disguised | None:
    """The factors of a weight that is a product of two and was rounded once, or None.

    A rank counts if it is below break-even, the singular values behind it are no larger than rounding to
    the weight's precision makes them, and the one before is at least 4 times as large as the next: a
    spectrum without that step is not of low rank, however fast it falls. The precision is that of the
    values, not of the dtype: fp16 values stored in fp32 are rounded as fp16. A part of the weight of just
    over break-even size goes first, whose rank bounds the whole's from below: a full-rank weight costs a
    fraction of its decomposition.

    Args:
        name: Of the module, for messages.
        weight: `[out, in]`, on any device; decomposed there in fp64. None is the answer for dtypes other than
            16, 32 or 64 bits floating.

    Raises:
        CheckpointError: it holds NaN or inf, or a decomposition fails.
    """
    if weight.dtype not in _DTYPES:
        return None
    if not weight.isfinite().all():
        raise CheckpointError(f"the weight of {name} holds NaN or inf; download it again.")
    m, n = weight.shape
    most = rank_for(1 - 1e-9, m, n)  # the largest that saves parameters
    if most is None:
        return None
    unit = _unit(weight)
    try:
        if _exceeds(weight, most, unit):
            return None
        exact = weight.double()
        basis, core = _compressed(exact, most)
        rank, gap = _rank(torch.linalg.svdvals(core), most, _noise(exact, unit))
        if rank is None:
            return None
        factors = best_factors(core, None, rank)
    except torch.linalg.LinAlgError as error:
        raise CheckpointError(
            f"the weight of {name} [{m}, {n}] has no SVD in fp64: {error}. Load without refactor."
        ) from error
    u = factors.u if basis is None else basis @ factors.u
    u, v = u.to(weight.dtype), factors.v.to(weight.dtype)
    error = weighted_error(exact, u.double() @ v.double(), None)
    # Rounded factors cannot do better than the weight's own rounding; much worse is another matrix.
    return Disguised(u, v, error, gap) if error <= 2 * unit else None


def _margin(most: int) -> int:
    """Rows and columns beyond the break-even rank: the smallest singular values even of a random square matrix
    are in the noise, so there have to be more of them."""
    return max(16, most // 32)


def _exceeds(weight: torch.Tensor, most: int, unit: float) -> bool:
    """Whether a random part of the weight has a rank above `most` already.

    Inverse iteration finds the space of the part's smallest singular values; the largest it has there is no
    smaller than the part's own of that place. Some matrix products instead of a decomposition.
    """
    margin = _margin(most)
    size = most + margin
    if size >= min(weight.shape):
        return False  # no less work than the whole
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.randperm(d, generator=generator)[:size] for d in weight.shape)
    part = weight[rows.to(weight.device)][:, columns.to(weight.device)].double()
    lu, pivots, info = torch.linalg.lu_factor_ex(part)
    space = torch.randn(size, margin, generator=generator, dtype=part.dtype).to(part.device)
    for _ in range(3):
        for adjoint in (False, True):
            space = torch.linalg.lu_solve(lu, pivots, space, adjoint=adjoint)
            if info or not space.isfinite().all():
                return False  # exactly singular
            space = torch.linalg.qr(space).Q
    # Twice, as it is a bound from above.
    return bool(torch.linalg.matrix_norm(part.T @ space, 2) > 2 * _noise(part, unit))


def _compressed(weight: torch.Tensor, most: int) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(Q with orthonormal columns, Q^T W): all of W but noise, if its rank is `most` at the most (a randomized
    range finder with one power iteration, arXiv 0909.4061); (None, W) where that is no smaller."""
    size = most + _margin(most)
    if size >= min(weight.shape):
        return None, weight
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(weight.shape[1], size, generator=generator, dtype=weight.dtype)
    basis = torch.linalg.qr(weight @ probe.to(weight.device)).Q
    basis = torch.linalg.qr(weight.T @ basis).Q
    basis = torch.linalg.qr(weight @ basis).Q
    return basis, basis.T @ weight


def _rank(values: torch.Tensor, most: int, noise: float) -> tuple[int | None, float]:
    """(The position of the widest step down into the noise, up to `most`; the step), or (None, 0)."""
    before, after = values[:most], values[1 : most + 1]
    steps = torch.where(after > noise, 0.0, before / after)  # 0 / 0 is NaN: no step
    step, position = steps.nan_to_num(nan=0.0, posinf=torch.inf).max(0)
    if values[0] == 0:  # a layer of zeros has one rank of zeros
        return 1, torch.inf
    return (int(position) + 1, step.item()) if step >= _GAP else (None, 0.0)


def _unit(weight: torch.Tensor) -> float:
    """The largest relative error of one rounding to the precision that the values have."""
    fitting = (
        d for d in _DTYPES if d == weight.dtype or weight.to(d).to(weight.dtype).equal(weight)
    )
    return torch.finfo(next(fitting)).eps / 2


def _noise(weight: torch.Tensor, unit: float) -> float:
    """A bound on the spectral norm of the errors of rounding every entry once, but for fp16's subnormal numbers:
    a weight with many of them is taken for full rank.

    For independent errors of at most `unit` |w| it is about the largest norm of a row plus that of a column of
    their deviations, which are below `unit` |w| / sqrt(3) in the mean.
    """
    rows = weight.norm(dim=1).max()
    columns = weight.norm(dim=0).max()
    return _SLACK * unit * (rows + columns).item() / 3**0.5
