"""`fsvd::expand`: the second half of the low-rank chains, block-diagonal, with all that follows it.

Block i reads its slice z_i of the latent that `fsvd::shrink` wrote and multiplies it by U_i; bias,
activation or gating, and the residual are applied in fp32 before the one rounding of the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fsvd_compile.errors import FactorError
from fsvd_compile.kernels import _triton
from fsvd_compile.kernels._linear import check_operands, linear
from fsvd_compile.phase import Phase, phase_of

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")
GATES = ("relu_mul", "gelu_mul", "gelu_tanh_mul", "silu_mul")

_LIB = torch.library.Library("fsvd", "FRAGMENT")
_LIB.define(
    "expand(Tensor z, Tensor[] weights, Tensor?[] biases, int[] offsets, Tensor? residual, "
    "str activation) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def expand_reference(
    z: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    offsets: Sequence[int],
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """The ground truth in fp32 (fp64 for fp64 inputs); the result is not rounded to `z.dtype`.

    Args:
        z: `[..., R]`, any strides.
        weights: `n_i` by `r_i` each, any strides.
        biases: `[n_i]` or None each, as many as weights.
        offsets: Where block i starts in z: it reads `z[..., offsets[i] : offsets[i] + r_i]`.
        residual: Of the output's shape, or None.
        activation: `"none"`, `"relu"`, `"gelu"`, `"gelu_tanh"`, `"silu"` on every block, or one of
            them with `"_mul"`: two blocks of the same n, act(y_0) * y_1.

    Returns:
        `[..., sum n_i]`, or `[..., n_0]` for the gated activations.

    Raises:
        FactorError: shapes, dtypes, offsets or the activation disagree.
    """
    _check(z, weights, biases, offsets, residual, activation)
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    parts = []
    for w, b, start in zip(weights, biases, offsets, strict=True):
        part = z[..., start : start + w.shape[1]].to(wide) @ w.to(wide).t()
        parts.append(part if b is None else part + b.to(wide))
    y = activated(parts, activation)
    return y if residual is None else y + residual.to(wide)


def expand_aten(
    z: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    offsets: Sequence[int],
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """`expand_reference` in z's dtype, of torch ops: a linear a block, one epilogue to fuse."""
    _check(z, weights, biases, offsets, residual, activation)
    parts = [
        F.linear(z[..., start : start + w.shape[1]], w, b)
        for w, b, start in zip(weights, biases, offsets, strict=True)
    ]
    if activation == "none" and residual is None:
        return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, -1)
    wide = torch.promote_types(z.dtype, torch.float32)
    y = activated([part.to(wide) for part in parts], activation)
    if residual is not None:
        y = y + residual.to(wide)
    return y.to(z.dtype).contiguous()


def activated(parts: list[Tensor], activation: str) -> Tensor:
    if activation in GATES:
        return _act(parts[0], activation.removesuffix("_mul")) * parts[1]
    return _act(parts[0] if len(parts) == 1 else torch.cat(parts, -1), activation)


def _act(y: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return F.relu(y)
    if activation == "gelu":
        return F.gelu(y)
    if activation == "gelu_tanh":
        return F.gelu(y, approximate="tanh")
    if activation == "silu":
        return F.silu(y)
    return y


def expand_triton(
    z: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    offsets: Sequence[int],
    residual: Tensor | None = None,
    activation: str = "none",
    *,
    pdl: bool = False,
    phase: Phase | None = None,
) -> Tensor:
    """`expand_reference` in z's dtype by Triton kernels.

    Accumulates in fp32 and rounds once, after activation and residual. A rank that is a multiple of 8 (in 16-bit
    types) and stored with such a stride is read 16 bytes a load, and so are odd ones for one or two
    tokens; other ranks cost narrower loads, odd ones (819, 1791) of more tokens one an element.

    Args:
        pdl: Programmatic dependent launch (sm_90 and later). Weights and biases are then requested
            before the preceding kernel is complete: they must not be what that kernel writes.
        phase: DECODE takes the GEMV kernel, anything else the tensor-core one, both for any number
            of tokens; None decides by the number of tokens and, of two, by whether their weights are streamed.

    Raises:
        DeviceError: Triton is missing, or z is on a CPU without Triton's interpreter.
        FactorError: as in `expand_reference`.
    """
    _check(z, weights, biases, offsets, residual, activation)
    _triton.require_triton(z)
    tokens = math.prod(z.shape[:-1])
    shape = _out_shape(z, weights, activation)
    out = torch.empty((tokens, shape[-1]), dtype=z.dtype, device=z.device)
    linear(
        "expand",
        z.reshape(tokens, z.shape[-1]),
        weights,
        biases,
        offsets,
        out,
        phase=phase,
        pdl=pdl,
        activation=activation,
        residual=None if residual is None else residual.reshape(tokens, shape[-1]),
    )
    return out.view(shape)


def _check(z, weights, biases, offsets, residual, activation) -> None:
    if activation not in ACTIVATIONS + GATES:
        raise FactorError(
            f"expand: activation={activation!r} is not known; it takes "
            f"{', '.join(ACTIVATIONS + GATES)}."
        )
    if len(weights) == 0 or not len(weights) == len(biases) == len(offsets):
        raise FactorError(
            f"expand: {len(weights)} weights, {len(biases)} biases and {len(offsets)} offsets were "
            "given; it takes at least one weight, and a bias (or None) and an offset for each."
        )
    if z.dim() == 0:
        raise FactorError("expand: z has no dimensions; it takes [..., R].")
    for i, (w, b, start) in enumerate(zip(weights, biases, offsets, strict=True)):
        if w.dim() != 2:
            raise FactorError(
                f"expand: weights[{i}] has shape {tuple(w.shape)}; it must be [n, rank]."
            )
        if start < 0 or start + w.shape[1] > z.shape[-1]:
            raise FactorError(
                f"expand: block {i} reads z[..., {start}:{start + w.shape[1]}] but z ends in "
                f"{z.shape[-1]}; give an offset and a weight [n, rank] that fit."
            )
        check_operands("expand", i, w, b, "z", z)
    if activation in GATES and (len(weights) != 2 or weights[0].shape[0] != weights[1].shape[0]):
        raise FactorError(
            f"expand: activation={activation!r} got weights of "
            f"{[w.shape[0] for w in weights]} rows; a gated activation takes exactly two blocks, "
            "gate and up, of the same number of rows."
        )
    if residual is not None and tuple(residual.shape) != _out_shape(z, weights, activation):
        raise FactorError(
            f"expand: residual has shape {tuple(residual.shape)}; the output is "
            f"{_out_shape(z, weights, activation)} and nothing is broadcast."
        )


def _out_shape(z, weights, activation) -> tuple:
    rows = weights[0].shape[0] if activation in GATES else sum(w.shape[0] for w in weights)
    return (*z.shape[:-1], rows)


def _fake(z, weights, biases, offsets, residual, activation):
    _check(z, weights, biases, offsets, residual, activation)
    return z.new_empty(_out_shape(z, weights, activation))


def _cuda(z, weights, biases, offsets, residual, activation):
    args = (z, weights, biases, offsets, residual, activation)
    tokens = math.prod(z.shape[:-1])
    if phase_of(tokens) is Phase.PREFILL or z.dtype not in _triton.TRITON_DTYPES:
        return expand_aten(*args)
    return expand_triton(*args, pdl=_triton.supports_pdl(z.device))


torch.library.register_fake("fsvd::expand", _fake, lib=_LIB)
_LIB.impl("expand", expand_aten, "CPU")
_LIB.impl("expand", _cuda, "CUDA")
