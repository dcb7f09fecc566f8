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
# Rows and columns beyond the break-even rank in the part that is looked at first.
_MARGIN = 16


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
        values = torch.linalg.svdvals(exact)
        rank, gap = _rank(values, most, _noise(exact, unit))
        if rank is None:
            return None
        factors = best_factors(exact, None, rank)
    except torch.linalg.LinAlgError as error:
        raise CheckpointError(
            f"the weight of {name} [{m}, {n}] has no SVD in fp64: {error}. Load without refactor."
        ) from error
    u, v = (factor.to(weight.dtype) for factor in (factors.u, factors.v))
    error = weighted_error(exact, u.double() @ v.double(), None)
    # Rounded factors cannot do better than the weight's own rounding; much worse is another matrix.
    return Disguised(u, v, error, gap) if error <= 2 * unit else None


def _exceeds(weight: torch.Tensor, most: int, unit: float) -> bool:
    """Whether a random part of the weight has a rank above `most` already."""
    size = most + _MARGIN
    if size >= min(weight.shape):
        return False  # as much work as the whole
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.randperm(d, generator=generator)[:size] for d in weight.shape)
    part = weight[rows.to(weight.device)][:, columns.to(weight.device)].double()
    return bool(torch.linalg.svdvals(part)[most] > _noise(part, unit))


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
