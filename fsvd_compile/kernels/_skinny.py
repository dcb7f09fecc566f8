"""Kernels for a few dozen tokens: tiles on tensor cores, see `_linear`."""

from __future__ import annotations

from fsvd_compile.kernels._triton import (
    activate,
    jit,
    locate,
    norm_apply,
    norm_parameters,
    norm_statistics,
    pick_int,
    pick_pointer,
    pick_size,
    tl,
    weight_offsets,
)


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
    SPLIT: tl.constexpr,
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
    which, first, column = locate(tl.program_id(0), N, N_ALIGN, 1 if GATED else COUNT, BLOCK_R, 1)
    n = pick_size(which, N, COUNT) * N_ALIGN
    K = pick_size(which, KS, COUNT) * K_ALIGN
    rows = first + tl.arange(0, BLOCK_R)
    # [SPLIT, BLOCK_K]: every slice of a turn is one warp's, and the slices lie side by side.
    k = tl.arange(0, SPLIT)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    TURN: tl.constexpr = SPLIT * BLOCK_K
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = rows < n
    token_ok = m < M

    w_at = pick_pointer(which, W, COUNT) + weight_offsets(
        rows[None, None, :],
        k[:, :, None],
        pick_int(which, STRIDE_R, COUNT) * ALIGN,
        pick_int(which, STRIDE_K, COUNT) * ALIGN,
        LAYOUT,
    )
    w_step = TURN * (1 if LAYOUT == "row" else pick_int(which, STRIDE_K, COUNT) * ALIGN)
    keep = (k < K)[:, :, None] & row_ok[None, None, :]
    w = tl.load(w_at, mask=keep, other=0.0, eviction_policy="evict_first")
    if GATED:
        K_up = tl.cast(KS[1], tl.int32) * K_ALIGN
        u_at = W[1] + weight_offsets(
            rows[None, None, :],
            k[:, :, None],
            tl.cast(STRIDE_R[1], tl.int64) * ALIGN,
            tl.cast(STRIDE_K[1], tl.int64) * ALIGN,
            LAYOUT,
        )
        u_step = TURN * (1 if LAYOUT == "row" else tl.cast(STRIDE_K[1], tl.int64) * ALIGN)
        keep_up = (k < K_up)[:, :, None] & row_ok[None, None, :]
        u = tl.load(u_at, mask=keep_up, other=0.0, eviction_policy="evict_first")

    if USE_PDL:
        tl.extra.cuda.gdc_wait()

    x_rows = X + tl.cast(m, tl.int64)[None, :, None] * stride_xm
    z_at = x_rows + (pick_int(which, OFFSETS, COUNT) + k)[:, None, :] * stride_xk
    z_step = TURN * stride_xk
    token_mask = token_ok[None, :, None]
    x = tl.load(z_at, mask=token_mask & (k < K)[:, None, :], other=0.0)
    # The interpreter holds bf16 as raw 16-bit integers and would multiply those.
    if INTERPRET:
        x = x.to(tl.float32)
        w = w.to(tl.float32)
    parts = tl.dot(x, w, input_precision="ieee")
    if GATED:
        v_at = x_rows + (tl.cast(OFFSETS[1], tl.int64) + k)[:, None, :] * stride_xk
        x = tl.load(v_at, mask=token_mask & (k < K_up)[:, None, :], other=0.0)
        if INTERPRET:
            x = x.to(tl.float32)
            u = u.to(tl.float32)
        up_parts = tl.dot(x, u, input_precision="ieee")

    for i in range(1, NUM_K):
        at = i * TURN + k
        w = tl.load(
            w_at + i * w_step,
            mask=(at < K)[:, :, None] & row_ok[None, None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        x = tl.load(z_at + i * z_step, mask=token_mask & (at < K)[:, None, :], other=0.0)
        if INTERPRET:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        parts = tl.dot(x, w, parts, input_precision="ieee")
        if GATED:
            u = tl.load(
                u_at + i * u_step,
                mask=(at < K_up)[:, :, None] & row_ok[None, None, :],
                other=0.0,
                eviction_policy="evict_first",
            )
            x = tl.load(v_at + i * z_step, mask=token_mask & (at < K_up)[:, None, :], other=0.0)
            if INTERPRET:
                x = x.to(tl.float32)
                u = u.to(tl.float32)
            up_parts = tl.dot(x, u, up_parts, input_precision="ieee")

    acc = tl.sum(parts, 0)
    if GATED:
        up = tl.sum(up_parts, 0)
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
