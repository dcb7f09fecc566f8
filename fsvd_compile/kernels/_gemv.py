"""The GEMV kernel: one or two tokens times a few rows of a weight a program, see `_linear`."""

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
    tile_statistics,
    tl,
    weight_offsets,
)


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
    which, first, column = locate(tl.program_id(0), N, N_ALIGN, 1 if GATED else COUNT, BLOCK_R)
    n = pick_size(which, N, COUNT) * N_ALIGN
    K = pick_size(which, KS, COUNT) * K_ALIGN
    rows = first + tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    row_ok = rows < n

    w_at = pick_pointer(which, W, COUNT) + weight_offsets(
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
        u_at = W[1] + weight_offsets(
            rows[:, None],
            k[None, :],
            tl.cast(STRIDE_R[1], tl.int64) * ALIGN,
            tl.cast(STRIDE_K[1], tl.int64) * ALIGN,
            LAYOUT,
        )
        u_step = BLOCK_K * (1 if LAYOUT == "row" else tl.cast(STRIDE_K[1], tl.int64) * ALIGN)
        keep_up = row_ok[:, None] & (k < K_up)[None, :]
        u = tl.load(u_at, mask=keep_up, other=0.0, eviction_policy="evict_first")
    bias = 0.0
    bias_up = 0.0
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
    columns = column + rows
    also = rows < tl.where(m0 + 1 < M, n, 0)

    # All that the kernel before may have written is requested at once: what is asked for later is
    # waited for once more.
    a = tl.load(z0 + k * stride_xk, mask=k < K, other=0.0).to(tl.float32)
    if TOKENS == 2:
        b = tl.load(z1 + k * stride_xk, mask=k < K, other=0.0).to(tl.float32)
    if GATED:
        v0 = x0 + tl.cast(OFFSETS[1], tl.int64) * stride_xk
        v1 = x1 + tl.cast(OFFSETS[1], tl.int64) * stride_xk
        c = tl.load(v0 + k * stride_xk, mask=k < K_up, other=0.0).to(tl.float32)
        if TOKENS == 2:
            d = tl.load(v1 + k * stride_xk, mask=k < K_up, other=0.0).to(tl.float32)
    res0 = 0.0
    res1 = 0.0
    if HAS_RES:
        r_at = RES + tl.cast(m0, tl.int64) * stride_rm + columns * stride_rn
        res0 = tl.load(r_at, mask=row_ok, other=0.0).to(tl.float32)
        if TOKENS == 2:
            res1 = tl.load(r_at + stride_rm, mask=also, other=0.0).to(tl.float32)

    # RMSNorm scales by row: the root is taken out of the product and found on the way.
    mean0 = 0.0
    mean1 = 0.0
    rstd0 = 1.0
    rstd1 = 1.0
    square0 = a
    if NORM == "rms":
        square0 = a * a
    if TOKENS == 2:
        square1 = b
        if NORM == "rms":
            square1 = b * b
    if NORM == "layer" and NUM_K == 1:
        mean0, rstd0 = tile_statistics(a, k < K, K, eps)
        if TOKENS == 2:
            mean1, rstd1 = tile_statistics(b, k < K, K, eps)
    elif NORM == "layer":
        mean0, rstd0 = norm_statistics(z0, stride_xk, K, eps, NORM, BLOCK_K, NUM_K)
        if TOKENS == 2:
            mean1, rstd1 = norm_statistics(z1, stride_xk, K, eps, NORM, BLOCK_K, NUM_K)
    w32 = w.to(tl.float32)
    acc0 = w32 * norm_apply(a, mean0, rstd0, g, h, NORM)[None, :]
    up0 = acc0
    if TOKENS == 2:
        acc1 = w32 * norm_apply(b, mean1, rstd1, g, h, NORM)[None, :]
        up1 = acc1
    if GATED:
        u32 = u.to(tl.float32)
        up0 = u32 * c[None, :]
        if TOKENS == 2:
            up1 = u32 * d[None, :]

    for i in range(1, NUM_K):
        at = i * BLOCK_K + k
        keep = row_ok[:, None] & (at < K)[None, :]
        w = tl.load(w_at + i * w_step, mask=keep, other=0.0, eviction_policy="evict_first")
        w32 = w.to(tl.float32)
        a = tl.load(z0 + at * stride_xk, mask=at < K, other=0.0).to(tl.float32)
        g, h = norm_parameters(NORM_W, NORM_B, at, K, norm_offset, NORM, HAS_NORM_W, HAS_NORM_B)
        if NORM == "rms":
            square0 += a * a
        acc0 += w32 * norm_apply(a, mean0, rstd0, g, h, NORM)[None, :]
        if TOKENS == 2:
            b = tl.load(z1 + at * stride_xk, mask=at < K, other=0.0).to(tl.float32)
            if NORM == "rms":
                square1 += b * b
            acc1 += w32 * norm_apply(b, mean1, rstd1, g, h, NORM)[None, :]
        if GATED:
            keep_up = row_ok[:, None] & (at < K_up)[None, :]
            u = tl.load(u_at + i * u_step, mask=keep_up, other=0.0, eviction_policy="evict_first")
            u32 = u.to(tl.float32)
            c = tl.load(v0 + at * stride_xk, mask=at < K_up, other=0.0).to(tl.float32)
            up0 += u32 * c[None, :]
            if TOKENS == 2:
                d = tl.load(v1 + at * stride_xk, mask=at < K_up, other=0.0).to(tl.float32)
                up1 += u32 * d[None, :]

    y_at = Y + tl.cast(m0, tl.int64) * stride_ym + columns
    y = _epilogue(
        acc0, up0, square0, bias, bias_up, res0, K, eps, NORM, ACT, GATED, HAS_BIAS, HAS_RES
    )
    tl.store(y_at, y.to(Y.dtype.element_ty), mask=row_ok)
    if TOKENS == 2:
        y = _epilogue(
            acc1, up1, square1, bias, bias_up, res1, K, eps, NORM, ACT, GATED, HAS_BIAS, HAS_RES
        )
        tl.store(y_at + stride_ym, y.to(Y.dtype.element_ty), mask=also)


@jit
def _epilogue(
    acc,
    up,
    square,
    bias,
    bias_up,
    res,
    K,
    eps,
    NORM: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RES: tl.constexpr,
):
    """fp32 results of one token's rows: the sums, and all that follows them; what is not there is not read."""
    y = tl.sum(acc, axis=1)
    if NORM == "rms":
        y *= tl.rsqrt(tl.sum(square, axis=0) / K + tl.cast(eps, tl.float32))
    if HAS_BIAS:
        y += bias
    y = activate(y, ACT)
    if GATED:
        gate = y
        y = tl.sum(up, axis=1)
        if HAS_BIAS:
            y += bias_up
        y *= gate
    if HAS_RES:
        y += res
    return y
