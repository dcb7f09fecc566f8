"""The kernels behind `fsvd::shrink` and `fsvd::expand`: several low-rank products in one launch.

Both ops are block-diagonal linears, so they share their kernels and differ in what surrounds the
product: shrink has a norm in front and all blocks read the same x, expand has slices of z in front
and bias, activation, gate and residual behind.

* `_gemv`, for one or two tokens that the streamed kernels below do not take: a program owns a few rows of one weight
  and requests them whole, K masked to a power of two, before it looks at x; fp32 multiply and `tl.sum`. Longer K loops.
  RMSNorm is one factor a row, found in the same pass. A layer's eight linears stream at 80 % of an H200's read limit
  (see configs/sm90.json); bench/NOTES.md says where the rest is.
* `_stream`, for one token on compute capability 9.0: the same product of weights that TMA brings into shared memory, a
  warp to a row or a few. The eight linears: 85 %, 53.4 us for 55.7; of ranks 1433 and 2089 78.8 us for 110.
* programmatic dependent launch (USE_PDL): the next kernel may start when every program of this one
  has started. It requests its weights, which nobody writes, and then waits (`gdc_wait`) until this
  kernel is complete before it touches an activation or writes anything. Every kernel of this
  package waits, so completion is transitive.
* `_skinny`, for a few dozen tokens everywhere else: `tl.dot` on tiles of 16 to 64 tokens, every weight read once
  per tile. Each warp of a program takes slices of K of its own (to Triton, a batch), summed at the
  end. A norm runs in `_norm_rows` before it, and before `_stream_few` unless that `normalizes`.
* `_stream_few`, for 2 to 64 tokens on compute capability 9.0: the same tiles of weights and of x that TMA brings into
  shared memory. The eight linears of 8 tokens take 64.9 us for 92.1, those of 32 88.3 for 113.9, and of 2, which
  `_gemv` had before, 59.5 for 78.4.

How a weight is stored ("row": K contiguous, "col": rows contiguous, "any") is compile-time
knowledge, and so is the alignment of its rows: sizes and strides arrive divided by ALIGN and are
multiplied back in the kernel, which is how Triton learns that 16-byte loads are legal when a rank
is a multiple of 8 but not of 16. An odd rank such as 819 makes rows start anywhere between two multiples
of 16 bytes. `_gemv` and `_stream` then take rows that are STEP apart, so that all of a program start equally far from
one, read whole vectors of 16 bytes and move x instead of W; `_skinny` loads each element by itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fsvd_compile.errors import FactorError
from fsvd_compile.kernels import _memo, _stream, _stream_few, _triton, _tuning
from fsvd_compile.kernels._gemv import _gemv
from fsvd_compile.kernels._skinny import _norm_rows, _skinny
from fsvd_compile.kernels._triton import cdiv, next_power_of_2
from fsvd_compile.phase import Phase, phase_of

# RMSNorm is carried for so many tokens, least and most. A layer of LLaMA-7B, its norms in the shrink or a kernel and
# carried (H200): 8 tokens 82.7 and 80.9 us, 16 105.8 and 107.8, 32 152.2 and, with tiles that were searched with it,
# 148.3, 64 246.0 and 254.2. What 32 tokens owe to the norm and what to the tiles is not known; other numbers of tokens
# take the tiles of the next of these, two those of 8.
CARRIED_TOKENS = ((2, 8), (17, 32))


class Carry(NamedTuple):
    """What an expand leaves for the RMSNorm behind it, see `carried`.

    Attributes:
        weight: The norm's, `[n]`, or None.
        offset: Added to it.
        scaled: Filled with the result times the weight, `[M, n]`.
        squares: Filled with sums of squares of the result, `[ceil(n / 32), M]` in fp32.
    """

    weight: Tensor | None
    offset: float
    scaled: Tensor
    squares: Tensor


def check_operands(op: str, i: int, w: Tensor, b: Tensor | None, name: str, x: Tensor) -> None:
    """Raises FactorError unless weight and bias number `i` of an op go with its input `x`, called `name`."""
    if w.dtype != x.dtype:
        raise FactorError(
            f"{op}: weights[{i}] is {w.dtype} and {name} is {x.dtype}; cast one to the other."
        )
    if b is not None and (b.dim() != 1 or b.shape[0] != w.shape[0]):
        raise FactorError(
            f"{op}: biases[{i}] has shape {tuple(b.shape)}; weights[{i}] asks for "
            f"[{w.shape[0]}] or None."
        )
    if b is not None and b.dtype != x.dtype:
        raise FactorError(
            f"{op}: biases[{i}] is {b.dtype} and {name} is {x.dtype}; cast one to the other."
        )


def linear(
    op: str,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    offsets: Sequence[int],
    out: Tensor,
    *,
    phase: Phase | None,
    pdl: bool,
    norm: tuple = ("none", None, None, 0.0, 0.0),
    activation: str = "none",
    residual: Tensor | None = None,
    carry: Carry | None = None,
) -> Tensor:
    """Fills `out` `[M, n]` with the block-diagonal product of `x` `[M, K]`.

    Weights stored alike go into one launch, up to four; a launch writes its columns of `out`. No phase is that of the
    number of tokens, see `_phase_of`. A norm named "carried" is a factor by sums of squares, its weight; that and
    `carry` are for launches of which `carries` is true.
    """
    if out.numel() == 0:
        return out
    x, residual = _triton.near(x), residual if residual is None else _triton.near(residual)
    pdl = pdl and read_as_they_lie(*biases)
    biases = [in_order(b) for b in biases]
    phase = phase or _phase_of(op, x, weights, offsets)
    gated = activation.endswith("_mul")
    groups = [[0, 1]] if gated else _launches(weights)
    if phase is not Phase.DECODE and norm[0] not in ("none", "carried"):
        rows = sum(w.shape[0] for w in weights)
        few = _kernels_of_few(op, x, weights, offsets)
        inside = few == ["few"] and _stream_few.normalizes(x, rows, norm)
        if not inside:
            x, norm = _normed_rows(x, norm, pdl), ("none", None, None, 0.0, 0.0)
    starts = [0]
    for w in weights:
        starts.append(starts[-1] + w.shape[0])
    for group in groups:
        first, last = starts[group[0]], starts[group[-1] + 1]
        _launch(
            op,
            x,
            [weights[i] for i in group],
            [biases[i] for i in group],
            [offsets[i] for i in group],
            out if gated else out[:, first:last],
            phase,
            pdl,
            norm,
            activation.removesuffix("_mul"),
            gated,
            residual if residual is None or gated else residual[:, first:last],
            carry,
        )
    return out


def in_order(parameter: Tensor | None) -> Tensor | None:
    """A norm's parameter or a bias as kernels read it, one element behind the other."""
    return None if parameter is None else parameter.contiguous()


def read_as_they_lie(*parameters: Tensor | None) -> bool:
    """Whether `in_order` copies none of the parameters: a copy may not be read ahead."""
    return all(parameter is None or parameter.is_contiguous() for parameter in parameters)


def carries(op: str, x: Tensor, weights: Sequence[Tensor], offsets: Sequence[int]) -> bool:
    """Whether RMSNorm can be carried to or from a product of a few tokens, all of whose launches are `_stream_few`'s.

    For `CARRIED_TOKENS`, of an expand of one weight, and in bf16 alone: what is multiplied by the norm's weight is not
    normalized yet, and too large for fp16 perhaps.
    """
    return (
        x.dtype == torch.bfloat16
        and (op == "shrink" or len(weights) == 1)
        and any(least <= x.shape[0] <= most for least, most in CARRIED_TOKENS)
        and set(_kernels_of(op, x, weights, offsets, Phase.FEW)) <= {"few"}
    )


def _launches(weights: Sequence[Tensor], most: int = 4) -> list[list[int]]:
    """Runs of neighbours with the same storage order, at most `most` long."""
    runs: list[list[int]] = []
    for i, w in enumerate(weights):
        if w.shape[0] == 0:
            continue
        alike = runs and runs[-1][-1] == i - 1 and layout_of(weights[i - 1]) == layout_of(w)
        if alike and len(runs[-1]) < most:
            runs[-1].append(i)
        else:
            runs.append([i])
    return runs


def layout_of(w: Tensor) -> str:
    """`"row"` for K contiguous, `"col"` for transposed storage, `"any"` for the rest."""
    if w.stride(1) == 1 or w.shape[1] == 1:
        return "row"
    return "col" if w.stride(0) == 1 or w.shape[0] == 1 else "any"


def _layout_of(weights: Sequence[Tensor]) -> str:
    """What `layout_of` says of all of them, "any" if they differ."""
    layouts = {layout_of(w) for w in weights}
    return layouts.pop() if len(layouts) == 1 else "any"


def kernel_of(
    op: str, x: Tensor, weights: Sequence[Tensor], offsets: Sequence[int], phase: Phase
) -> str:
    """The kernel of a launch, as `_tuning.Launch` names it."""
    layout = _layout_of(weights)
    if phase is Phase.DECODE:
        return "stream" if _stream.takes(op, x, weights, layout) else "gemv"
    return "few" if _stream_few.takes(op, x, weights, offsets, layout) else "skinny"


def _phase_of(op: str, x: Tensor, weights: Sequence[Tensor], offsets: Sequence[int]) -> Phase:
    """`phase_of` the tokens; but two are a few where every launch is `_stream_few`'s.

    A layer of LLaMA-7B with two sequences of 530 tokens: 67.5 us, 96.2 with `_gemv` (H200).
    """
    if x.shape[0] == 2 and set(_kernels_of_few(op, x, weights, offsets)) == {"few"}:
        return Phase.FEW
    return phase_of(x.shape[0])


def _kernels_of_few(
    op: str, x: Tensor, weights: Sequence[Tensor], offsets: Sequence[int]
) -> list[str]:
    """`_kernels_of` a few tokens; asked again it takes a third of the time, of every launch outside of a CUDA graph."""
    key = op, tuple(offsets)
    return _memo.answer(key, (x, *weights), lambda: _kernels_of(op, x, weights, offsets, Phase.FEW))


def _kernels_of(
    op: str, x: Tensor, weights: Sequence[Tensor], offsets: Sequence[int], phase: Phase
) -> list[str]:
    """`kernel_of` each launch that weights go into."""
    return [
        kernel_of(op, x, [weights[i] for i in group], [offsets[i] for i in group], phase)
        for group in _launches(weights)
    ]


def _launch(op, x, weights, biases, offsets, out, phase, pdl, norm, act, gated, residual, carry):
    kind, norm_weight, norm_bias, eps, offset = norm
    key = (
        op, len(weights), tuple(offsets), phase, pdl, kind, float(eps), float(offset), act, gated,
        None if carry is None else float(carry.offset),
    )  # fmt: skip
    tensors = [x, out, residual, norm_weight, norm_bias, *weights, *biases]
    if carry is not None:
        tensors += carry.weight, carry.scaled, carry.squares
    given = op, x, weights, biases, offsets, out, phase, pdl, norm, act, gated, residual, carry
    _memo.launch(key, tensors, lambda: _launch_anew(*given))


def _launch_anew(
    op, x, weights, biases, offsets, out, phase, pdl, norm, act, gated, residual, carry
):
    layout = _layout_of(weights)
    align = _alignment(weights, layout)
    n_unit = align if layout == "col" else 1
    k_unit = align if layout == "row" else 1
    m = x.shape[0]
    k = max(w.shape[1] for w in weights)
    rows = weights[0].shape[0] if gated else sum(w.shape[0] for w in weights)
    kernel = kernel_of(op, x, weights, offsets, phase)
    step, vector = 1, 1
    if kernel == "stream":
        step = _stream.row_step(weights)
        vector = 8 if step > 1 else 1
    elif kernel == "gemv" and layout == "row" and norm[0] == "none":
        step, vector = _shifted(weights, align)
    has_bias = any(b is not None for b in biases)
    launch = _tuning.Launch(
        op,
        kernel,
        k,
        rows,
        m,
        x.element_size(),
        layout,
        gated,
        vector,
        kernel in ("stream", "few") and norm[0] not in ("none", "carried"),
        carry is not None,
    )
    tile = _tuning.linear_tile(launch, x.device)
    shared = {
        "X": x,
        "Y": out,
        "W": tuple(weights),
        # A missing bias is read as one of length 0; the pointer only has to be of the right type.
        "BIAS": tuple(w if b is None else b for w, b in zip(weights, biases, strict=True)),
        "RES": x if residual is None else residual,
        "N": tuple(w.shape[0] // n_unit for w in weights),
        "NB": tuple(0 if b is None else b.shape[0] for b in biases),
        "KS": tuple(w.shape[1] // k_unit for w in weights),
        "STRIDE_R": tuple(w.stride(0) // align for w in weights),
        "STRIDE_K": tuple(w.stride(1) // align for w in weights),
        "OFFSETS": tuple(offsets),
        "M": m,
        "stride_xm": x.stride(0),
        "stride_xk": x.stride(1),
        "stride_ym": out.stride(0),
        "stride_rm": 0 if residual is None else residual.stride(0),
        "stride_rn": 0 if residual is None else residual.stride(1),
        "COUNT": len(weights),
        "BLOCK_R": tile.block_r,
        "BLOCK_K": tile.block_k,
        "NUM_K": max(1, cdiv(k + vector - 1, tile.block_k * tile.split)),
        "ALIGN": align,
        "LAYOUT": layout,
        "ACT": act,
        "GATED": gated,
        "HAS_BIAS": has_bias,
        "HAS_RES": residual is not None,
        "num_warps": tile.num_warps,
    }
    blocks = sum(
        cdiv(w.shape[0], tile.block_r * step) * step for w in (weights[:1] if gated else weights)
    )
    if kernel == "stream":
        _stream.launch(x, weights, shared | _norm_arguments(x, norm), tile, blocks, pdl)
    elif kernel == "few":
        shared |= _norm_arguments(x, norm) | {"CARRY": carry}
        _stream_few.launch(x, weights, offsets, shared, tile, blocks, pdl)
    elif phase is Phase.DECODE:
        _triton.launch(
            _gemv,
            (blocks, cdiv(m, tile.block_m)),
            x.device,
            pdl,
            TOKENS=tile.block_m,
            STEP=step,
            VECTOR=vector,
            **_norm_arguments(x, norm),
            **shared,
        )
    else:
        _triton.launch(
            _skinny,
            (blocks, cdiv(m, tile.block_m)),
            x.device,
            pdl,
            BLOCK_M=tile.block_m,
            SPLIT=tile.split,
            INTERPRET=_triton.interpreted(),
            num_stages=tile.num_stages,
            **shared,
        )


def _alignment(weights: Sequence[Tensor], layout: str) -> int:
    """The power of two, up to 16 bytes, that divides the contiguous extent and the other stride."""
    if layout == "any":
        return 1
    along = 1 if layout == "row" else 0
    return math.gcd(
        16 // weights[0].element_size(),
        *(w.shape[along] for w in weights),
        *(w.stride(1 - along) for w in weights),
    )


def _shifted(weights: Sequence[Tensor], align: int) -> tuple[int, int]:
    """STEP and VECTOR of `_gemv`: (1, 1) where it reads rows as they lie.

    That is unless they start at any element. On an H200 in bf16, gate and up of 11008 rows: K = 1791 takes 22.5 us
    shifted and 30.5 an element a load. Rows of 1228 and 2388, which are read 8 bytes a load otherwise, did not gain
    (bench/NOTES.md).
    """
    vector = 16 // weights[0].element_size()
    longest = max(w.shape[1] for w in weights)
    if (
        align > 1
        or not all(w.shape[1] for w in weights)  # nothing to be read, from no address
        or longest + vector - 1 > _tuning.SINGLE_TILE_K
        or not all(map(_triton.aligned, weights))
    ):
        return 1, 1
    return _stream.row_step(weights), vector


def _norm_arguments(x: Tensor, norm: tuple) -> dict:
    """What a kernel is told of the norm in front of it; a parameter that is missing is not read."""
    kind, weight, bias, eps, offset = norm
    return {
        "NORM": kind,
        "NORM_W": x if weight is None else weight,
        "NORM_B": x if bias is None else bias,
        "HAS_NORM_W": weight is not None,
        "HAS_NORM_B": bias is not None,
        "eps": float(eps),
        "norm_offset": float(offset),
    }


def _normed_rows(x: Tensor, norm: tuple, pdl: bool) -> Tensor:
    m, k = x.shape
    block = min(next_power_of_2(k), 8192)
    out = torch.empty((m, k), dtype=x.dtype, device=x.device)
    _triton.launch(
        _norm_rows,
        (m,),
        x.device,
        pdl,
        X=x,
        Y=out,
        K=k,
        stride_xm=x.stride(0),
        stride_xk=x.stride(1),
        BLOCK_K=block,
        NUM_K=max(1, cdiv(k, block)),
        **_norm_arguments(x, norm),
        num_warps=8 if block > 2048 else 4,
    )
    return out
