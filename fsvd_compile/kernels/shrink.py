"""`fsvd::shrink`: the first half of every low-rank chain, y = concat_i(norm(x) @ W_i^T + b_i).

Siblings that read the same x (q/k/v, gate/up) shrink in one launch, and the norm in front of them
is computed inside it: x is small, so that every program recomputes the statistic costs less than a
kernel of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fsvd_compile.errors import FactorError
from fsvd_compile.kernels import _triton
from fsvd_compile.kernels._linear import check_operands, in_order, linear, read_as_they_lie
from fsvd_compile.phase import Phase, phase_of

NORMS = ("none", "rms", "layer")

_LIB = torch.library.Library("fsvd", "FRAGMENT")
_LIB.define(
    "shrink(Tensor x, Tensor[] weights, Tensor?[] biases, str norm, Tensor? norm_weight, "
    "Tensor? norm_bias, float norm_eps, float norm_offset) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def shrink_reference(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norm: str = "none",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 0.0,
    norm_offset: float = 0.0,
) -> Tensor:
    """The ground truth in fp32 (fp64 for fp64 inputs); the result is not rounded to `x.dtype`.

    Args:
        x: `[..., K]`.
        weights: `r_i` by `K` each, any strides.
        biases: `[r_i]` or None each, as many as weights.
        norm: `"none"`, `"rms"` (x * rsqrt(mean(x^2) + eps) * (offset + w)) or `"layer"`
            ((x - mean) * rsqrt(var + eps) * w + b).
        norm_weight: `[K]`; None multiplies by 1.
        norm_bias: `[K]`, for `"layer"` only.
        norm_eps: Added under the root.
        norm_offset: Added to the weight of `"rms"` (1.0 for Gemma-like models).

    Returns:
        `[..., sum r_i]`.

    Raises:
        FactorError: shapes, dtypes or the norm's arguments disagree.
    """
    _check(x, weights, biases, norm, norm_weight, norm_bias)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    xh = normed(x.to(wide), norm, norm_weight, norm_bias, norm_eps, norm_offset)
    parts = [
        xh @ w.to(wide).t() + (0 if b is None else b.to(wide))
        for w, b in zip(weights, biases, strict=True)
    ]
    return torch.cat(parts, -1)


def shrink_aten(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norm: str = "none",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 0.0,
    norm_offset: float = 0.0,
) -> Tensor:
    """`shrink_reference` in x's dtype, of torch ops: one fp32 norm to fuse, a linear a weight."""
    _check(x, weights, biases, norm, norm_weight, norm_bias)
    xh = x
    if norm != "none":
        wide = torch.promote_types(x.dtype, torch.float32)
        xh = normed(x.to(wide), norm, norm_weight, norm_bias, norm_eps, norm_offset).to(x.dtype)
    parts = [F.linear(xh, w, b) for w, b in zip(weights, biases, strict=True)]
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, -1)


def normed(x: Tensor, norm: str, weight, bias, eps: float, offset: float) -> Tensor:
    if norm == "none":
        return x
    if norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        x = x * ((weight.to(x.dtype) + offset) if norm == "rms" else weight.to(x.dtype))
    return x if bias is None else x + bias.to(x.dtype)


def shrink_triton(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norm: str = "none",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 0.0,
    norm_offset: float = 0.0,
    *,
    pdl: bool = False,
    phase: Phase | None = None,
) -> Tensor:
    """`shrink_reference` in x's dtype by Triton kernels.

    Accumulates in fp32 and rounds once. In the decode phase the norm is rounded where weights are streamed (see
    `_stream`) and not elsewhere; for more tokens it is, to x's dtype, as in eager. Of up to 16 tokens whose weights
    are streamed in bf16 (`_stream_few.normalizes`) x times the norm's weight is rounded, and the factor of RMSNorm is
    applied to the product.

    Args:
        pdl: Programmatic dependent launch (sm_90 and later). Weights, biases and the norm's
            parameters are then requested before the preceding kernel is complete: they must not be
            what that kernel writes.
        phase: DECODE takes the GEMV kernel, anything else the tensor-core one, both for any number
            of tokens; None decides by the number of tokens and, of two, by whether their weights are streamed.

    Raises:
        DeviceError: Triton is missing, or x is on a CPU without Triton's interpreter.
        FactorError: as in `shrink_reference`.
    """
    _check(x, weights, biases, norm, norm_weight, norm_bias)
    _triton.require_triton(x)
    tokens = math.prod(x.shape[:-1])
    out = torch.empty((tokens, sum(w.shape[0] for w in weights)), dtype=x.dtype, device=x.device)
    linear(
        "shrink",
        x.reshape(tokens, x.shape[-1]),
        weights,
        biases,
        [0] * len(weights),
        out,
        phase=phase,
        pdl=pdl and read_as_they_lie(norm_weight, norm_bias),
        norm=(norm, in_order(norm_weight), in_order(norm_bias), norm_eps, norm_offset),
    )
    return out.view(*x.shape[:-1], out.shape[1])


def _check(x, weights, biases, norm, norm_weight, norm_bias) -> None:
    if norm not in NORMS:
        raise FactorError(f"shrink: norm={norm!r} is not known; it takes {', '.join(NORMS)}.")
    if len(weights) == 0 or len(weights) != len(biases):
        raise FactorError(
            f"shrink: {len(weights)} weights and {len(biases)} biases were given; it takes at "
            "least one weight and one entry of `biases` (a tensor or None) for each."
        )
    if x.dim() == 0:
        raise FactorError("shrink: x has no dimensions; it takes [..., K].")
    k = x.shape[-1]
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        if w.dim() != 2 or w.shape[1] != k:
            raise FactorError(
                f"shrink: weights[{i}] has shape {tuple(w.shape)} but x ends in {k}; "
                f"it must be [rank, {k}], stored in any order."
            )
        check_operands("shrink", i, w, b, "x", x)
    for name, v in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if v is not None and (v.dim() != 1 or v.shape[0] != k):
            raise FactorError(
                f"shrink: {name} has shape {tuple(v.shape)}; it must be [{k}] or None."
            )
    if norm == "none" and norm_weight is not None:
        raise FactorError(
            'shrink: norm_weight was given with norm="none"; pass None or name the norm.'
        )
    if norm != "layer" and norm_bias is not None:
        raise FactorError(
            f'shrink: norm_bias was given with norm={norm!r}; only "layer" has a bias.'
        )


def _fake(x, weights, biases, norm, norm_weight, norm_bias, norm_eps, norm_offset):
    _check(x, weights, biases, norm, norm_weight, norm_bias)
    return x.new_empty((*x.shape[:-1], sum(w.shape[0] for w in weights)))


def _cuda(x, weights, biases, norm, norm_weight, norm_bias, norm_eps, norm_offset):
    args = (x, weights, biases, norm, norm_weight, norm_bias, norm_eps, norm_offset)
    tokens = math.prod(x.shape[:-1])
    if phase_of(tokens) is Phase.PREFILL or x.dtype not in _triton.TRITON_DTYPES:
        return shrink_aten(*args)
    return shrink_triton(*args, pdl=_triton.supports_pdl(x.device))


torch.library.register_fake("fsvd::shrink", _fake, lib=_LIB)
_LIB.impl("shrink", shrink_aten, "CPU")
_LIB.impl("shrink", _cuda, "CUDA")
