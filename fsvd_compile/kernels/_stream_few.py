"""The streamed product of a few tokens: weights and x in shared memory, multiplied by tensor cores, see `_linear`.

A tile of weight rows is the operand with 16 rows, tokens are the one with 8, so that a program needs no more than 16
rows and 8 sequences waste no product. Every warp multiplies columns of its own, 64 at a time, and the sums of the warps
are added at the end; where a block has fewer such pieces than there are warps, they divide its rows as well. x comes by
TMA through the same ring as the weights, a block of columns at a time: 32 tokens of 4096 features are more than shared
memory holds. A copy is issued by one thread and costs its program tens of nanoseconds, so a block of columns is one
copy; only the last one of a row that is no whole number of blocks comes in pieces of 64, which have zeros behind K.

RMSNorm of up to 16 tokens, the rows of an operand, happens inside where the weight's rows are few enough
(`normalizes`), for a kernel of its own costs a boundary: x is
multiplied by the norm's weight as it is read, and with itself on tensor cores, where the diagonal are the sums of
squares that the result is scaled by. Behind an expand it can be carried instead (`carried`): the expand also writes
its result times the norm's weight, and sums of squares of 32 rows at a time, and the shrink is left with a factor.
Written in Gluon for compute capability 9.0, as `_stream`, and tested on a GPU only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fsvd_compile.kernels import _stream, _triton
from fsvd_compile.kernels._stream import PIECE, biases, jit, named
from fsvd_compile.kernels._triton import activate, cdiv, locate, next_power_of_2, pick_size

if _stream.gluon is not None:
    from triton.experimental.gluon.language.nvidia.ampere import mma_v2

    from fsvd_compile.kernels._stream import (
        TensorDescriptor,
        async_load,
        barrier,
        fence_async_shared,
        gdc_launch_dependents,
        gdc_wait,
        gl,
        mbarrier,
        reinterpret,
    )


# Weights are streamed for so many tokens at most.
MOST_TOKENS = 64
# Programs begin at different blocks of columns for so many tokens: of 8 a layer of LLaMA-7B takes 104.2 us for 105.3,
# of 16 134.9 for 136.7, of 32 194.5 for 193.3 and of 64 322 for 308 (H100).
MOST_TURNED = 16
# Rows of an expand behind which RMSNorm is carried that share one sum of squares.
SUMMED_ROWS = 32
# RMSNorm is part of the product for so many tokens, the rows of an operand, and features.
MOST_NORMED = 16
MOST_FEATURES = 8192


def takes(
    op: str, x: Tensor, weights: Sequence[Tensor], offsets: Sequence[int], layout: str
) -> bool:
    """Whether a product with few tokens goes through this kernel; x is copied as the weights are.

    So rows of both are multiples of 16 bytes. A shrink whose rank makes rows of other lengths behind it is not streamed
    either, see `_stream.streams`.
    """
    return (
        x.shape[0] <= MOST_TOKENS
        and x.stride(1) == 1
        and x.stride(0) % 8 == 0
        and x.stride(0) >= x.shape[1]
        and all(start % 8 == 0 for start in offsets)
        and all(w.shape[1] >= PIECE and w.shape[1] % 8 == 0 for w in weights)
        and (op == "expand" or all(w.shape[0] % 8 == 0 for w in weights))
        and _stream.row_step(weights) == 1
        and _triton.aligned(x)
        and _stream.streams(op, x, weights, layout)
    )


def normalizes(x: Tensor, rows: int, norm: tuple) -> bool:
    """Whether the norm in front of a shrink of so many rows that `takes` in one launch is part of the product.

    In bf16 alone: what is multiplied by the norm's weight is not normalized yet, and too large for fp16 perhaps. And
    for two programs a multiprocessor at most, as each squares all of x: 8 tokens of 4096 features cost 4096 rows 0.6 us
    (10.4 without), 12288 rows 7.3 (27.4) and 32000 rows 16.8 (64.1); a kernel of its own takes 2 (H200).
    """
    kind, weight, _, _, offset = norm
    return (
        kind == "rms"
        and offset == 0
        and x.dtype == torch.bfloat16
        and (weight is None or weight.dtype == x.dtype)
        and x.shape[0] <= MOST_NORMED
        and x.shape[1] <= MOST_FEATURES
        and rows <= 2 * 16 * _triton.multiprocessors(x.device)
    )


def shared_bytes(
    block_r: int,
    block_k: int,
    tokens: int,
    num_warps: int,
    stages: int,
    gated: bool,
    normed: int = 0,
) -> int:
    """Shared memory of a program: its ring, or the sums of its warps once that is done with.

    And the norm's weight, if x has so many features that are `normed`.
    """
    if normed:
        tokens = max(tokens, MOST_NORMED)
    ring = 2 * stages * block_k * (block_r + tokens) * (2 if gated else 1)
    columns, _ = division(num_warps, block_k // PIECE)
    sums = 4 * columns * block_r * tokens
    return max(ring, sums) + 2 * _held(normed, block_k) + 1024


def _held(features: int, block_k: int) -> int:
    """Elements that a norm's weight takes in shared memory: a power of two of blocks, or nothing."""
    return next_power_of_2(cdiv(features, block_k)) * block_k if features else 0


def division(num_warps: int, pieces: int) -> tuple[int, int]:
    """Into how many parts warps divide the columns of a block, and into how many its rows."""
    columns = min(num_warps, pieces)
    return columns, num_warps // columns


def launch(
    x: Tensor,
    weights: Sequence[Tensor],
    offsets: Sequence[int],
    shared: dict,
    tile,
    blocks: int,
    pdl: bool,
) -> None:
    """Launches the kernel with the arguments it shares with the others, see `_linear`."""
    smem = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    pieces = tile.block_k // PIECE
    inputs = [x[:, at : at + w.shape[1]] for at, w in zip(offsets, weights, strict=True)]
    if len(set(offsets)) == 1 and len({w.shape[1] for w in weights}) == 1:
        inputs = inputs[:1]
    tail = any(w.shape[1] % tile.block_k for w in weights)
    normed = shared["NORM"] == "rms"
    carried, carry = shared["NORM"] == "carried", shared["CARRY"]
    sums = shared["NORM_W"] if carry is None else carry.squares
    weighted = shared["HAS_NORM_W"] and not carried if carry is None else carry.weight is not None
    x_rows = max(tile.block_m, MOST_NORMED) if normed else tile.block_m
    maps = [_blocks(w, tile.block_r, pieces, smem) for w in weights]
    x_maps = [_blocks(z, x_rows, pieces, smem) for z in inputs]
    ends = [_pieces(w, tile.block_r, smem) for w in weights] if tail else []
    x_ends = [_pieces(z, x_rows, smem) for z in inputs] if tail else []
    taken = (
        "Y", "BIAS", "RES", "N", "NB", "KS", "M", "stride_ym", "stride_rm", "stride_rn",
        "COUNT", "ALIGN", "ACT", "GATED", "HAS_BIAS", "HAS_RES", "num_warps",
        "eps",
    )  # fmt: skip
    _triton.launch(
        _stream_few,
        (blocks, cdiv(x.shape[0], tile.block_m)),
        x.device,
        pdl,
        **{name: shared[name] for name in taken},
        **named("W", maps),
        **named("X", x_maps),
        **named("WE", ends),
        **named("XE", x_ends),
        NORM=normed,
        NORM_W=carry.weight if carry is not None and weighted else shared["NORM_W"],
        HAS_NORM_W=weighted,
        norm_offset=shared["norm_offset"] if carry is None else float(carry.offset),
        SCALED=shared["Y"] if carry is None else carry.scaled,
        SUMS=sums,
        SUMMED=sums.shape[0] if carried or carry is not None else 0,
        CARRIED=carried,
        CARRY=carry is not None,
        TOKENS=tile.block_m,
        X_ROWS=x_rows,
        FEATURES=_held(x.shape[1], tile.block_k) if normed else 0,
        BLOCK_R=tile.block_r,
        PIECES=pieces,
        STAGES=tile.num_stages,
        ROTATE=tile.block_m <= MOST_TURNED,
        SUMMED_ROWS=SUMMED_ROWS,
        INPUTS=len(inputs),
        TAIL=tail,
        MMA=gl.NVMMADistributedLayout(
            version=[2, 0],
            warps_per_cta=[*division(tile.num_warps, pieces), 1],
            instr_shape=[1, 16, 8],
        ),
    )


def _blocks(t: Tensor, rows: int, pieces: int, layout):
    """The pieces of 64 that lie whole in K: a copy takes so many of them of so many rows."""
    shape, strides = [t.shape[1] // PIECE, t.shape[0], PIECE], [PIECE, t.stride(0), 1]
    return TensorDescriptor(_triton.unread(t), shape, strides, [pieces, rows, PIECE], layout)


def _pieces(t: Tensor, rows: int, layout):
    """A copy takes one piece of so many rows, with zeros behind K."""
    shape, strides = [1, *t.shape], [t.shape[0] * t.stride(0), t.stride(0), 1]
    return TensorDescriptor(_triton.unread(t), shape, strides, [1, rows, PIECE], layout)


@jit
def _stream_few(
    Y,
    W0,
    W1,
    W2,
    W3,
    X0,
    X1,
    X2,
    X3,
    WE0,
    WE1,
    WE2,
    WE3,
    XE0,
    XE1,
    XE2,
    XE3,
    BIAS,
    RES,
    NORM_W,
    SCALED,
    SUMS,
    SUMMED,
    N,
    NB,
    KS,
    M,
    eps,
    norm_offset,
    stride_ym,
    stride_rm,
    stride_rn,
    COUNT: gl.constexpr,
    ALIGN: gl.constexpr,
    NORM: gl.constexpr,
    CARRIED: gl.constexpr,
    CARRY: gl.constexpr,
    HAS_NORM_W: gl.constexpr,
    TOKENS: gl.constexpr,
    X_ROWS: gl.constexpr,
    FEATURES: gl.constexpr,
    BLOCK_R: gl.constexpr,
    PIECES: gl.constexpr,
    STAGES: gl.constexpr,
    ROTATE: gl.constexpr,
    SUMMED_ROWS: gl.constexpr,
    INPUTS: gl.constexpr,
    TAIL: gl.constexpr,
    ACT: gl.constexpr,
    GATED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_RES: gl.constexpr,
    MMA: gl.constexpr,
    USE_PDL: gl.constexpr,
    num_warps: gl.constexpr,
):
    if USE_PDL:
        gdc_launch_dependents()
    which, row, column = locate(gl.program_id(0), N, 1, 1 if GATED else COUNT, BLOCK_R, 1)
    token = gl.program_id(1) * TOKENS
    n = pick_size(which, N, COUNT)
    K = pick_size(which, KS, COUNT) * ALIGN
    K_up = K
    if GATED:
        K_up = gl.cast(KS[1], gl.int32) * ALIGN
    # At least 1, as the compiler is told: it would have one wait for no blocks and one for some.
    count = gl.maximum(gl.cdiv(gl.maximum(K, K_up), PIECES * 64), 1)
    HALVES: gl.constexpr = 2 if GATED else 1
    X_HALVES: gl.constexpr = 1 if INPUTS == 1 else HALVES
    dtype: gl.constexpr = Y.dtype.element_ty
    ring = gl.allocate_shared_memory(dtype, [STAGES * HALVES, PIECES, BLOCK_R, 64], W0.layout)
    xs = gl.allocate_shared_memory(dtype, [STAGES * X_HALVES, PIECES, X_ROWS, 64], W0.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(bars.index(i), count=1)
    fence_async_shared()
    BYTES: gl.constexpr = PIECES * 128 * (BLOCK_R * HALVES + X_ROWS * X_HALVES)
    turn = 0
    if ROTATE:
        turn = gl.program_id(0) % count
    W, W_END = (W0, W1, W2, W3), (WE0, WE1, WE2, WE3)
    X, X_END = (X0, X1, X2, X3), (XE0, XE1, XE2, XE3)
    ahead = gl.minimum(count, STAGES)
    for i in range(ahead):
        mbarrier.expect(bars.index(i), BYTES)
        block = _turned(i, turn, count, ROTATE)
        _copy(W, W_END, ring, bars.index(i), block, i, row, which, K, K_up, COUNT, HALVES, TAIL)

    # Before the last sum a thread has the shares of all warps that divide columns.
    MERGED: gl.constexpr = gl.BlockedLayout(
        [MMA.warps_per_cta[0], 1, 1], [1, 16, 2], [1, 1, num_warps], [1, 2, 0]
    )
    OUT: gl.constexpr = gl.SliceLayout(0, MERGED)
    rows = row + gl.arange(0, BLOCK_R, layout=gl.SliceLayout(1, OUT))
    m = token + gl.arange(0, TOKENS, layout=gl.SliceLayout(0, OUT))
    bias, bias_up = biases(BIAS, NB, rows, which, COUNT, GATED, HAS_BIAS)
    scale = 0
    if CARRY:
        scale = (rows * 0).to(gl.float32) + 1.0
        if HAS_NORM_W:
            scale = gl.load(NORM_W + rows, mask=rows < n, other=0.0).to(gl.float32)
            scale += gl.cast(norm_offset, gl.float32)
    elif HAS_NORM_W:
        scale = _scale(NORM_W, K, FEATURES, PIECES, num_warps)

    if USE_PDL:
        gdc_wait()

    for i in range(ahead):
        block = _turned(i, turn, count, ROTATE)
        bar = bars.index(i)
        _copy(X, X_END, xs, bar, block, i, token, which, K, K_up, INPUTS, X_HALVES, TAIL)
    if CARRIED:
        sums = _sums(SUMS, SUMMED, token, M, TOKENS, num_warps)
    inside = (rows < n)[:, None] & (m < M)[None, :]
    m = gl.cast(m, gl.int64)
    res = gl.zeros([BLOCK_R, TOKENS], gl.float32, layout=OUT)
    if HAS_RES:
        r_at = RES + (column + rows)[:, None] * stride_rn + m[None, :] * stride_rm
        res = gl.load(r_at, mask=inside, other=0.0).to(gl.float32)

    acc = gl.zeros([PIECES, BLOCK_R, TOKENS], gl.float32, layout=MMA)
    up = acc
    squares = gl.zeros([PIECES, X_ROWS, TOKENS], gl.float32, layout=MMA)
    for i in range(count):
        stage = i % STAGES
        bar = bars.index(stage)
        mbarrier.wait(bar, (i // STAGES) & 1)
        x = xs.index(stage * X_HALVES)
        tokens = _tokens(x, TOKENS, MMA)
        if NORM:
            squares = _product(x, tokens, squares, MMA)
        if HAS_NORM_W and not CARRY:
            g = scale.index(_turned(i, turn, count, ROTATE))
            tokens *= g.load(gl.SliceLayout(2, gl.DotOperandLayout(1, MMA, 2)))[:, :, None]
        acc = _product(ring.index(stage * HALVES), tokens, acc, MMA)
        if GATED:
            x_up = xs.index(stage * X_HALVES + X_HALVES - 1)
            up = _product(ring.index(stage * 2 + 1), _tokens(x_up, TOKENS, MMA), up, MMA)
        j = i + STAGES
        block = _turned(j, turn, count, ROTATE)
        # Every warp has read what the next copies write over.
        barrier()
        if j < count:
            mbarrier.expect(bar, BYTES)
            _copy(W, W_END, ring, bar, block, stage, row, which, K, K_up, COUNT, HALVES, TAIL)
            _copy(X, X_END, xs, bar, block, stage, token, which, K, K_up, INPUTS, X_HALVES, TAIL)

    y = _merged(acc, MERGED)
    if NORM:
        mean = gl.convert_layout(_diagonal(squares, MMA), gl.SliceLayout(0, OUT)) / K
        y *= gl.rsqrt(mean + gl.cast(eps, gl.float32))[None, :]
    if CARRIED:
        mean = gl.convert_layout(_added(sums, num_warps), gl.SliceLayout(0, OUT)) / K
        y *= gl.rsqrt(mean + gl.cast(eps, gl.float32))[None, :]
    y = activate(y + bias[:, None], ACT)
    if GATED:
        y *= _merged(up, MERGED) + bias_up[:, None]
    y += res
    gl.store(Y + (column + rows)[:, None] + m[None, :] * stride_ym, y.to(dtype), mask=inside)
    if CARRY:
        at = SCALED + rows[:, None] + m[None, :] * n
        gl.store(at, (y * scale[:, None]).to(dtype), mask=inside)
        # The readers know nothing of a program's rows: what 32 of them have too many lies in front.
        squares = gl.sum(gl.where(inside, y * y, 0.0), axis=0)
        gl.static_assert(BLOCK_R % SUMMED_ROWS == 0)
        for i in gl.static_range(BLOCK_R // SUMMED_ROWS):
            part = row // SUMMED_ROWS + i
            gl.store(SUMS + part * M + m, squares, mask=(m < M) & (part < SUMMED))
            squares = gl.zeros([TOKENS], gl.float32, layout=gl.SliceLayout(0, OUT))


@jit
def _turned(i, turn, count, ROTATE: gl.constexpr):
    """The block of columns that a program takes as number i."""
    if ROTATE:
        i += turn
        i = gl.where(i >= count, i - count, i)
    return i


@jit
def _copy(
    maps,
    ends,
    ring,
    bar,
    i,
    stage,
    row,
    which,
    K,
    K_up,
    COUNT: gl.constexpr,
    HALVES: gl.constexpr,
    TAIL: gl.constexpr,
):
    """Starts the copies of block i of the columns of some rows into a stage of the ring."""
    if HALVES == 2:
        _copy_one(maps, ends, 0, ring.index(stage * 2), bar, i, row, K, TAIL)
        _copy_one(maps, ends, 1, ring.index(stage * 2 + 1), bar, i, row, K_up, TAIL)
    elif COUNT == 1:
        _copy_one(maps, ends, 0, ring.index(stage), bar, i, row, K, TAIL)
    else:
        for j in gl.static_range(COUNT):
            if which == j:
                _copy_one(maps, ends, j, ring.index(stage), bar, i, row, K, TAIL)


@jit
def _copy_one(maps, ends, j: gl.constexpr, into, bar, i, row, K, TAIL: gl.constexpr):
    PIECES: gl.constexpr = into.shape[0]
    if TAIL:
        if (i + 1) * (PIECES * 64) > K:
            for p in gl.static_range(PIECES):
                at = [0, row, (i * PIECES + p) * 64]
                async_load(ends[j], at, bar, into.slice(p, 1, dim=0))
        else:
            async_load(maps[j], [i * PIECES, row, 0], bar, into)
    else:
        async_load(maps[j], [i * PIECES, row, 0], bar, into)


@jit
def _tokens(x, TOKENS: gl.constexpr, MMA: gl.constexpr):
    """The first tokens of a block of columns of x, an operand."""
    return x.permute((0, 2, 1)).slice(0, TOKENS, dim=2).load(gl.DotOperandLayout(1, MMA, 2))


@jit
def _product(w, tokens, acc, MMA: gl.constexpr):
    """Sums of a block of columns, of `[PIECES, rows of w, TOKENS]`, added to `acc`."""
    return mma_v2(w.load(gl.DotOperandLayout(0, MMA, 2)), tokens, acc)


@jit
def _scale(NORM_W, K, FEATURES: gl.constexpr, PIECES: gl.constexpr, num_warps: gl.constexpr):
    """The norm's weight in shared memory, `[blocks, PIECES, 64]`, zeros behind K."""
    FLAT: gl.constexpr = gl.BlockedLayout([8], [32], [num_warps], [0])
    at = gl.arange(0, FEATURES, layout=FLAT)
    one: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    values = gl.load(NORM_W + at, mask=at < K, other=0.0)
    kept = gl.allocate_shared_memory(NORM_W.dtype.element_ty, [FEATURES], one, values)
    blocks: gl.constexpr = FEATURES // (PIECES * 64)
    return reinterpret(
        kept,
        NORM_W.dtype.element_ty,
        [blocks, PIECES, 64],
        gl.SwizzledSharedLayout(1, 1, 1, [1, 0]),
    )


@jit
def _merged(acc, MERGED: gl.constexpr):
    """Sums over the pieces, `[rows, TOKENS]`: added within threads, as a reduction over warps takes longer.

    A layer of LLaMA-7B at keep 0.5 takes 4.2 us less of 148 by it with 32 tokens, 2.2 of 81 with 8 (H200).
    """
    COLUMNS: gl.constexpr = MERGED.size_per_thread[0]
    TURNS: gl.constexpr = acc.shape[0] // COLUMNS
    if TURNS > 1:
        acc = gl.sum(acc.reshape([TURNS, COLUMNS, acc.shape[1], acc.shape[2]]), axis=0)
    return gl.sum(gl.convert_layout(acc, MERGED), axis=0)


@jit
def _sums(SUMS, SUMMED, token, M, TOKENS: gl.constexpr, num_warps: gl.constexpr):
    """Sums `[SUMMED, M]` as `[PARTS, TOKENS]`: a thread has 4 tokens of every `LANES * num_warps`-th part.

    The first loads are no operands of an addition here, so that nothing waits for them before the product is done.
    """
    LANES: gl.constexpr = 128 // TOKENS
    PARTS: gl.constexpr = 128 if LANES * num_warps < 128 else LANES * num_warps
    FLAT: gl.constexpr = gl.BlockedLayout([1, 4], [LANES, 32 // LANES], [num_warps, 1], [1, 0])
    part = gl.arange(0, PARTS, layout=gl.SliceLayout(1, FLAT))
    m = token + gl.arange(0, TOKENS, layout=gl.SliceLayout(0, FLAT))
    at = SUMS + part[:, None] * M + m[None, :]
    some = (m < M)[None, :]
    total = gl.load(at, mask=some & (part < SUMMED)[:, None], other=0.0)
    for first in range(PARTS, SUMMED, PARTS):
        left = some & (first + part < SUMMED)[:, None]
        total += gl.load(at + first * M, mask=left, other=0.0)
    return total


@jit
def _added(sums, num_warps: gl.constexpr):
    """`[TOKENS]`: the total of what `_sums` loads, the shares of warps added within threads."""
    TOKENS: gl.constexpr = sums.shape[1]
    LANES: gl.constexpr = 128 // TOKENS
    TURNS: gl.constexpr = sums.shape[0] // (LANES * num_warps)
    lanes = gl.sum(sums.reshape([TURNS, num_warps, LANES, TOKENS]), axis=0)
    EACH: gl.constexpr = gl.BlockedLayout([num_warps, 1], [16, 2], [1, num_warps], [0, 1])
    return gl.sum(gl.convert_layout(gl.sum(lanes, axis=1), EACH), axis=0)


@jit
def _diagonal(squares, MMA: gl.constexpr):
    """The diagonal of the sum over pieces, `[TOKENS]`."""
    SUM: gl.constexpr = gl.SliceLayout(0, MMA)
    total = gl.sum(squares, axis=0)
    row = gl.arange(0, total.shape[0], layout=gl.SliceLayout(1, SUM))
    token = gl.arange(0, total.shape[1], layout=gl.SliceLayout(0, SUM))
    return gl.sum(gl.where(row[:, None] == token[None, :], total, 0.0), axis=0)
