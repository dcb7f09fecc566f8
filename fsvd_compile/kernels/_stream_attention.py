"""Streamed decode attention: K and V in shared memory by TMA, a softmax for every warp.

What `fsvd::decode_attention` computes, for compute capability 9.0, bf16 and fp16, head dims of 64 and 128 and up to 16
query heads a KV head. A block of rows lies in shared memory in as many parts as there are warps, and each warp keeps a
softmax of its own over its part, so that nothing is exchanged between them before the end, where their results are
merged as those of splits are. Most of a program's rows are on their way before q is there. Written in Gluon, as
`_stream`, and tested on a GPU only.
"""

from __future__ import annotations

from torch import Tensor

from fsvd_compile.kernels import _stream, _triton
from fsvd_compile.kernels._stream import PIECE, jit
from fsvd_compile.kernels._triton import cdiv, next_power_of_2
from fsvd_compile.kernels.attention import bias_of, filled_rows
from fsvd_compile.kernels.rope_append import rotated

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

# Query heads of a KV head: the rows of an operand of `mma`.
MOST_GROUP = 16
# Elements between neighbours in a dimension of a tensor map: 40 bits of bytes.
MOST_STRIDE = 1 << 39
# Rows of the mask that lie in shared memory at once.
MOST_CHUNK = 1024


def takes(q: Tensor, k_cache: Tensor, v_cache: Tensor, by_head: bool) -> bool:
    """Whether decode attention goes through this kernel; `by_head`: the mask is another for every query head."""
    return (
        _stream.usable(q)
        and not by_head
        and q.shape[1] // k_cache.shape[1] <= MOST_GROUP
        and all(
            t.shape[3] in (PIECE, 2 * PIECE)
            and _triton.aligned(t)
            and all(0 < s < MOST_STRIDE and s % 8 == 0 for s in t.stride()[:3])
            for t in (k_cache, v_cache)
        )
    )


def shared_bytes(block_n: int, d: int, dv: int, stages: int) -> int:
    """Shared memory of a program: its ring, q, a chunk of the mask, the barriers."""
    return 2 * (stages * block_n * (d + dv) + MOST_GROUP * d) + 4 * MOST_CHUNK + 1024


def launch(
    shared: dict, k_cache: Tensor, v_cache: Tensor, grid: tuple[int, ...], pdl: bool
) -> None:
    """Launches the kernel with the arguments it shares with the other, see `decode_attention`."""
    block_n, rows = shared["BLOCK_N"], next_power_of_2(cdiv(shared["S"], shared["SPLITS"]))
    flat = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=5)
    _triton.launch(
        _stream_attention,
        grid,
        k_cache.device,
        pdl,
        **shared,
        K_MAP=_map(k_cache, block_n, flat),
        V_MAP=_map(v_cache, block_n, flat),
        CHUNK=block_n if shared["MASK_KIND"] == "none" else min(MOST_CHUNK, max(block_n, rows)),
        RING=gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3),
        MMA=gl.NVMMADistributedLayout(
            version=[2, 0], warps_per_cta=[shared["num_warps"], 1, 1], instr_shape=[1, 16, 8]
        ),
    )


def _map(cache: Tensor, rows: int, layout):
    """`[B, H, pieces, S, 64]` of a cache: a copy takes all pieces of so many rows."""
    b, h, s, d = cache.shape
    stride_b, stride_h, stride_s, _ = cache.stride()
    return TensorDescriptor(
        _triton.unread(cache),
        [b, h, d // PIECE, s, PIECE],
        [stride_b, stride_h, PIECE, stride_s, 1],
        [1, 1, d // PIECE, rows, PIECE],
        layout,
    )


@jit
def _stream_attention(
    Q,
    K_NEW,
    V_NEW,
    COS,
    SIN,
    K,
    V,
    K_MAP,
    V_MAP,
    POSITION,
    MASK,
    REACH,
    OUT,
    PART,
    STATS,
    scale,
    GROUP,
    S,
    SPLITS,
    stride_qb,
    stride_qh,
    stride_qd,
    stride_nb,
    stride_nh,
    stride_nd,
    stride_wb,
    stride_wh,
    stride_wd,
    stride_cb,
    stride_sb,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_mb,
    stride_mh,
    stride_mn,
    D: gl.constexpr,
    DV: gl.constexpr,
    ONE_HEAD: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    CHUNK: gl.constexpr,
    MASK_KIND: gl.constexpr,
    HAS_REACH: gl.constexpr,
    ONE_SPLIT: gl.constexpr,
    READ_AHEAD: gl.constexpr,
    RING: gl.constexpr,
    MMA: gl.constexpr,
    USE_PDL: gl.constexpr,
    num_warps: gl.constexpr,
):
    if USE_PDL:
        gdc_launch_dependents()
        if not READ_AHEAD:
            gdc_wait()
    split = gl.program_id(0)
    kv_head = gl.program_id(1)
    batch = gl.program_id(2)
    dtype: gl.constexpr = K.dtype.element_ty
    NB: gl.constexpr = BLOCK_N // num_warps
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, D // 64, BLOCK_N, 64], K_MAP.layout)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, DV // 64, BLOCK_N, 64], V_MAP.layout)
    # The same as every warp sees it: a part of the rows each.
    ks = reinterpret(k_ring, dtype, [STAGES * (D // 64), num_warps, NB, 64], RING)
    vs = reinterpret(v_ring, dtype, [STAGES * (DV // 64), num_warps, NB, 64], RING)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES + 1):
        mbarrier.init(bars.index(i), count=1)
    fence_async_shared()

    # How far the cache is filled. Before the wait it is a guess, one for all warps; a wrong one is found out below.
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
    seen_at = gl.allocate_shared_memory(
        gl.int32,
        [1],
        gl.SwizzledSharedLayout(1, 1, 1, [0]),
        gl.load(POSITION + gl.arange(0, 1, layout=ONE), volatile=True).to(gl.int32),
    )
    barrier()
    guess = gl.max(seen_at.load(ONE), axis=0)
    filled, first, past = _share(guess, split, S, SPLITS, BLOCK_N, MASK_KIND)
    # At least 1, as the compiler is told: it would have one wait for no blocks and one for some.
    turns = gl.maximum(gl.cdiv(past - first, BLOCK_N), 1)
    last = gl.maximum(past - BLOCK_N, 0)
    ahead = gl.minimum(turns, STAGES)
    for i in range(ahead):
        start = _start(i, first, last, BLOCK_N)
        _copy(K_MAP, V_MAP, k_ring, v_ring, bars.index(i), i, batch, kv_head, start)

    HEADS: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [num_warps, 1], [1, 0])
    g = gl.arange(0, 16, layout=gl.SliceLayout(1, HEADS))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, HEADS))[None, :]
    e = gl.arange(0, DV, layout=gl.SliceLayout(0, HEADS))[None, :]
    b64 = gl.cast(batch, gl.int64)
    h64 = gl.cast(kv_head, gl.int64)
    # Rows of the operand that have no head repeat the first.
    head = h64 * GROUP + gl.where(g < GROUP, g, 0)
    COLUMNS: gl.constexpr = gl.SliceLayout(1, MMA)
    part = gl.arange(0, num_warps, layout=gl.SliceLayout(1, COLUMNS))
    at_n = part[:, None] * NB + gl.arange(0, NB, layout=gl.SliceLayout(0, COLUMNS))[None, :]
    mask_at = MASK + b64 * stride_mb + h64 * GROUP * stride_mh

    if USE_PDL and READ_AHEAD:
        gdc_wait()

    # What the kernels before may have written is requested at once, see `decode_attention`.
    position = gl.load(POSITION, volatile=True).to(gl.int32)
    if MASK_KIND != "none":
        biases = _biases(
            mask_at, 0, first, past, position, stride_mn, CHUNK, BLOCK_N, MASK_KIND, num_warps
        )
    end = S + guess * 0
    if HAS_REACH:
        end = gl.minimum(gl.load(REACH).to(gl.int32), S)
    cos = COS + b64 * stride_cb
    sin = SIN + b64 * stride_sb
    q_at = Q + b64 * stride_qb
    if ONE_HEAD:
        q = rotated(q_at + h64 * stride_qh, stride_qd, cos, sin, d, d < D, D // 2)
        q += gl.zeros([16, D], gl.float32, layout=HEADS)
    else:
        q = rotated(q_at + head[:, None] * stride_qh, stride_qd, cos, sin, d, d < D, D // 2)
    q = q.to(dtype)
    new_at = K_NEW + b64 * stride_nb + h64 * stride_nh
    k_new = rotated(new_at, stride_nd, cos, sin, d, d < D, D // 2).to(dtype)
    new_at = V_NEW + b64 * stride_wb + h64 * stride_wh
    v_new = gl.load(new_at + e * stride_wd).to(dtype)
    new_bias = 0.0
    if MASK_KIND != "none":
        inside = (guess >= 0) & (guess < S)
        new_bias = bias_of(mask_at, gl.cast(guess, gl.int64), inside, stride_mn, MASK_KIND)
    q_shared = gl.allocate_shared_memory(
        dtype, [16, D], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]), q
    )
    if MASK_KIND != "none":
        BIASES: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
        b_shared = gl.allocate_shared_memory(gl.float32, [CHUNK // BLOCK_N, num_warps, NB], BIASES)
        b_flat = reinterpret(b_shared, gl.float32, [CHUNK], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        b_flat.store(biases)
    barrier()
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    q0 = _spread(q_shared.slice(0, 64, dim=1), num_warps, A)
    q1 = q0
    if D > 64:
        q1 = _spread(q_shared.slice(64, 64, dim=1), num_warps, A)

    scale = gl.cast(scale, gl.float32)
    top = gl.full([num_warps, 16], float("-inf"), gl.float32, layout=gl.SliceLayout(2, MMA))
    total = gl.zeros([num_warps, 16], gl.float32, layout=gl.SliceLayout(2, MMA))
    acc0 = gl.zeros([num_warps, 16, 64], gl.float32, layout=MMA)
    acc1 = acc0
    for turn in range(turns):
        stage = turn % STAGES
        start = _start(turn, first, last, BLOCK_N)
        if MASK_KIND == "none":
            own = first + turn * BLOCK_N
            bias = _biases_of(mask_at, start + at_n, own, past, position, stride_mn, MASK_KIND)
        else:
            block = turn % (CHUNK // BLOCK_N)
            if (block == 0) & (turn > 0):
                barrier()
                biases = _biases(
                    mask_at,
                    turn,
                    first,
                    past,
                    position,
                    stride_mn,
                    CHUNK,
                    BLOCK_N,
                    MASK_KIND,
                    num_warps,
                )
                b_flat.store(biases)
                barrier()
            bias = b_shared.index(block).load(COLUMNS)
        mbarrier.wait(bars.index(stage), (turn // STAGES) & 1)
        if (start + BLOCK_N > filled) | ((guess >= start) & (guess < start + BLOCK_N)):
            _hide(vs, stage, start, filled, guess, DV)
        top, total, acc0, acc1 = _absorb(
            ks, vs, stage, q0, q1, bias, scale, top, total, acc0, acc1, D, DV, MMA
        )
        if turn + STAGES < turns:
            # Every warp has read what the next copies write over.
            barrier()
            start = _start(turn + STAGES, first, last, BLOCK_N)
            _copy(K_MAP, V_MAP, k_ring, v_ring, bars.index(stage), stage, batch, kv_head, start)

    redo = 0
    if position != guess:
        # What was read is not what is there, nor all of it.
        top = gl.full([num_warps, 16], float("-inf"), gl.float32, layout=gl.SliceLayout(2, MMA))
        total = gl.zeros([num_warps, 16], gl.float32, layout=gl.SliceLayout(2, MMA))
        acc0 = gl.zeros([num_warps, 16, 64], gl.float32, layout=MMA)
        acc1 = acc0
        # Other splits may have guessed right, so each has to have the share that it has by the number itself.
        filled, first, past = _share(position, split, S, SPLITS, BLOCK_N, MASK_KIND)
        redo = gl.cdiv(past - first, BLOCK_N)
        if MASK_KIND != "none":
            inside = (position >= 0) & (position < S)
            new_bias = bias_of(mask_at, gl.cast(position, gl.int64), inside, stride_mn, MASK_KIND)
    bar = bars.index(STAGES)
    late = 0
    for turn in range(redo):
        start = first + turn * BLOCK_N
        barrier()
        _copy(K_MAP, V_MAP, k_ring, v_ring, bar, 0, batch, kv_head, start)
        bias = _biases_of(mask_at, start + at_n, start, past, position, stride_mn, MASK_KIND)
        mbarrier.wait(bar, late & 1)
        late += 1
        _hide(vs, 0, start, past, position, DV)
        top, total, acc0, acc1 = _absorb(
            ks, vs, 0, q0, q1, bias, scale, top, total, acc0, acc1, D, DV, MMA
        )
    # What the mask shows beyond, see `decode_attention`.
    SCAN: gl.constexpr = 1024
    scan = gl.arange(0, SCAN, layout=gl.BlockedLayout([4], [32], [num_warps], [0]))
    end = gl.where(end == position + 1, position, end)
    for piece in range(split, gl.cdiv(end - filled, SCAN), SPLITS):
        begin = filled + piece * SCAN
        beyond = _biases_of(mask_at, begin + scan, begin, S, position, stride_mn, MASK_KIND)
        if gl.max((beyond > float("-inf")).to(gl.int32), axis=0) > 0:
            for start in range(begin, begin + SCAN, BLOCK_N):
                barrier()
                _copy(K_MAP, V_MAP, k_ring, v_ring, bar, 0, batch, kv_head, start)
                bias = _biases_of(mask_at, start + at_n, start, S, position, stride_mn, MASK_KIND)
                mbarrier.wait(bar, late & 1)
                late += 1
                _hide(vs, 0, start, S, position, DV)
                top, total, acc0, acc1 = _absorb(
                    ks, vs, 0, q0, q1, bias, scale, top, total, acc0, acc1, D, DV, MMA
                )

    # The warps' results become one, and the new token's. Summed within threads, as a reduction over warps takes longer.
    MERGED: gl.constexpr = gl.BlockedLayout(
        [num_warps, 1, 4], [1, 2, 16], [1, num_warps, 1], [2, 1, 0]
    )
    TOPS: gl.constexpr = gl.SliceLayout(2, MERGED)
    ROWS: gl.constexpr = gl.SliceLayout(0, TOPS)
    OUT_ROWS: gl.constexpr = gl.SliceLayout(0, MERGED)
    top = gl.convert_layout(top, TOPS)
    total = gl.convert_layout(total, TOPS)
    new = gl.full([16], float("-inf"), gl.float32, layout=ROWS)
    v0 = gl.zeros([1, 64], gl.float32, layout=OUT_ROWS)
    v1 = v0
    # A position outside the cache is an error in eager; a kernel cannot raise, so it writes nothing.
    if (position >= 0) & (position < S) & (split == SPLITS - 1):
        there = gl.cast(position, gl.int64)
        gl.store(K + b64 * stride_kb + h64 * stride_kh + there * stride_kn + d, k_new)
        gl.store(V + b64 * stride_vb + h64 * stride_vh + there * stride_vn + e, v_new)
        score = gl.sum(q.to(gl.float32) * k_new.to(gl.float32), axis=1)
        new = gl.convert_layout(score, ROWS) * scale + new_bias
        v_shared = gl.allocate_shared_memory(
            dtype, [1, DV], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]), v_new
        )
        barrier()
        v0 = v_shared.slice(0, 64, dim=1).load(OUT_ROWS).to(gl.float32)
        if DV > 64:
            v1 = v_shared.slice(64, 64, dim=1).load(OUT_ROWS).to(gl.float32)
    pivot = gl.maximum(gl.max(top, axis=0), new)
    finite = gl.where(pivot == float("-inf"), 0.0, pivot)
    share = gl.exp(top - finite[None, :])
    weight = gl.exp(new - finite)
    total = gl.sum(total * share, axis=0) + weight
    share = gl.expand_dims(share, 2)
    weight = gl.convert_layout(weight, gl.SliceLayout(1, OUT_ROWS))[:, None]
    acc0 = gl.sum(gl.convert_layout(acc0, MERGED) * share, axis=0) + weight * v0
    if DV > 64:
        acc1 = gl.sum(gl.convert_layout(acc1, MERGED) * share, axis=0) + weight * v1

    g = gl.arange(0, 16, layout=ROWS)
    heads = gl.num_programs(1) * GROUP
    at = b64 * heads + h64 * GROUP + g
    some = g < GROUP
    if ONE_SPLIT:
        over = 1 / gl.where(total == 0, 1.0, total)
        over = gl.convert_layout(over, gl.SliceLayout(1, OUT_ROWS))[:, None]
        acc0 *= over
        if DV > 64:
            acc1 *= over
        out = OUT + at * DV
    else:
        at = at * SPLITS + split
        gl.store(STATS + at * 2, pivot, mask=some)
        gl.store(STATS + at * 2 + 1, total, mask=some)
        some = some & (total != 0)  # NaN as well: it has to come out
        out = PART + at * DV
    c = gl.arange(0, 64, layout=gl.SliceLayout(0, OUT_ROWS))[None, :]
    out = gl.convert_layout(out, gl.SliceLayout(1, OUT_ROWS))[:, None] + c
    some = gl.convert_layout(some, gl.SliceLayout(1, OUT_ROWS))[:, None]
    gl.store(out, acc0.to(out.dtype.element_ty), mask=some)
    if DV > 64:
        gl.store(out + 64, acc1.to(out.dtype.element_ty), mask=some)


@jit
def _copy(K_MAP, V_MAP, k_ring, v_ring, bar, stage, batch, kv_head, start):
    """Starts the copies of a block of rows into a stage of the ring; rows behind the cache come as zeros."""
    WIDTH: gl.constexpr = k_ring.shape[3] + v_ring.shape[3]
    mbarrier.expect(bar, k_ring.shape[4] * 128 * WIDTH)
    at = [batch, kv_head, 0, start, 0]
    async_load(K_MAP, at, bar, k_ring.index(stage))
    async_load(V_MAP, at, bar, v_ring.index(stage))


@jit
def _start(turn, first, last, BLOCK_N: gl.constexpr):
    """The first row of a block; `last`: of the last one.

    That ends where the split's rows do. What it repeats of the block before is there already, in L2; what lies
    behind would be read from memory: 56 rows where there are 520 (H200, 32 sequences: a step of 5.13 ms, and of 4.91).
    """
    return gl.minimum(first + turn * BLOCK_N, last)


@jit
def _biases(
    mask_at,
    turn,
    first,
    past,
    position,
    stride_n,
    CHUNK: gl.constexpr,
    BLOCK_N: gl.constexpr,
    MASK_KIND: gl.constexpr,
    WARPS: gl.constexpr,
):
    """fp32 `[CHUNK]` to add to the scores of the blocks from `turn` on, -inf for rows of others and the written one."""
    EACH: gl.constexpr = CHUNK // (32 * WARPS) if CHUNK > 32 * WARPS else 1
    at = gl.arange(0, CHUNK, layout=gl.BlockedLayout([EACH], [32], [WARPS], [0]))
    turns = turn + at // BLOCK_N
    row = _start(turns, first, gl.maximum(past - BLOCK_N, 0), BLOCK_N) + at % BLOCK_N
    own = first + turns * BLOCK_N
    return _biases_of(mask_at, row, own, past, position, stride_n, MASK_KIND)


@jit
def _biases_of(mask_at, row, first, past, position, stride_n, MASK_KIND: gl.constexpr):
    """fp32 to add to the scores of rows from `first` to `past`; -inf for others and the one that is being written."""
    bias = bias_of(mask_at, row, (row >= first) & (row < past), stride_n, MASK_KIND)
    return gl.where(row != position, bias, float("-inf"))


@jit
def _share(
    position,
    split,
    S,
    SPLITS,
    BLOCK_N: gl.constexpr,
    MASK_KIND: gl.constexpr,
):
    """(how many rows are filled if this is the position, a split's first row, and the one behind its last)."""
    filled = filled_rows(position, S, MASK_KIND)
    # A block at least; beyond that an even share, rounded up to an eighth of one.
    EIGHTH: gl.constexpr = BLOCK_N // 8
    share = gl.maximum(gl.cdiv(gl.cdiv(filled, EIGHTH), SPLITS) * EIGHTH, BLOCK_N)
    return filled, split * share, gl.minimum(split * share + share, filled)


@jit
def _hide(vs, stage, start, filled, hidden, DV: gl.constexpr):
    """Makes 0 what lies in a block of V from row `filled` on and in row `hidden`: it may be anything, NaN too."""
    WARPS: gl.constexpr = vs.shape[1]
    NB: gl.constexpr = vs.shape[2]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 4, 8], [WARPS, 1, 1], [2, 1, 0])
    ROWS: gl.constexpr = gl.SliceLayout(2, LAYOUT)
    part = gl.arange(0, WARPS, layout=gl.SliceLayout(1, ROWS))
    row = part[:, None] * NB + gl.arange(0, NB, layout=gl.SliceLayout(0, ROWS))[None, :] + start
    shown = (row < filled) & (row != hidden)
    for p in gl.static_range(DV // 64):
        v = vs.index(stage * (DV // 64) + p)
        v.store(gl.where(shown[:, :, None], v.load(LAYOUT), 0.0))
    fence_async_shared()  # the next copy into it comes after this


@jit
def _spread(q, WARPS: gl.constexpr, A: gl.constexpr):
    """q `[16, 64]` as an operand of every warp, `[WARPS, 16, 64]`."""
    return gl.expand_dims(q.load(gl.SliceLayout(0, A)), 0).broadcast_to([WARPS, 16, 64])


@jit
def _absorb(
    ks,
    vs,
    stage,
    q0,
    q1,
    bias,
    scale,
    top,
    total,
    acc0,
    acc1,
    D: gl.constexpr,
    DV: gl.constexpr,
    MMA: gl.constexpr,
):
    """One block of every warp's online softmax; bias `[WARPS, NB]` is -inf where hidden."""
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    B: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    KP: gl.constexpr = D // 64
    VP: gl.constexpr = DV // 64
    WARPS: gl.constexpr = ks.shape[1]
    NB: gl.constexpr = ks.shape[2]
    scores = gl.zeros([WARPS, 16, NB], gl.float32, layout=MMA)
    scores = mma_v2(q0, ks.index(stage * KP).permute((0, 2, 1)).load(B), scores)
    if D > 64:
        scores = mma_v2(q1, ks.index(stage * KP + 1).permute((0, 2, 1)).load(B), scores)
    bias = bias[:, None, :]
    scores = gl.where(bias == float("-inf"), bias, scores * scale + bias)
    new_top = gl.maximum(top, gl.max(scores, axis=2))
    pivot = gl.where(new_top == float("-inf"), 0.0, new_top)
    weight = gl.exp(scores - pivot[:, :, None])
    shrink = gl.exp(top - pivot)
    total = total * shrink + gl.sum(weight, axis=2)
    weight = gl.convert_layout(weight.to(ks.dtype), A)
    acc0 = mma_v2(weight, vs.index(stage * VP).load(B), acc0 * shrink[:, :, None])
    if DV > 64:
        acc1 = mma_v2(weight, vs.index(stage * VP + 1).load(B), acc1 * shrink[:, :, None])
    return new_top, total, acc0, acc1
