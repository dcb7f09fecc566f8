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
    STEP: tl.constexpr,
    VECTOR: tl.constexpr,
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
    which, first, column = locate(
        tl.program_id(0), N, N_ALIGN, 1 if GATED else COUNT, BLOCK_R, STEP
    )
    n = pick_size(which, N, COUNT) * N_ALIGN
    K = pick_size(which, KS, COUNT) * K_ALIGN
    rows = first + tl.arange(0, BLOCK_R) * STEP
    k = tl.arange(0, BLOCK_K)
    row_ok = rows < n

    stride_r = pick_int(which, STRIDE_R, COUNT) * ALIGN
    stride_k = pick_int(which, STRIDE_K, COUNT) * ALIGN
    w_at = pick_pointer(which, W, COUNT)
    w_step = BLOCK_K * (1 if LAYOUT == "row" else stride_k)
    shift = _shift(first, stride_r, VECTOR)
    w_at += _offsets(rows, k, stride_r, stride_k, LAYOUT, VECTOR)
    w = _load(w_at, row_ok, k, shift, K, VECTOR)
    if GATED:
        K_up = tl.cast(KS[1], tl.int32) * K_ALIGN
        stride_r = tl.cast(STRIDE_R[1], tl.int64) * ALIGN
        stride_k = tl.cast(STRIDE_K[1], tl.int64) * ALIGN
        u_at = W[1]
        u_step = BLOCK_K * (1 if LAYOUT == "row" else stride_k)
        shift_up = _shift(first, stride_r, VECTOR)
        u_at += _offsets(rows, k, stride_r, stride_k, LAYOUT, VECTOR)
        u = _load(u_at, row_ok, k, shift_up, K_up, VECTOR)
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
    at = k - shift
    inside = _inside(k, shift, K, VECTOR)
    a = tl.load(z0 + at * stride_xk, mask=inside, other=0.0).to(tl.float32)
    if TOKENS == 2:
        b = tl.load(z1 + at * stride_xk, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        v0 = x0 + tl.cast(OFFSETS[1], tl.int64) * stride_xk
        v1 = x1 + tl.cast(OFFSETS[1], tl.int64) * stride_xk
        at = k - shift_up
        inside = _inside(k, shift_up, K_up, VECTOR)
        c = tl.load(v0 + at * stride_xk, mask=inside, other=0.0).to(tl.float32)
        if TOKENS == 2:
            d = tl.load(v1 + at * stride_xk, mask=inside, other=0.0).to(tl.float32)
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
        w = _load(w_at + i * w_step, row_ok, at, shift, K, VECTOR)
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
            u = _load(u_at + i * u_step, row_ok, at, shift_up, K_up, VECTOR)
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
def _shift(first, stride, VECTOR: tl.constexpr):
    """How far behind a multiple of VECTOR elements the rows of a program start: where element 0 stands in a tile."""
    if VECTOR > 1:
        return (first * stride % VECTOR).to(tl.int32)
    else:
        return 0


@jit
def _offsets(rows, k, stride_r, stride_k, LAYOUT: tl.constexpr, VECTOR: tl.constexpr):
    """Offsets of a tile, from the multiple of VECTOR elements in front of each row."""
    if VECTOR > 1:
        return (rows * stride_r // VECTOR * VECTOR)[:, None] + k[None, :]
    else:
        return weight_offsets(rows[:, None], k[None, :], stride_r, stride_k, LAYOUT)


@jit
def _load(at, row_ok, k, shift, K, VECTOR: tl.constexpr):
    """A tile of a weight. Vectors at both ends of a row hold elements of its neighbours too, or what lies within
    16 bytes of the weight, which no page border divides; those come out as 0."""
    touched = k // VECTOR * VECTOR < shift + K if VECTOR > 1 else k < K
    keep = row_ok[:, None] & touched[None, :]
    w = tl.load(at, mask=keep, other=0.0, eviction_policy="evict_first")
    if VECTOR > 1:
        w = tl.where(_inside(k, shift, K, VECTOR)[None, :], w, 0.0)
    return w


@jit
def _inside(k, shift, K, VECTOR: tl.constexpr):
    """Which columns of a tile are columns of the weight."""
    if VECTOR > 1:
        return (k >= shift) & (k < shift + K)
    else:
        return k < K


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
