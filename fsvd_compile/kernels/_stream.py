"""The streamed GEMV: one token times a few rows of a weight a program, weights in shared memory, see `_linear`.

Tensor memory access (TMA) copies whole rows into shared memory without a register or a turn through L1, so more bytes
are on their way than registers could hold and nothing is masked. Written in Gluon, Triton's language of explicit
layouts, for compute capability 9.0; there is no interpreter for it, so it is tested on a GPU only.

A row of K elements is seen as pieces of 64, 128 bytes each, which is what the copies take; what a block of pieces has
too many comes as zeros. Where K is no multiple of 64 (TAIL) the last block is counted from the end of the row instead:
it repeats columns of the block before, and x is 0 there (an inf of W in such a column makes NaN of its row).

A copy starts at a multiple of 16 bytes, and so do the rows of a tensor map. Those of an odd rank do not, but every
eighth of them does: a program owns rows STEP apart, which lie equally far behind such a multiple, and the map has a
dimension in which rows and pieces overlap, so that a copy may start anywhere in them. What a copy brings of the rows
beside is made 0, and x is moved instead of W.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import re
from collections.abc import Sequence

from torch import Tensor

from fsvd_compile.kernels import _triton
from fsvd_compile.kernels._triton import (
    activate,
    cdiv,
    locate,
    next_power_of_2,
    pick_int,
    pick_pointer,
    pick_size,
)

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    # What this file uses, looked for here: another Gluon leaves these products to `_gemv`.
    mbarrier.init, mbarrier.expect, mbarrier.wait  # noqa: B018
    # Names that Triton 3.9 has no more come second, and those that 3.6 has not yet first.
    async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
    barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
    memory = gl.shared_memory_descriptor
    reinterpret = memory.reinterpret if hasattr(memory, "reinterpret") else memory._reinterpret
except (ImportError, AttributeError):  # no Triton, or one whose Gluon is another
    gluon = None

log = logging.getLogger(__name__)

# The newest Triton that has compiled the streamed kernels. Gluon changes without notice: 3.9 took names away.
NEWEST = (3, 9)
# A weight piece of one copy: its 128 bytes.
PIECE = 64
# Below these, of weight in a launch and of K of a shrink, a model waits for launches: not streamed, not measured.
LEAST_BYTES = 2 << 20
LEAST_HIDDEN = 1024
# x lies in shared memory, too, and the blocks are unrolled: 32 of them.
MOST_K = 16384


def jit(fn):
    """`gluon.jit`, or the function itself where there is no Gluon."""
    return fn if gluon is None else gluon.jit(fn)


def takes(op: str, x: Tensor, weights: Sequence[Tensor], layout: str) -> bool:
    """Whether a product with one token goes through this kernel."""
    step = row_step(weights)
    most = MOST_K if step == 1 else MOST_K - 7  # a block more would make its registers spill
    return (
        x.shape[0] == 1
        and (x.stride(1) == 1 or x.shape[1] == 1)
        and all(4 * PIECE <= w.shape[1] <= most and w.shape[0] % step == 0 for w in weights)
        # An odd K in rows of whole 16 bytes has not run on a GPU.
        and all(w.shape[1] % 8 == 0 or w.stride(0) % 8 for w in weights)
        and streams(op, x, weights, layout)
    )


def row_step(weights: Sequence[Tensor]) -> int:
    """How many rows apart two rows are that start equally far from a multiple of 16 bytes."""
    vector = 16 // weights[0].element_size()
    return max(vector // math.gcd(vector, w.stride(0)) for w in weights)


def streams(op: str, x: Tensor, weights: Sequence[Tensor], layout: str) -> bool:
    """Whether weights are such as TMA brings into shared memory faster than loads would.

    That is on compute capability 9.0, in bf16 and fp16, for weights whose rows are K-contiguous. A chip divides its L1
    and shared memory anew between kernels that want more of the one or of the other, and waits for that: on an H200 one
    streamed linear among seven others costs a layer of LLaMA-7B 3 to 9 us (bench/NOTES.md).
    """
    return (
        usable(x)
        and layout == "row"
        and sum(w.numel() for w in weights) * 2 >= LEAST_BYTES
        and all(w.stride(0) >= w.shape[1] for w in weights)
        and (op == "expand" or all(w.shape[1] >= LEAST_HIDDEN for w in weights))
        and all(map(_triton.aligned, weights))
    )


def usable(x: Tensor) -> bool:
    """Whether the streamed kernels run on x's device and take its dtype."""
    return (
        gluon is not None
        and not _triton.interpreted()
        and _triton.capability(x.device) == (9, 0)
        and x.element_size() == 2
        and _compiles(_triton.triton.__version__)
    )


@functools.cache
def _compiles(version: str) -> bool:
    """Whether Gluon of this Triton is one that the streamed kernels are written in, or FSVD_GLUON=1 says so."""
    if (
        tuple(map(int, re.findall(r"\d+", version)[:2])) <= NEWEST
        or os.environ.get("FSVD_GLUON") == "1"
    ):
        return True
    log.warning(
        "Triton %s is newer than %d.%d, the last that has compiled the streamed kernels for compute capability 9.0, so "
        "slower ones run in their place. Set FSVD_GLUON=1 to try them, or install an older Triton.",
        version,
        *NEWEST,
    )
    return False


def parts(pieces: int, whole: bool) -> tuple[int, int, int]:
    """Powers of two, three at most, that together hold the blocks of a row of x; one that does if `whole`."""
    found: list[int] = []
    while pieces > 0 and len(found) < 3:
        part = next_power_of_2(pieces)
        if part > pieces and not whole and len(found) < 2:
            part //= 2
        found.append(part)
        pieces -= part
    return tuple((*found, 0, 0)[:3])


def shared_bytes(k: int, block_r: int, block_k: int, stages: int, gated: bool, whole: bool) -> int:
    """Shared memory of a program."""
    blocks = cdiv(k, block_k)
    own = 2 * block_k * (min(stages, blocks) * block_r + sum(parts(blocks, whole)))
    return own * (2 if gated else 1) + 1024


def launch(
    x: Tensor,
    weights: Sequence[Tensor],
    shared: dict,
    tile,
    blocks: int,
    pdl: bool,
) -> None:
    """Launches the kernel with the arguments it shares with the others, see `_linear`."""
    step = row_step(weights)
    longest, shortest = (most(w.shape[1] for w in weights) for most in (max, min))
    shifted = any(w.shape[1] % 8 or w.stride(0) % 8 for w in weights)
    tail = shifted or any(w.shape[1] % PIECE for w in weights)
    block_k = tile.block_k
    while tail and block_k > shortest:  # a block from the end of a row lies within it
        block_k //= 2
    most_shift = 7 if step > 1 else 0
    pieces, count = block_k // PIECE, cdiv(longest + most_shift, block_k)
    smem = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    maps = [_map(w, step, [tile.block_r, pieces, PIECE], smem) for w in weights]
    offset_unit = math.gcd(8, *shared["OFFSETS"])
    first, second, third = parts(count, shared["NORM"] != "none")
    taken = (
        "X", "Y", "BIAS", "RES", "N", "NB", "KS", "STRIDE_R", "stride_rn",
        "COUNT", "ALIGN", "ACT", "GATED", "HAS_BIAS", "HAS_RES", "num_warps",
        "NORM", "NORM_W", "NORM_B", "HAS_NORM_W", "HAS_NORM_B", "eps", "norm_offset",
    )  # fmt: skip
    _triton.launch(
        _stream,
        (blocks,),
        x.device,
        pdl,
        **{name: shared[name] for name in taken},
        **named("W", maps),
        OFFSETS=tuple(start // offset_unit for start in shared["OFFSETS"]),
        OFFSET_UNIT=offset_unit,
        STEP=step,
        BLOCK_R=tile.block_r,
        PIECES=pieces,
        NUM_K=count,
        STAGES=min(tile.num_stages, count),
        PART0=first,
        PART1=second,
        PART2=third,
        TAIL=tail,
        SHIFTED=shifted,
        EDGE=(shortest - 1) // block_k,
        LAYOUT=gl.BlockedLayout([1, 1, 8], [1, 4, 8], [tile.num_warps, 1, 1], [2, 1, 0]),
    )


def named(name: str, maps: list) -> dict:
    """Kernel arguments, for Triton takes no tuples of tensor maps; None for those that are not there."""
    return {f"{name}{i}": maps[i] if i < len(maps) else None for i in range(4)}


def _map(w: Tensor, step: int, block: list[int], layout):
    """`[rows / step, pieces, elements]` of a weight: element c and piece p behind it of row `g * step + j` are at
    `[g, p, j * stride + c]`.

    No copy asks for more than its row and 16 bytes around, of which the last dimension knows nothing.
    """
    n, k = w.shape
    stride = w.stride(0)
    most = (step - 1) * stride
    shape = [n // step, (k + (7 if most else 0)) // PIECE, most + k + PIECE]
    return TensorDescriptor(_triton.unread(w), shape, [step * stride, PIECE, 1], block, layout)


@jit
def _stream(
    X,
    Y,
    W0,
    W1,
    W2,
    W3,
    BIAS,
    RES,
    NORM_W,
    NORM_B,
    N,
    NB,
    KS,
    STRIDE_R,
    OFFSETS,
    stride_rn,
    eps,
    norm_offset,
    COUNT: gl.constexpr,
    ALIGN: gl.constexpr,
    OFFSET_UNIT: gl.constexpr,
    STEP: gl.constexpr,
    BLOCK_R: gl.constexpr,
    PIECES: gl.constexpr,
    NUM_K: gl.constexpr,
    STAGES: gl.constexpr,
    PART0: gl.constexpr,
    PART1: gl.constexpr,
    PART2: gl.constexpr,
    TAIL: gl.constexpr,
    SHIFTED: gl.constexpr,
    EDGE: gl.constexpr,
    NORM: gl.constexpr,
    ACT: gl.constexpr,
    GATED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_RES: gl.constexpr,
    HAS_NORM_W: gl.constexpr,
    HAS_NORM_B: gl.constexpr,
    LAYOUT: gl.constexpr,
    USE_PDL: gl.constexpr,
    num_warps: gl.constexpr,
):
    if USE_PDL:
        gdc_launch_dependents()
    which, row, column = locate(gl.program_id(0), N, 1, 1 if GATED else COUNT, BLOCK_R, STEP)
    n = pick_size(which, N, COUNT)
    K = pick_size(which, KS, COUNT) * ALIGN
    HALVES: gl.constexpr = 2 if GATED else 1
    ring = gl.allocate_shared_memory(
        X.dtype.element_ty, [STAGES * HALVES, BLOCK_R, PIECES, 64], W0.layout
    )
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(bars.index(i), count=1)
    fence_async_shared()
    shift, start = _shift(row, pick_size(which, STRIDE_R, COUNT), ALIGN, STEP)
    end = K + shift
    shift_up, end_up, start_up = shift, end, start
    if GATED:
        shift_up, start_up = _shift(row, gl.cast(STRIDE_R[1], gl.int32), ALIGN, STEP)
        end_up = gl.cast(KS[1], gl.int32) * ALIGN + shift_up
    maps = (W0, W1, W2, W3)
    at = (row // STEP, start, start_up)
    for i in gl.static_range(STAGES):
        _request(maps, ring, bars, at, which, end, end_up, i, i, COUNT, GATED, TAIL)

    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [num_warps, 1], [1, 0])
    OUT: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
    rows = row + gl.arange(0, BLOCK_R, layout=OUT) * STEP
    bias, bias_up = biases(BIAS, NB, rows, which, COUNT, GATED, HAS_BIAS)
    SCATTERED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    kept0 = gl.allocate_shared_memory(X.dtype.element_ty, [PART0 * PIECES, 64], SCATTERED)
    kept1 = kept0
    kept2 = kept0
    if PART1:
        kept1 = gl.allocate_shared_memory(X.dtype.element_ty, [PART1 * PIECES, 64], SCATTERED)
    if PART2:
        kept2 = gl.allocate_shared_memory(X.dtype.element_ty, [PART2 * PIECES, 64], SCATTERED)
    if GATED:
        also0 = gl.allocate_shared_memory(X.dtype.element_ty, [PART0 * PIECES, 64], SCATTERED)
        also1 = also0
        also2 = also0
        if PART1:
            also1 = gl.allocate_shared_memory(X.dtype.element_ty, [PART1 * PIECES, 64], SCATTERED)
        if PART2:
            also2 = gl.allocate_shared_memory(X.dtype.element_ty, [PART2 * PIECES, 64], SCATTERED)
    if HAS_NORM_W:
        g = _row(NORM_W, 0, PART0, shift, end, PIECES, ROWS, TAIL)
    if HAS_NORM_B:
        h = _row(NORM_B, 0, PART0, shift, end, PIECES, ROWS, TAIL)

    if USE_PDL:
        gdc_wait()

    # All that the kernel before may have written is requested at once, see `_gemv`.
    x_at = X + pick_int(which, OFFSETS, COUNT) * OFFSET_UNIT
    x0 = _row(x_at, 0, PART0, shift, end, PIECES, ROWS, TAIL)
    if PART1:
        x1 = _row(x_at, PART0, PART1, shift, end, PIECES, ROWS, TAIL)
    if PART2:
        x2 = _row(x_at, PART0 + PART1, PART2, shift, end, PIECES, ROWS, TAIL)
    if GATED:
        v_at = X + OFFSETS[1] * OFFSET_UNIT
        v0 = _row(v_at, 0, PART0, shift_up, end_up, PIECES, ROWS, TAIL)
        if PART1:
            v1 = _row(v_at, PART0, PART1, shift_up, end_up, PIECES, ROWS, TAIL)
        if PART2:
            v2 = _row(v_at, PART0 + PART1, PART2, shift_up, end_up, PIECES, ROWS, TAIL)
    res = gl.zeros([BLOCK_R], gl.float32, layout=OUT)
    if HAS_RES:
        res = gl.load(RES + (column + rows) * stride_rn, mask=rows < n, other=0.0).to(gl.float32)

    if NORM != "none":
        _, there = _columns(0, PART0, shift, end, PIECES, ROWS, TAIL)
        x = x0.to(gl.float32)
        if NORM == "layer":
            x = gl.where(there, x - gl.sum(gl.sum(x, axis=1), axis=0) / K, 0.0)
        x *= gl.rsqrt(gl.sum(gl.sum(x * x, axis=1), axis=0) / K + gl.cast(eps, gl.float32))
        if HAS_NORM_W:
            scale = g.to(gl.float32)
            if NORM == "rms":
                scale += gl.cast(norm_offset, gl.float32)
            x *= scale
        if HAS_NORM_B:
            x += h.to(gl.float32)
        x0 = x.to(X.dtype.element_ty)
    kept0.store(x0)
    if PART1:
        kept1.store(x1)
    if PART2:
        kept2.store(x2)
    if GATED:
        also0.store(v0)
        if PART1:
            also1.store(v1)
        if PART2:
            also2.store(v2)
    barrier()

    kept = (kept0, kept1, kept2)
    if GATED:
        also = (also0, also1, also2)
    acc = _partial(
        ring, bars, kept, (shift, end), 0, 0, PART0, PART1, LAYOUT, GATED, STAGES, SHIFTED, EDGE
    )
    if GATED:
        up = _partial(
            ring,
            bars,
            also,
            (shift_up, end_up),
            0,
            1,
            PART0,
            PART1,
            LAYOUT,
            GATED,
            STAGES,
            SHIFTED,
            EDGE,
        )
    for i in gl.static_range(1, NUM_K):
        if i - 1 + STAGES < NUM_K:
            # Every warp has read what the next copy writes over.
            barrier()
            _request(
                maps,
                ring,
                bars,
                at,
                which,
                end,
                end_up,
                i - 1 + STAGES,
                (i - 1) % STAGES,
                COUNT,
                GATED,
                TAIL,
            )
        acc += _partial(
            ring, bars, kept, (shift, end), i, 0, PART0, PART1, LAYOUT, GATED, STAGES, SHIFTED, EDGE
        )
        if GATED:
            up += _partial(
                ring,
                bars,
                also,
                (shift_up, end_up),
                i,
                1,
                PART0,
                PART1,
                LAYOUT,
                GATED,
                STAGES,
                SHIFTED,
                EDGE,
            )
    y = gl.convert_layout(gl.sum(gl.sum(acc, axis=2), axis=1), OUT)
    y = activate(y + bias, ACT)
    if GATED:
        y *= gl.convert_layout(gl.sum(gl.sum(up, axis=2), axis=1), OUT) + bias_up
    y += res
    gl.store(Y + column + rows, y.to(Y.dtype.element_ty), mask=rows < n)


@jit
def biases(
    BIAS,
    NB,
    rows,
    which,
    COUNT: gl.constexpr,
    GATED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):
    """fp32 biases of some rows of a weight, and of the same rows of up; 0 where there is none."""
    bias = (rows * 0).to(gl.float32)
    bias_up = bias
    if HAS_BIAS:
        some = rows < pick_size(which, NB, COUNT)
        bias = gl.load(pick_pointer(which, BIAS, COUNT) + rows, mask=some, other=0.0).to(gl.float32)
        if GATED:
            bias_up = gl.load(BIAS[1] + rows, mask=rows < NB[1], other=0.0).to(gl.float32)
    return bias, bias_up


@jit
def _shift(row, stride, ALIGN: gl.constexpr, STEP: gl.constexpr):
    """How far a program's first row starts behind a multiple of 16 bytes, and where in a tensor map that is."""
    if STEP > 1:
        start = row % STEP * stride
        shift = start % (8 // ALIGN) * ALIGN  # so a multiple of ALIGN to the compiler
        return shift, start * ALIGN - shift
    else:
        return 0, 0


@jit
def _request(
    maps,
    ring,
    bars,
    at,
    which,
    end,
    end_up,
    i: gl.constexpr,
    stage: gl.constexpr,
    COUNT: gl.constexpr,
    GATED: gl.constexpr,
    TAIL: gl.constexpr,
):
    """Starts the copies of a block of columns into a stage of the ring."""
    group, start, start_up = at
    PIECES: gl.constexpr = ring.shape[2]
    bar = bars.index(stage)
    mbarrier.expect(bar, ring.shape[1] * PIECES * 128 * (2 if GATED else 1))
    if GATED:
        _copy(maps[0], ring.index(2 * stage), bar, group, start, i, end, group >= 0, TAIL)
        _copy(maps[1], ring.index(2 * stage + 1), bar, group, start_up, i, end_up, group >= 0, TAIL)
    else:
        for j in gl.static_range(COUNT):
            _copy(maps[j], ring.index(stage), bar, group, start, i, end, which == j, TAIL)


@jit
def _copy(weight, into, bar, group, start, i: gl.constexpr, end, when, TAIL: gl.constexpr):
    """One copy, if `when`: block i of a weight, the last one from its end."""
    PIECES: gl.constexpr = into.shape[1]
    piece = i * PIECES
    if TAIL:
        final = (end - 1) // (PIECES * 64)
        last = final == i
        piece = gl.where(last, 0, piece)
        start = gl.where(last, start + _last_start(end, PIECES), start)
    async_load(weight, [group, piece, start], bar, into, pred=when)


@jit
def _last_start(end, PIECES: gl.constexpr):
    """Where the last block of a row starts, so that it ends behind the row by less than 16 bytes."""
    return (end + 7) // 8 * 8 - PIECES * 64


@jit
def _partial(
    ring,
    bars,
    kept,
    span,
    i: gl.constexpr,
    half: gl.constexpr,
    PART0: gl.constexpr,
    PART1: gl.constexpr,
    LAYOUT: gl.constexpr,
    GATED: gl.constexpr,
    STAGES: gl.constexpr,
    SHIFTED: gl.constexpr,
    EDGE: gl.constexpr,
):
    """`[BLOCK_R, 4, 8]` sums of a block of columns, each within a thread; x is in `kept`, from and to `span`."""
    shift, end = span
    PIECES: gl.constexpr = ring.shape[2]
    if half == 0:
        mbarrier.wait(bars.index(i % STAGES), (i // STAGES) % 2)
    w = ring.index((i % STAGES) * (2 if GATED else 1) + half).load(LAYOUT).to(gl.float32)
    SLICE: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    if i < PART0:
        x = kept[0].slice(i * PIECES, PIECES, dim=0).load(SLICE)
    elif i < PART0 + PART1:
        x = kept[1].slice((i - PART0) * PIECES, PIECES, dim=0).load(SLICE)
    else:
        x = kept[2].slice((i - PART0 - PART1) * PIECES, PIECES, dim=0).load(SLICE)
    if SHIFTED and (i == 0 or i >= EDGE):
        # The rows beside this one: less than 16 bytes in front of it, and less behind the last block's end.
        piece = gl.arange(0, PIECES, layout=gl.SliceLayout(1, SLICE))
        at = piece[:, None] * 64 + gl.arange(0, 64, layout=gl.SliceLayout(0, SLICE))[None, :]
        if i == 0:
            w = gl.where(gl.expand_dims(at >= shift, 0), w, 0.0)
        if i >= EDGE:
            final = (end - 1) // (PIECES * 64)
            behind = gl.where(final == i, PIECES * 64 - ((end + 7) // 8 * 8 - end), PIECES * 64)
            w = gl.where(gl.expand_dims(at < behind, 0), w, 0.0)
    product = w * gl.expand_dims(x.to(gl.float32), 0)
    product = gl.reshape(product, [ring.shape[1], PIECES // 4, 4, 8, 8])
    return gl.sum(gl.sum(product, axis=4), axis=1)


@jit
def _columns(
    first: gl.constexpr,
    count: gl.constexpr,
    shift,
    end,
    PIECES: gl.constexpr,
    ROWS: gl.constexpr,
    TAIL: gl.constexpr,
):
    """Where the elements of `count` blocks are, `[count * PIECES, 64]`, from the multiple of 16 bytes in front of their
    row, and which of them are the row's and not of a block before."""
    piece = first * PIECES + gl.arange(0, count * PIECES, layout=gl.SliceLayout(1, ROWS))
    start = piece * 64
    least = start * 0
    if TAIL:
        block = piece // PIECES
        before = block * (PIECES * 64)
        last = block == (end - 1) // (PIECES * 64)
        start = gl.where(last, _last_start(end, PIECES) + (start - before), start)
        least = gl.where(block == 0, shift, before)
    k = start[:, None] + gl.arange(0, 64, layout=gl.SliceLayout(0, ROWS))[None, :]
    return k, (k < end) & (k >= least[:, None])


@jit
def _row(
    at,
    first: gl.constexpr,
    count: gl.constexpr,
    shift,
    end,
    PIECES: gl.constexpr,
    ROWS: gl.constexpr,
    TAIL: gl.constexpr,
):
    """Some blocks of a row of values, 0 where a block has too many."""
    k, there = _columns(first, count, shift, end, PIECES, ROWS, TAIL)
    return gl.load(at - shift + k, mask=there, other=0.0)
