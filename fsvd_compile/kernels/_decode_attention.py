"""Decode attention for every GPU: blocks of K and V copied ahead by Triton's pipelined loop, see `decode_attention`."""

from __future__ import annotations

import torch
from torch import Tensor

from fsvd_compile.kernels import _triton
from fsvd_compile.kernels._triton import jit, next_power_of_2, tl
from fsvd_compile.kernels.attention import bias_of, filled_rows
from fsvd_compile.kernels.rope_append import rotated


def launch(shared: dict, q: Tensor, grid: tuple[int, ...], by_head: bool, pdl: bool) -> None:
    """Launches the kernel with the arguments it shares with the other, see `decode_attention`.

    Args:
        by_head: Whether the mask is another for every query head.
    """
    group = shared["GROUP"]
    _triton.launch(
        _decode_attention,
        grid,
        q.device,
        pdl,
        **shared,
        BLOCK_G=1 if group == 1 and q.dtype == torch.float32 else max(16, next_power_of_2(group)),
        BLOCK_D=max(16, next_power_of_2(shared["D"])),
        BLOCK_DV=max(16, next_power_of_2(shared["DV"])),
        BLOCK_LATE=16,
        SCAN=16 if by_head else 1024,
        THREADS=32 * shared["num_warps"],
        BY_HEAD=by_head,
        INTERPRET=_triton.interpreted(),
    )


@jit
def _any(bias):
    """Whether a block has a position that is seen."""
    return tl.max(tl.ravel((bias > float("-inf")).to(tl.int32)), axis=0) > 0


@jit
def _decode_attention(
    Q,
    K_NEW,
    V_NEW,
    COS,
    SIN,
    K,
    V,
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
    D: tl.constexpr,
    DV: tl.constexpr,
    ONE_HEAD: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_LATE: tl.constexpr,
    SCAN: tl.constexpr,
    THREADS: tl.constexpr,
    STAGES: tl.constexpr,
    MASK_KIND: tl.constexpr,
    BY_HEAD: tl.constexpr,
    HAS_REACH: tl.constexpr,
    ONE_SPLIT: tl.constexpr,
    READ_AHEAD: tl.constexpr,
    INTERPRET: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if not READ_AHEAD:
            tl.extra.cuda.gdc_wait()
    split = tl.program_id(0)
    kv_head = tl.cast(tl.program_id(1), tl.int64)
    batch = tl.cast(tl.program_id(2), tl.int64)
    kv_heads = tl.num_programs(1)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)[None, :]
    e = tl.arange(0, BLOCK_DV)[None, :]
    g = tl.arange(0, BLOCK_G)
    head_ok = g < GROUP
    # Rows of the tile that have no head repeat the first.
    head = kv_head * GROUP + tl.where(head_ok, g, 0)

    k_base = K + batch * stride_kb + kv_head * stride_kh
    v_base = V + batch * stride_vb + kv_head * stride_vh
    k_tile = n[:, None] * stride_kn + d
    v_tile = n[:, None] * stride_vn + e
    mask_at = MASK + batch * stride_mb
    if BY_HEAD:
        new_mask = mask_at + head * stride_mh
        mask_at = new_mask[:, None]
        at_n = n[None, :]
    else:
        new_mask = mask_at + (kv_head * GROUP + g * 0) * stride_mh
        mask_at += kv_head * GROUP * stride_mh
        at_n = n

    # How far the cache is filled. Before the wait it is a guess, one for all warps; a wrong one is found out below.
    guess = tl.max(tl.load(POSITION + tl.zeros([THREADS], tl.int32), volatile=True), axis=0)
    guess = guess.to(tl.int32)
    filled = filled_rows(guess, S, MASK_KIND)
    step = SPLITS * BLOCK_N
    first = split * BLOCK_N
    # One turn at least: the wait is in it.
    turns = tl.maximum(tl.cdiv(filled - first, step), 1)

    scale = tl.cast(scale, tl.float32)
    position = guess
    q = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    if BLOCK_G > 1 and not INTERPRET:
        q = q.to(K.dtype.element_ty)  # for the tensor cores
    k_new = tl.zeros([1, BLOCK_D], K.dtype.element_ty)
    v_new = tl.zeros([1, BLOCK_DV], V.dtype.element_ty)
    new_bias = tl.zeros([BLOCK_G], tl.float32)
    top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_DV], tl.float32)
    bias = tl.zeros([BLOCK_G, BLOCK_N] if BY_HEAD else [BLOCK_N], tl.float32)
    end = S + guess * 0
    for turn in tl.range(0, turns, num_stages=STAGES):
        start = first + turn * step
        ok = ((start + n < filled) & (start + n != guess))[:, None]
        k_at = k_base + tl.cast(start, tl.int64) * stride_kn + k_tile
        v_at = v_base + tl.cast(start, tl.int64) * stride_vn + v_tile
        k = tl.load(k_at, mask=ok & (d < D), other=0.0)
        v = tl.load(v_at, mask=ok & (e < DV), other=0.0)
        # In branches: loads of the loop itself are started turns ahead, before the wait.
        if turn == 0:
            if USE_PDL and READ_AHEAD:
                tl.extra.cuda.gdc_wait()
            # What the kernels before may have written is requested at once: a load that waits for another costs
            # a step 0.6 us a layer. So addresses follow the guess.
            position = tl.load(POSITION, volatile=True).to(tl.int32)
            row = start + at_n
            bias = bias_of(mask_at, row, row < filled, stride_mn, MASK_KIND)
            if HAS_REACH:
                end = tl.minimum(tl.load(REACH).to(tl.int32), S)
            # By head before it is compared: Triton 3.9's interpreter spreads a bool as an int.
            at_new = guess + g * 0
            inside = (at_new >= 0) & (at_new < S) & head_ok
            new_bias = bias_of(new_mask, tl.cast(guess, tl.int64), inside, stride_mn, MASK_KIND)
            cos = COS + batch * stride_cb
            sin = SIN + batch * stride_sb
            q_at = Q + batch * stride_qb
            if ONE_HEAD:
                q_row = rotated(q_at + kv_head * stride_qh, stride_qd, cos, sin, d, d < D, D // 2)
                q = tl.broadcast_to(q_row, [BLOCK_G, BLOCK_D])
            else:
                q = rotated(q_at + head[:, None] * stride_qh, stride_qd, cos, sin, d, d < D, D // 2)
            if BLOCK_G > 1 and not INTERPRET:
                q = q.to(K.dtype.element_ty)
            new_at = K_NEW + batch * stride_nb + kv_head * stride_nh
            k_new = rotated(new_at, stride_nd, cos, sin, d, d < D, D // 2).to(K.dtype.element_ty)
            new_at = V_NEW + batch * stride_wb + kv_head * stride_wh + e * stride_wd
            v_new = tl.load(new_at, mask=e < DV, other=0.0).to(V.dtype.element_ty)
        bias = tl.where(start + at_n != position, bias, float("-inf"))
        top, total, acc = _absorb(q, k, v, bias, scale, top, total, acc, INTERPRET)
        if turn + 1 < turns:
            row = start + step + at_n
            bias = bias_of(mask_at, row, row < filled, stride_mn, MASK_KIND)

    redo = 0
    if position != guess:
        # What was read is not what is there, nor all of it. Other splits may have guessed right, so each has to have
        # the blocks that it has by the number itself.
        top = tl.full([BLOCK_G], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_G], tl.float32)
        acc = tl.zeros([BLOCK_G, BLOCK_DV], tl.float32)
        filled = filled_rows(position, S, MASK_KIND)
        redo = filled
        at_new = position + g * 0
        inside = (at_new >= 0) & (at_new < S) & head_ok
        new_bias = bias_of(new_mask, tl.cast(position, tl.int64), inside, stride_mn, MASK_KIND)
    scan = tl.arange(0, SCAN)
    late = tl.arange(0, BLOCK_LATE)
    if BY_HEAD:
        scan = scan[None, :]
        at_late = late[None, :]
    else:
        at_late = late
    for begin in range(first, redo, step):
        for start in range(begin, begin + BLOCK_N, BLOCK_LATE):
            row = start + at_late
            late_bias = bias_of(mask_at, row, row < filled, stride_mn, MASK_KIND)
            late_bias = tl.where(row != position, late_bias, float("-inf"))
            row = start + late
            ok = ((row < filled) & (row != position))[:, None]
            at = tl.cast(row, tl.int64)[:, None]
            k = tl.load(k_base + at * stride_kn + d, mask=ok & (d < D), other=0.0)
            v = tl.load(v_base + at * stride_vn + e, mask=ok & (e < DV), other=0.0)
            top, total, acc = _absorb(q, k, v, late_bias, scale, top, total, acc, INTERPRET)
    # What the mask shows beyond: nothing in a causal model whose position was guessed right. To find that out costs
    # 1.4 us of 61 a LLaMA-7B layer (H200), which `reach` saves. Small blocks, so that this takes no more registers
    # than the loop above.
    end = tl.where(end == position + 1, position, end)
    for piece in range(split, tl.cdiv(end - filled, SCAN), SPLITS):
        begin = filled + piece * SCAN
        beyond = bias_of(mask_at, begin + scan, begin + scan < S, stride_mn, MASK_KIND)
        if _any(tl.where(begin + scan != position, beyond, float("-inf"))):
            for start in range(begin, begin + SCAN, BLOCK_LATE):
                row = start + at_late
                late_bias = bias_of(mask_at, row, row < S, stride_mn, MASK_KIND)
                late_bias = tl.where(row != position, late_bias, float("-inf"))
                row = start + late
                ok = ((row < S) & (row != position))[:, None]
                at = tl.cast(row, tl.int64)[:, None]
                k = tl.load(k_base + at * stride_kn + d, mask=ok & (d < D), other=0.0)
                v = tl.load(v_base + at * stride_vn + e, mask=ok & (e < DV), other=0.0)
                top, total, acc = _absorb(q, k, v, late_bias, scale, top, total, acc, INTERPRET)

    # A position outside the cache is an error in eager; a kernel cannot raise, so it writes nothing.
    if (position >= 0) & (position < S) & ((position // BLOCK_N) % SPLITS == split):
        row = tl.cast(position, tl.int64)
        tl.store(k_base + row * stride_kn + d, k_new, mask=d < D)
        tl.store(v_base + row * stride_vn + e, v_new, mask=e < DV)
        score = tl.sum(q.to(tl.float32) * k_new.to(tl.float32), axis=1) * scale + new_bias
        new_top = tl.maximum(top, score)
        pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp(score - pivot)
        shrink = tl.exp(top - pivot)
        total = total * shrink + weight
        acc = acc * shrink[:, None] + weight[:, None] * v_new.to(tl.float32)
        top = new_top

    heads = kv_heads * GROUP
    if ONE_SPLIT:
        acc = acc / tl.where(total == 0, 1.0, total)[:, None]
        out = OUT + ((batch * heads + head) * DV)[:, None] + e
        tl.store(out, acc.to(OUT.dtype.element_ty), mask=head_ok[:, None] & (e < DV))
    else:
        at = (batch * heads + head) * SPLITS + split
        tl.store(STATS + at * 2, top, mask=head_ok)
        tl.store(STATS + at * 2 + 1, total, mask=head_ok)
        some_ok = head_ok & (total != 0)  # NaN as well: it has to come out
        tl.store(PART + (at * DV)[:, None] + e, acc, mask=some_ok[:, None] & (e < DV))


@jit
def _absorb(q, k, v, bias, scale, top, total, acc, INTERPRET: tl.constexpr):
    """One block of the online softmax; q [G, D], k [N, D], v [N, Dv], bias [N] or [G, N].

    One row of fp32 needs no matrix product.
    """
    if q.shape[0] == 1:
        score = tl.sum(q * k.to(tl.float32), axis=1) * scale + bias
        new_top = tl.maximum(top, tl.max(score, axis=0))
        pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp(score - tl.max(pivot, axis=0))
        shrink = tl.exp(top - pivot)
        total = total * shrink + tl.sum(weight, axis=0)
        here = tl.sum(weight[:, None] * v.to(tl.float32), axis=0)
        acc = acc * shrink[:, None] + here[None, :]
    else:
        if INTERPRET:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        if len(bias.shape) == 1:
            bias = bias[None, :]
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + bias
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp(scores - pivot[:, None])
        shrink = tl.exp(top - pivot)
        total = total * shrink + tl.sum(weight, axis=1)
        acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return new_top, total, acc
