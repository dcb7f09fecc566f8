"""`fsvd::expand_rms` and `fsvd::shrink_rms`: an expand and a shrink with RMSNorm (arXiv 1910.07467) between them.

    RMSNorm(y) @ W^T = rsqrt(mean(y^2) + eps) * ((y * (offset + w)) @ W^T)

What stands behind the sign of equality needs nothing but sums of squares that whoever writes y can leave, so the norm
is no kernel and no work of the shrink: of a layer of LLaMA-7B with 32 tokens on an H200 its two norms are 4.1 us of
152. For some products of a few tokens, see `_linear.carries`; the ops compute the same for all others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fsvd_compile.errors import FactorError
from fsvd_compile.kernels import _triton, expand, shrink
from fsvd_compile.kernels._linear import (
    CARRIED_TOKENS,
    Carry,
    carries,
    in_order,
    linear,
    read_as_they_lie,
)
from fsvd_compile.kernels._stream_few import SUMMED_ROWS
from fsvd_compile.kernels._triton import cdiv
from fsvd_compile.phase import Phase

_LIB = torch.library.Library("fsvd", "FRAGMENT")
_LIB.define(
    "expand_rms(Tensor z, Tensor weight, Tensor? bias, int offset, Tensor? residual, Tensor? norm_weight, "
    "float norm_offset) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIB.define(
    "shrink_rms(Tensor scaled, Tensor squares, Tensor[] weights, Tensor?[] biases, float norm_eps) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def expand_rms_aten(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offset: int,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_offset: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """An expand of one weight, and what RMSNorm of its result needs.

    Args:
        z: `[..., R]`; the weight reads `z[..., offset : offset + r]`.
        weight: `[n, r]`.
        bias: `[n]` or None.
        offset: See z.
        residual: `[..., n]` or None.
        norm_weight: `[n]`; None multiplies by 1.
        norm_offset: Added to it (1.0 for Gemma-like models).

    Returns:
        y `[..., n]` as `expand` returns it; y times `norm_offset + norm_weight`, `[..., n]`; and fp32 sums of squares
        of y `[ceil(n / 32), M]`, M tokens: their sum over the first dimension is that over features. How they divide
        it is left open. All in z's dtype but for the sums.

    Raises:
        FactorError: as in `expand_reference`, or the norm's weight does not fit.
    """
    y = expand.expand_aten(z, [weight], [bias], [offset], residual)
    return y, *rms_operands(y, norm_weight, norm_offset)


def rms_operands(y: Tensor, weight: Tensor | None, offset: float) -> tuple[Tensor, Tensor]:
    """What `shrink_rms` reads of a `y` that no expand returned, of torch ops.

    Args:
        y: `[..., n]`.
        weight: `[n]`, the norm's; None multiplies by 1.
        offset: Added to it.

    Returns:
        The second and the third result of `expand_rms` of this y.

    Raises:
        FactorError: the norm's weight does not fit.
    """
    _check_norm(y.shape[-1], weight)
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    scaled = wide if weight is None else wide * (weight.to(wide.dtype) + offset)
    tokens, parts = math.prod(y.shape[:-1]), cdiv(y.shape[-1], SUMMED_ROWS)
    squares = wide.square().float().reshape(tokens, y.shape[-1])
    squares = F.pad(squares, (0, parts * SUMMED_ROWS - y.shape[-1]))
    squares = squares.view(tokens, parts, SUMMED_ROWS).sum(-1).t().contiguous()
    return scaled.to(y.dtype, copy=True), squares


def shrink_rms_aten(
    scaled: Tensor,
    squares: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norm_eps: float,
) -> Tensor:
    """A shrink of RMSNorm(y), given y times the norm's weight.

    Args:
        scaled: `[..., K]`.
        squares: As `expand_rms_aten` returns them, `[ceil(K / 32), M]`.
        weights: `r_i` by K each.
        biases: `[r_i]` or None each.
        norm_eps: Added under the root.

    Returns:
        `[..., sum r_i]`.

    Raises:
        FactorError: as in `shrink_reference`, or `squares` do not fit.
    """
    _check_squares(scaled, squares)
    factor = torch.rsqrt(squares.sum(0) / scaled.shape[-1] + norm_eps)
    x = scaled * factor.view(*scaled.shape[:-1], 1)  # in fp32 at least, as the sums are
    return shrink.shrink_aten(x.to(scaled.dtype), weights, biases)


def expand_rms_triton(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offset: int,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_offset: float = 0.0,
    *,
    pdl: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`expand_rms_aten` by one Triton kernel; for inputs of which `_linear.carries` is true.

    Squares and products are of the result before it is rounded.

    Raises:
        FactorError: as in `expand_rms_aten`, or no kernel carries the norm.
    """
    expand._check(z, [weight], [bias], [offset], residual, "none")
    _check_norm(weight.shape[0], norm_weight)
    tokens, n = math.prod(z.shape[:-1]), weight.shape[0]
    _check_carried("expand", z.reshape(tokens, z.shape[-1]), [weight], [offset])
    y, scaled = (torch.empty((tokens, n), dtype=z.dtype, device=z.device) for _ in range(2))
    squares = z.new_empty((cdiv(n, SUMMED_ROWS), tokens), dtype=torch.float32)
    linear(
        "expand",
        z.reshape(tokens, z.shape[-1]),
        [weight],
        [bias],
        [offset],
        y,
        phase=Phase.FEW,
        pdl=pdl and read_as_they_lie(norm_weight),
        residual=None if residual is None else residual.reshape(tokens, n),
        carry=Carry(in_order(norm_weight), norm_offset, scaled, squares),
    )
    shape = (*z.shape[:-1], n)
    return y.view(shape), scaled.view(shape), squares


def shrink_rms_triton(
    scaled: Tensor,
    squares: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norm_eps: float,
    *,
    pdl: bool = False,
) -> Tensor:
    """`shrink_rms_aten` by Triton kernels; for inputs of which `_linear.carries` is true.

    Raises:
        FactorError: as in `shrink_rms_aten`, or no kernel carries the norm.
    """
    shrink._check(scaled, weights, biases, "none", None, None)
    _check_squares(scaled, squares)
    tokens, k = math.prod(scaled.shape[:-1]), scaled.shape[-1]
    _check_carried("shrink", scaled.reshape(tokens, k), weights, [0] * len(weights))
    z = scaled.new_empty((tokens, sum(w.shape[0] for w in weights)))
    linear(
        "shrink",
        scaled.reshape(tokens, k),
        weights,
        biases,
        [0] * len(weights),
        z,
        phase=Phase.FEW,
        pdl=pdl,
        norm=("carried", squares, None, norm_eps, 0.0),
    )
    return z.view(*scaled.shape[:-1], z.shape[1])


def _check_carried(op: str, x: Tensor, weights: Sequence[Tensor], offsets: Sequence[int]) -> None:
    if not carries(op, x, weights, offsets):
        raise FactorError(
            f"{op}_rms: no kernel carries a norm for {x.shape[0]} tokens of {x.dtype} on {x.device} and weights of "
            f"{[tuple(w.shape) for w in weights]}; it takes "
            f"{' or '.join(f'{least} to {most}' for least, most in CARRIED_TOKENS)} in bfloat16 whose weights are "
            f"streamed (compute capability 9.0). torch.ops.fsvd.{op}_rms computes the same for all others."
        )


def _check_norm(features: int, weight: Tensor | None) -> None:
    if weight is not None and tuple(weight.shape) != (features,):
        raise FactorError(
            f"expand_rms: norm_weight has shape {tuple(weight.shape)}; it must be [{features}] or None."
        )


def _check_squares(scaled: Tensor, squares: Tensor) -> None:
    expected = cdiv(scaled.shape[-1], SUMMED_ROWS), math.prod(scaled.shape[:-1])
    if tuple(squares.shape) != expected:
        raise FactorError(
            f"shrink_rms: squares have shape {tuple(squares.shape)}, and scaled {tuple(scaled.shape)}; they must be "
            f"{list(expected)}, as expand_rms returns them."
        )
    if squares.dtype != torch.float32 or not squares.is_contiguous():
        raise FactorError(
            f"shrink_rms: squares are {squares.dtype} of strides {squares.stride()}; they must be contiguous float32."
        )


def _fake_expand(z, weight, bias, offset, residual, norm_weight, norm_offset):
    y = expand._fake(z, [weight], [bias], [offset], residual, "none")
    _check_norm(weight.shape[0], norm_weight)
    parts = cdiv(weight.shape[0], SUMMED_ROWS)
    squares = z.new_empty((parts, math.prod(z.shape[:-1])), dtype=torch.float32)
    return y, torch.empty_like(y), squares


def _fake_shrink(scaled, squares, weights, biases, norm_eps):
    _check_squares(scaled, squares)
    return shrink._fake(scaled, weights, biases, "none", None, None, norm_eps, 0.0)


def _cuda_expand(z, weight, bias, offset, residual, norm_weight, norm_offset):
    rows = z.reshape(math.prod(z.shape[:-1]), z.shape[-1])
    if carries("expand", rows, [weight], [offset]):
        pdl = _triton.supports_pdl(z.device)
        return expand_rms_triton(
            z, weight, bias, offset, residual, norm_weight, norm_offset, pdl=pdl
        )
    y = expand._cuda(z, [weight], [bias], [offset], residual, "none")
    return y, *rms_operands(y, norm_weight, norm_offset)


def _cuda_shrink(scaled, squares, weights, biases, norm_eps):
    rows = scaled.reshape(math.prod(scaled.shape[:-1]), scaled.shape[-1])
    if carries("shrink", rows, weights, [0] * len(weights)):
        pdl = _triton.supports_pdl(scaled.device)
        return shrink_rms_triton(scaled, squares, weights, biases, norm_eps, pdl=pdl)
    return shrink_rms_aten(scaled, squares, weights, biases, norm_eps)


torch.library.register_fake("fsvd::expand_rms", _fake_expand, lib=_LIB)
torch.library.register_fake("fsvd::shrink_rms", _fake_shrink, lib=_LIB)
_LIB.impl("expand_rms", expand_rms_aten, "CPU")
_LIB.impl("expand_rms", _cuda_expand, "CUDA")
_LIB.impl("shrink_rms", shrink_rms_aten, "CPU")
_LIB.impl("shrink_rms", _cuda_shrink, "CUDA")
