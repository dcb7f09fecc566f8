"""The kernels behind `fsvd::shrink` and `fsvd::expand`: several low-rank products in one launch.

Both ops are block-diagonal linears, so they share two kernels and differ in what surrounds the
product: shrink has a norm in front and all blocks read the same x, expand has slices of z in front
and bias, activation, gate and residual behind.

* `_gemv`, for one or two tokens: a program owns a few rows of one weight and requests them whole, K
  masked to a power of two, before it looks at x; fp32 multiply and `tl.sum`. Longer K loops. On an
  H200 such programs stream at the read limit when alone (see configs/sm90.json); what a chain of
  them loses is between the kernels, hence:
* programmatic dependent launch (USE_PDL): the next kernel may start when every program of this one
  has started. It requests its weights, which nobody writes, and then waits (`gdc_wait`) until this
  kernel is complete before it touches an activation or writes anything. Every kernel of this
  package waits, so completion is transitive.
* `_skinny`, for a few dozen tokens: `tl.dot` on tiles of 16 to 64 tokens, every weight read once
  per tile. A norm runs in `_norm_rows` before it: per program it would re-read M * K values for
  every few rows of W.

How a weight is stored ("row": K contiguous, "col": rows contiguous, "any") is compile-time
knowledge, and so is the alignment of its rows: sizes and strides arrive divided by ALIGN and are
multiplied back in the kernel, which is how Triton learns that 16-byte loads are legal when a rank
is a multiple of 8 but not of 16. A rank such as 819 makes every row start unaligned: ALIGN is 1 and
each element is loaded by itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fsvd_compile.errors import FactorError
from fsvd_compile.kernels import _triton, _tuning
from fsvd_compile.kernels._triton import (
    activate,
    cdiv,
    jit,
    next_power_of_2,
    norm_apply,
    norm_parameters,
    norm_statistics,
    pick_int,
    pick_pointer,
    pick_size,
    tile_statistics,
    tl,
)
from fsvd_compile.phase import Phase


@jit
def _locate(pid, N, N_ALIGN: tl.constexpr, COUNT: tl.constexpr, BLOCK_R: tl.constexpr):
    """(which weight, its first row here, its first output column) of a program."""
    which = 0
    first = 0
    column = 0
    for i in tl.static_range(0, COUNT - 1):
        n = N[i] * N_ALIGN
        past = pid >= first + tl.cdiv(n, BLOCK_R)
        past = past & (which == i)
        which = tl.where(past, i + 1, which)
        first = tl.where(past, first + tl.cdiv(n, BLOCK_R), first)
        column = tl.where(past, column + n, column)
    return which, (pid - first) * BLOCK_R, column


@jit
def _weight_offsets(rows, k, stride_r, stride_k, LAYOUT: tl.constexpr):
    """Offsets of a tile; `rows` and `k` come shaped to broadcast."""
    if LAYOUT == "row":
        return rows * stride_r + k
    elif LAYOUT == "col":
        return rows + k * stride_k
    else:
        return rows * stride_r + k * stride_k


@jit
def _gemv(
    X,
    Y,
    W,
    BIAS,
    RES,
    NORM_W,
    NORM_B,
    N,
    NB,
    KS,
    STRIDE_R,
    STRIDE_K,
    OFFSETS,
    M,
    stride_xm,
    stride_xk,
    stride_ym,
    stride_rm,
    stride_rn,
    eps,
    norm_offset,
    COUNT: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_K: tl.constexpr,
    ALIGN: tl.constexpr,
    LAYOUT: tl.constexpr,
    NORM: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RES: tl.constexpr,
    HAS_NORM_W: tl.constexpr,
    HAS_NORM_B: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
    N_ALIGN: tl.constexpr = ALIGN if LAYOUT == "col" else 1
    K_ALIGN: tl.constexpr = ALIGN if LAYOUT == "row" else 1
    m0 = tl.program_id(1) * TOKENS
    which, first, column = _locate(tl.program_id(0), N, N_ALIGN, 1 if GATED else COUNT, BLOCK_R)
    n = pick_size(which, N, COUNT) * N_ALIGN
    K = pick_size(which, KS, COUNT) * K_ALIGN
    rows = first + tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    row_ok = rows < n

    w_at = pick_pointer(which, W, COUNT) + _weight_offsets(
        rows[:, None],
        k[None, :],
        pick_int(which, STRIDE_R, COUNT) * ALIGN,
        pick_int(which, STRIDE_K, COUNT) * ALIGN,
        LAYOUT,
    )
    w_step = BLOCK_K * (1 if LAYOUT == "row" else pick_int(which, STRIDE_K, COUNT) * ALIGN)
    keep = row_ok[:, None] & (k < K)[None, :]
    w = tl.load(w_at, mask=keep, other=0.0, eviction_policy="evict_first")
    if GATED:
        K_up = tl.cast(KS[1], tl.int32) * K_ALIGN
        u_at = W[1] + _weight_offsets(
            rows[:, None],
            k[None, :],
            tl.cast(STRIDE_R[1], tl.int64) * ALIGN,
            tl.cast(STRIDE_K[1], tl.int64) * ALIGN,
            LAYOUT,
        )
        u_step = BLOCK_K * (1 if LAYOUT == "row" else tl.cast(STRIDE_K[1], tl.int64) * ALIGN)
        keep_up = row_ok[:, None] & (k < K_up)[None, :]
        u = tl.load(u_at, mask=keep_up, other=0.0, eviction_policy="evict_first")
    if HAS_BIAS:
        bias_ok = rows < pick_size(which, NB, COUNT)
        bias = tl.load(pick_pointer(which, BIAS, COUNT) + rows, mask=bias_ok, other=0.0)
        bias = bias.to(tl.float32)
        if GATED:
            bias_up = tl.load(BIAS[1] + rows, mask=rows < NB[1], other=0.0).to(tl.float32)
    g, h = norm_parameters(NORM_W, NORM_B, k, K, norm_offset, NORM, HAS_NORM_W, HAS_NORM_B)

    if USE_PDL:
        tl.extra.cuda.gdc_wait()

    x0 = X + tl.cast(m0, tl.int64) * stride_xm
    # A second token that is not there reads the first again; its result is not stored.
    x1 = x0 + tl.where(m0 + 1 < M, 1, 0) * stride_xm
    z0 = x0 + pick_int(which, OFFSETS, COUNT) * stride_xk
    z1 = x1 + pick_int(which, OFFSETS, COUNT) * stride_xk
    if GATED:
        v0 = x0 + tl.cast(OFFSETS[1], tl.int64) * stride_xk
        v1 = x1 + tl.cast(OFFSETS[1], tl.int64) * stride_xk

    a = tl.load(z0 + k * stride_xk, mask=k < K, other=0.0).to(tl.float32)
    mean0 = 0.0
    rstd0 = 1.0
    if NORM != "none" and NUM_K == 1:
        mean0, rstd0 = tile_statistics(a, k < K, K, eps, NORM)
    elif NORM != "none":
        mean0, rstd0 = norm_statistics(z0, stride_xk, K, eps, NORM, BLOCK_K, NUM_K)
    a = norm_apply(a, mean0, rstd0, g, h, NORM)
    w32 = w.to(tl.float32)
    acc0 = w32 * a[None, :]
    if TOKENS == 2:
        b = tl.load(z1 + k * stride_xk, mask=k < K, other=0.0).to(tl.float32)
        mean1 = 0.0
        rstd1 = 1.0
        if NORM != "none" and NUM_K == 1:
            mean1, rstd1 = tile_statistics(b, k < K, K, eps, NORM)
        elif NORM != "none":
            mean1, rstd1 = norm_statistics(z1, stride_xk, K, eps, NORM, BLOCK_K, NUM_K)
        b = norm_apply(b, mean1, rstd1, g, h, NORM)
        acc1 = w32 * b[None, :]
    if GATED:
        u32 = u.to(tl.float32)
        up0 = u32 * tl.load(v0 + k * stride_xk, mask=k < K_up, other=0.0).to(tl.float32)[None, :]
        if TOKENS == 2:
            c = tl.load(v1 + k * stride_xk, mask=k < K_up, other=0.0).to(tl.float32)
            up1 = u32 * c[None, :]

    for i in range(1, NUM_K):
        at = i * BLOCK_K + k
        keep = row_ok[:, None] & (at < K)[None, :]
        w = tl.load(w_at + i * w_step, mask=keep, other=0.0, eviction_policy="evict_first")
        w32 = w.to(tl.float32)
        a = tl.load(z0 + at * stride_xk, mask=at < K, other=0.0).to(tl.float32)
        g, h = norm_parameters(NORM_W, NORM_B, at, K, norm_offset, NORM, HAS_NORM_W, HAS_NORM_B)
        a = norm_apply(a, mean0, rstd0, g, h, NORM)
        acc0 += w32 * a[None, :]
        if TOKENS == 2:
            b = tl.load(z1 + at * stride_xk, mask=at < K, other=0.0).to(tl.float32)
            b = norm_apply(b, mean1, rstd1, g, h, NORM)
            acc1 += w32 * b[None, :]
        if GATED:
            keep_up = row_ok[:, None] & (at < K_up)[None, :]
            u = tl.load(u_at + i * u_step, mask=keep_up, other=0.0, eviction_policy="evict_first")
            u32 = u.to(tl.float32)
            c = tl.load(v0 + at * stride_xk, mask=at < K_up, other=0.0).to(tl.float32)
            up0 += u32 * c[None, :]
            if TOKENS == 2:
                c = tl.load(v1 + at * stride_xk, mask=at < K_up, other=0.0).to(tl.float32)
                up1 += u32 * c[None, :]

    columns = column + rows
    y_at = Y + tl.cast(m0, tl.int64) * stride_ym + columns
    r_at = RES + tl.cast(m0, tl.int64) * stride_rm + columns * stride_rn
    y = tl.sum(acc0, axis=1)
    if HAS_BIAS:
        y += bias
    y = activate(y, ACT)
    if GATED:
        up = tl.sum(up0, axis=1)
        if HAS_BIAS:
            up += bias_up
        y *= up
    if HAS_RES:
        y += tl.load(r_at, mask=row_ok, other=0.0).to(tl.float32)
    tl.store(y_at, y.to(Y.dtype.element_ty), mask=row_ok)
    if TOKENS == 2:
        also = rows < tl.where(m0 + 1 < M, n, 0)
        y = tl.sum(acc1, axis=1)
        if HAS_BIAS:
            y += bias
        y = activate(y, ACT)
        if GATED:
            up = tl.sum(up1, axis=1)
            if HAS_BIAS:
                up += bias_up
            y *= up
        if HAS_RES:
            y += tl.load(r_at + stride_rm, mask=also, other=0.0).to(tl.float32)
        tl.store(y_at + stride_ym, y.to(Y.dtype.element_ty), mask=also)


@jit
def _skinny(
    X,
    Y,
    W,
    BIAS,
    RES,
    N,
    NB,
    KS,
    STRIDE_R,
    STRIDE_K,
    OFFSETS,
    M,
    stride_xm,
    stride_xk,
    stride_ym,
    stride_rm,
    stride_rn,
    COUNT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_K: tl.constexpr,
    ALIGN: tl.constexpr,
    LAYOUT: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RES: tl.constexpr,
    INTERPRET: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
    N_ALIGN: tl.constexpr = ALIGN if LAYOUT == "col" else 1
    K_ALIGN: tl.constexpr = ALIGN if LAYOUT == "row" else 1
    which, first, column = _locate(tl.program_id(0), N, N_ALIGN, 1 if GATED else COUNT, BLOCK_R)
    n = pick_size(which, N, COUNT) * N_ALIGN
    K = pick_size(which, KS, COUNT) * K_ALIGN
    rows = first + tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = rows < n
    token_ok = m < M

    w_at = pick_pointer(which, W, COUNT) + _weight_offsets(
        rows[None, :],
        k[:, None],
        pick_int(which, STRIDE_R, COUNT) * ALIGN,
        pick_int(which, STRIDE_K, COUNT) * ALIGN,
        LAYOUT,
    )
    w_step = BLOCK_K * (1 if LAYOUT == "row" else pick_int(which, STRIDE_K, COUNT) * ALIGN)
    keep = (k < K)[:, None] & row_ok[None, :]
    w = tl.load(w_at, mask=keep, other=0.0, eviction_policy="evict_first")
    if GATED:
        K_up = tl.cast(KS[1], tl.int32) * K_ALIGN
        u_at = W[1] + _weight_offsets(
            rows[None, :],
            k[:, None],
            tl.cast(STRIDE_R[1], tl.int64) * ALIGN,
            tl.cast(STRIDE_K[1], tl.int64) * ALIGN,
            LAYOUT,
        )
        u_step = BLOCK_K * (1 if LAYOUT == "row" else tl.cast(STRIDE_K[1], tl.int64) * ALIGN)
        keep_up = (k < K_up)[:, None] & row_ok[None, :]
        u = tl.load(u_at, mask=keep_up, other=0.0, eviction_policy="evict_first")

    if USE_PDL:
        tl.extra.cuda.gdc_wait()

    x_rows = X + tl.cast(m, tl.int64)[:, None] * stride_xm
    z_at = x_rows + (pick_int(which, OFFSETS, COUNT) + k)[None, :] * stride_xk
    z_step = BLOCK_K * stride_xk
    x = tl.load(z_at, mask=token_ok[:, None] & (k < K)[None, :], other=0.0)
    # The interpreter holds bf16 as raw 16-bit integers and would multiply those.
    if INTERPRET:
        x = x.to(tl.float32)
        w = w.to(tl.float32)
    acc = tl.dot(x, w, input_precision="ieee")
    if GATED:
        v_at = x_rows + (tl.cast(OFFSETS[1], tl.int64) + k)[None, :] * stride_xk
        x = tl.load(v_at, mask=token_ok[:, None] & (k < K_up)[None, :], other=0.0)
        if INTERPRET:
            x = x.to(tl.float32)
            u = u.to(tl.float32)
        up = tl.dot(x, u, input_precision="ieee")

    for i in range(1, NUM_K):
        at = i * BLOCK_K + k
        w = tl.load(
            w_at + i * w_step,
            mask=(at < K)[:, None] & row_ok[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        x = tl.load(z_at + i * z_step, mask=token_ok[:, None] & (at < K)[None, :], other=0.0)
        if INTERPRET:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        if GATED:
            u = tl.load(
                u_at + i * u_step,
                mask=(at < K_up)[:, None] & row_ok[None, :],
                other=0.0,
                eviction_policy="evict_first",
            )
            x = tl.load(v_at + i * z_step, mask=token_ok[:, None] & (at < K_up)[None, :], other=0.0)
            if INTERPRET:
                x = x.to(tl.float32)
                u = u.to(tl.float32)
            up = tl.dot(x, u, up, input_precision="ieee")

    if HAS_BIAS:
        bias_ok = rows < pick_size(which, NB, COUNT)
        bias = tl.load(pick_pointer(which, BIAS, COUNT) + rows, mask=bias_ok, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    acc = activate(acc, ACT)
    if GATED:
        if HAS_BIAS:
            up += tl.load(BIAS[1] + rows, mask=rows < NB[1], other=0.0).to(tl.float32)[None, :]
        acc *= up
    m = tl.cast(m, tl.int64)
    columns = column + rows
    ok = token_ok[:, None] & row_ok[None, :]
    if HAS_RES:
        r_at = RES + m[:, None] * stride_rm + columns[None, :] * stride_rn
        acc += tl.load(r_at, mask=ok, other=0.0).to(tl.float32)
    tl.store(Y + m[:, None] * stride_ym + columns[None, :], acc.to(Y.dtype.element_ty), mask=ok)


@jit
def _norm_rows(
    X,
    Y,
    NORM_W,
    NORM_B,
    K,
    stride_xm,
    stride_xk,
    eps,
    norm_offset,
    BLOCK_K: tl.constexpr,
    NUM_K: tl.constexpr,
    NORM: tl.constexpr,
    HAS_NORM_W: tl.constexpr,
    HAS_NORM_B: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    m = tl.cast(tl.program_id(0), tl.int64)
    x = X + m * stride_xm
    mean, rstd = norm_statistics(x, stride_xk, K, eps, NORM, BLOCK_K, NUM_K)
    for i in range(NUM_K):
        at = i * BLOCK_K + tl.arange(0, BLOCK_K)
        value = tl.load(x + at * stride_xk, mask=at < K, other=0.0).to(tl.float32)
        g, h = norm_parameters(NORM_W, NORM_B, at, K, norm_offset, NORM, HAS_NORM_W, HAS_NORM_B)
        value = norm_apply(value, mean, rstd, g, h, NORM)
        tl.store(Y + m * K + at, value.to(Y.dtype.element_ty), mask=at < K)


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
    phase: Phase,
    pdl: bool,
    norm: tuple = ("none", None, None, 0.0, 0.0),
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """Fills `out` `[M, n]` with the block-diagonal product of `x` `[M, K]`.

    Weights stored alike go into one launch, up to four; a launch writes its columns of `out`.
    """
    if out.numel() == 0:
        return out
    if phase is not Phase.DECODE and norm[0] != "none":
        x, norm = _normed_rows(x, norm, pdl), ("none", None, None, 0.0, 0.0)
    gated = activation.endswith("_mul")
    groups = [[0, 1]] if gated else _launches(weights)
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
        )
    return out


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


def _launch(op, x, weights, biases, offsets, out, phase, pdl, norm, act, gated, residual):
    layouts = {layout_of(w) for w in weights}
    layout = layouts.pop() if len(layouts) == 1 else "any"
    align = _alignment(weights, layout)
    n_unit = align if layout == "col" else 1
    k_unit = align if layout == "row" else 1
    m = x.shape[0]
    k = max(w.shape[1] for w in weights)
    rows = weights[0].shape[0] if gated else sum(w.shape[0] for w in weights)
    has_bias = any(b is not None for b in biases)
    tile = _tuning.linear_tile(
        op,
        phase,
        k=k,
        rows=rows,
        tokens=m,
        itemsize=x.element_size(),
        layout=layout,
        gated=gated,
        device=x.device,
    )
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
        "NUM_K": max(1, cdiv(k, tile.block_k)),
        "ALIGN": align,
        "LAYOUT": layout,
        "ACT": act,
        "GATED": gated,
        "HAS_BIAS": has_bias,
        "HAS_RES": residual is not None,
        "num_warps": tile.num_warps,
    }
    blocks = (
        cdiv(rows, tile.block_r) if gated else sum(cdiv(w.shape[0], tile.block_r) for w in weights)
    )
    if phase is Phase.DECODE:
        kind, norm_w, norm_b, eps, norm_offset = norm
        _triton.launch(
            _gemv,
            (blocks, cdiv(m, tile.block_m)),
            x.device,
            pdl,
            NORM_W=x if norm_w is None else norm_w,
            NORM_B=x if norm_b is None else norm_b,
            eps=float(eps),
            norm_offset=float(norm_offset),
            TOKENS=tile.block_m,
            NORM=kind,
            HAS_NORM_W=norm_w is not None,
            HAS_NORM_B=norm_b is not None,
            **shared,
        )
    else:
        _triton.launch(
            _skinny,
            (blocks, cdiv(m, tile.block_m)),
            x.device,
            pdl,
            BLOCK_M=tile.block_m,
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


def _normed_rows(x: Tensor, norm: tuple, pdl: bool) -> Tensor:
    kind, weight, bias, eps, offset = norm
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
        NORM_W=x if weight is None else weight,
        NORM_B=x if bias is None else bias,
        K=k,
        stride_xm=x.stride(0),
        stride_xk=x.stride(1),
        eps=float(eps),
        norm_offset=float(offset),
        BLOCK_K=block,
        NUM_K=max(1, cdiv(k, block)),
        NORM=kind,
        HAS_NORM_W=weight is not None,
        HAS_NORM_B=bias is not None,
        num_warps=8 if block > 2048 else 4,
    )
    return out
