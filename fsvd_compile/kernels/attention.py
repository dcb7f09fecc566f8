"""`fsvd::attention`: grouped-query attention that reads K and V once and never repeats them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fsvd_compile.errors import FactorError
from fsvd_compile.kernels import _triton, _tuning
from fsvd_compile.kernels._triton import cdiv, jit, next_power_of_2, tl
from fsvd_compile.phase import Phase, phase_of

_LIB = torch.library.Library("fsvd", "FRAGMENT")
_LIB.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """The ground truth in fp32 (fp64 for fp64 inputs); the result is not rounded to `q.dtype`.

    Args:
        q: `[B, Hq, M, D]`, any strides.
        k: `[B, Hkv, S, D]`, any strides; Hq is a multiple of Hkv, and query head h reads h // (Hq /
            Hkv).
        v: `[B, Hkv, S, Dv]`, any strides.
        mask: None, or broadcastable to `[B, Hq, M, S]`: bool (True may attend) or floating (added
            to the scores). finfo.min is a number like any other; only False and -inf hide a
            position.
        scale: Multiplies q @ k^T.

    Returns:
        `[B, Hq, M, Dv]`; a row that sees nothing is 0, as in `F.scaled_dot_product_attention` on a
        CPU. (On CUDA, torch's memory-efficient kernel gives such a row finite values of its own
        when the mask is bool; in prefill the op is that kernel.)

    Raises:
        FactorError: shapes or dtypes disagree.
    """
    check("attention", q, k, v, mask)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[1] // k.shape[1]
    k, v = (t.to(wide).repeat_interleave(group, 1) for t in (k, v))
    scores = q.to(wide) @ k.transpose(-1, -2) * scale
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        scores = scores + mask.to(wide)
    hidden = (scores == float("-inf")).all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(hidden, 0), -1).masked_fill(hidden, 0) @ v


def attention_aten(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    *,
    any_length: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention`, the query heads of a group folded into the query length.

    K and V are passed as they are. The mask is copied only where its rows differ by token or head
    (then it grows by the group); the usual decode mask `[B, 1, 1, S]` is passed as it is.

    Args:
        any_length: The call may have other lengths next time, see `sdpa_of_any_length`; so has one of symbolic sizes.

    Returns:
        `[B, Hq, M, Dv]`, a view of a contiguous `[B, M, Hq, Dv]`.
    """
    check("attention", q, k, v, mask)
    b, heads, m, d = q.shape
    kv_heads, dv = k.shape[1], v.shape[3]
    group = heads // kv_heads
    if mask is not None:
        mask = _typed_mask(_folded_mask(mask, group, m, k.shape[2]), q)
    if group > 1:
        q = q.reshape(b, kv_heads, group * m, d)
    any_length = any_length or not all(isinstance(size, int) for size in (*q.shape, *k.shape))
    attend = sdpa_of_any_length if any_length else F.scaled_dot_product_attention
    out = attend(q, k, v, attn_mask=mask, scale=scale)
    out = out.reshape(b, heads, m, dv).transpose(1, 2)
    return out.contiguous().view(b, m, heads, dv).transpose(1, 2)


def sdpa_of_any_length(*args: Any, **kwargs: Any) -> Tensor:
    """`F.scaled_dot_product_attention` by flash or memory-efficient attention where torch would take cuDNN.

    cuDNN is what torch prefers on compute capability 9.0, and it plans anew for every length of the keys: 40 ms a
    decode step of any model whose KV cache grows (H200, torch 2.11, bench/NOTES.md). torch's switch is one for all
    threads, so another one's attention may miss cuDNN while this function chooses.
    """
    backends = torch.backends.cuda
    others = backends.flash_sdp_enabled() or backends.mem_efficient_sdp_enabled()
    if not (others and backends.cudnn_sdp_enabled()):
        return F.scaled_dot_product_attention(*args, **kwargs)
    backends.enable_cudnn_sdp(False)
    try:
        return F.scaled_dot_product_attention(*args, **kwargs)
    finally:
        backends.enable_cudnn_sdp(True)


def _folded_mask(mask: Tensor, group: int, m: int, s: int) -> Tensor:
    while mask.dim() < 4:
        mask = mask.unsqueeze(0)
    if mask.shape[3] != s:
        mask = mask.expand(-1, -1, -1, s)
    if group == 1 or (mask.shape[1] == 1 and mask.shape[2] == 1):
        return mask
    b, h = mask.shape[:2]
    mask = mask.unflatten(1, (h // group, group)) if h > 1 else mask.unsqueeze(2)
    return mask.expand(-1, -1, group, m, -1).reshape(b, -1, group * m, s)


def _typed_mask(mask: Tensor, q: Tensor) -> Tensor:
    """A dtype that SDPA takes beside q: bool, q's own, and on a CPU also fp32.

    Narrowing fp32 keeps finfo.min finite: the plain cast to bf16 or fp16 makes it -inf, which hides
    a row.
    """
    if mask.dtype in (torch.bool, q.dtype):
        return mask
    wide = torch.promote_types(mask.dtype, torch.float32)
    if q.device.type == "cpu" and wide == torch.float32 and q.dtype != torch.float64:
        return mask.to(wide)
    mask = mask.to(wide)
    least = torch.finfo(q.dtype).min
    return torch.where(mask == float("-inf"), mask, mask.clamp(min=least)).to(q.dtype)


@jit
def _attention(
    Q,
    K,
    V,
    MASK,
    OUT,
    PART,
    STATS,
    scale,
    GROUP,
    M,
    S,
    SPLITS,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_vd,
    stride_mb,
    stride_mh,
    stride_mm,
    stride_mn,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    MASK_KIND: tl.constexpr,
    ONE_SPLIT: tl.constexpr,
    MOST_TURNS: tl.constexpr,
    INTERPRET: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        # K and V were written by the kernel before this one: nothing here is static.
        tl.extra.cuda.gdc_wait()
    split = tl.program_id(0) % SPLITS
    tile = tl.program_id(0) // SPLITS
    kv_head = tl.cast(tl.program_id(1), tl.int64)
    batch = tl.cast(tl.program_id(2), tl.int64)
    kv_heads = tl.num_programs(1)

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = row < GROUP * M
    head = kv_head * GROUP + row // M
    m = tl.cast(row % M, tl.int64)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_DV)
    scale = tl.cast(scale, tl.float32)

    q_at = Q + batch * stride_qb + (head * stride_qh + m * stride_qm)[:, None]
    q = tl.load(q_at + (d * stride_qd)[None, :], mask=row_ok[:, None] & (d < D)[None, :], other=0.0)
    # The interpreter holds bf16 as raw 16-bit integers and would multiply those.
    if INTERPRET:
        q = q.to(tl.float32)
    k_base = K + batch * stride_kb + kv_head * stride_kh
    v_base = V + batch * stride_vb + kv_head * stride_vh
    k_tile = (d * stride_kd)[:, None] + (n * stride_kn)[None, :]
    v_tile = (n * stride_vn)[:, None] + (e * stride_vd)[None, :]
    if MASK_KIND != "none":
        mask_rows = MASK + batch * stride_mb + (head * stride_mh + m * stride_mm)[:, None]

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    # Splits take turns at the blocks: in a long cache of which little is filled, all of them get a
    # share.
    turns = tl.cdiv(tl.cdiv(S, BLOCK_N) - split, SPLITS)
    # Triton 3.6's interpreter cannot loop to a run-time bound under numpy 2.4; a turn too many sees
    # nothing.
    for turn in range(0, MOST_TURNS if INTERPRET else turns):
        start = tl.cast((split + turn * SPLITS) * BLOCK_N, tl.int64)
        here = (start + n) < S
        if MASK_KIND == "none":
            k = tl.load(
                k_base + start * stride_kn + k_tile,
                mask=(d < D)[:, None] & here[None, :],
                other=0.0,
            )
            v = tl.load(
                v_base + start * stride_vn + v_tile,
                mask=here[:, None] & (e < DV)[None, :],
                other=0.0,
            )
            bias = tl.where(here, 0.0, float("-inf"))[None, :]
            top, total, acc = _absorb(q, k, v, bias, scale, top, total, acc, INTERPRET)
        else:
            seen = row_ok[:, None] & here[None, :]
            mask_at = mask_rows + ((start + n) * stride_mn)[None, :]
            if MASK_KIND == "bool":
                seen = seen & (tl.load(mask_at, mask=seen, other=0) != 0)
                bias = tl.where(seen, 0.0, float("-inf"))
            else:
                bias = tl.load(mask_at, mask=seen, other=float("-inf")).to(tl.float32)
                seen = bias > float("-inf")
            if tl.max(tl.max(seen.to(tl.int32), axis=1), axis=0) > 0:
                k = tl.load(
                    k_base + start * stride_kn + k_tile,
                    mask=(d < D)[:, None] & here[None, :],
                    other=0.0,
                )
                v = tl.load(
                    v_base + start * stride_vn + v_tile,
                    mask=here[:, None] & (e < DV)[None, :],
                    other=0.0,
                )
                top, total, acc = _absorb(q, k, v, bias, scale, top, total, acc, INTERPRET)

    # [B, Hkv, G * M]: the rows of the partial results
    flat = (batch * kv_heads + kv_head) * (GROUP * M) + row
    if ONE_SPLIT:
        acc = acc / tl.where(total == 0, 1.0, total)[:, None]
        heads = kv_heads * GROUP
        out = OUT + (((batch * M + m) * heads + head) * DV)[:, None] + e[None, :]
        tl.store(out, acc.to(OUT.dtype.element_ty), mask=row_ok[:, None] & (e < DV)[None, :])
    else:
        at = flat * SPLITS + split
        tl.store(STATS + at * 2, top, mask=row_ok)
        tl.store(STATS + at * 2 + 1, total, mask=row_ok)
        some = row_ok & (total != 0)  # NaN as well: it has to come out
        tl.store(
            PART + (at * DV)[:, None] + e[None, :], acc, mask=some[:, None] & (e < DV)[None, :]
        )


@jit
def bias_of(mask_at, row, seen, stride_n, MASK_KIND: tl.constexpr):
    """fp32 to add to the scores of rows `row` of a cache, [N] or [G, N] as `mask_at`; -inf where hidden or not `seen`.

    The row that is being written is left to the caller: its number arrives with what is read here, not before.
    """
    at = mask_at + row * stride_n
    if MASK_KIND == "float":
        return tl.load(at, mask=seen, other=float("-inf")).to(tl.float32)
    else:
        if MASK_KIND == "bool":
            seen = seen & (tl.load(at, mask=seen, other=0) != 0)
        return tl.where(seen, 0.0, float("-inf"))


@jit
def filled_rows(position, S, MASK_KIND: tl.constexpr):
    """How many rows of a cache lie in front of `position`; all of them where no mask may hide any."""
    filled = S
    if MASK_KIND != "none":
        filled = tl.minimum(tl.maximum(position, 0), S)
    return filled


@jit
def _absorb(q, k, v, bias, scale, top, total, acc, INTERPRET: tl.constexpr):
    """One block of the online softmax; k [D, N], v [N, Dv], bias is -inf where hidden."""
    if INTERPRET:
        k = k.to(tl.float32)
        v = v.to(tl.float32)
    # Natural exponents, not exp2: finfo.min times log2(e) would be -inf and hide what it must not.
    scores = tl.dot(q, k, input_precision="ieee") * scale + bias
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
    weight = tl.exp(scores - pivot[:, None])
    shrink = tl.exp(top - pivot)
    total = total * shrink + tl.sum(weight, axis=1)
    acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return new_top, total, acc


@jit
def _combine(
    PART,
    STATS,
    OUT,
    GROUP,
    M,
    KV_HEADS,
    SPLITS,
    DV: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    flat = tl.cast(tl.program_id(0), tl.int64)
    row = flat % (GROUP * M)
    kv_head = flat // (GROUP * M) % KV_HEADS
    batch = flat // (GROUP * M) // KV_HEADS
    s = tl.arange(0, BLOCK_S)
    e = tl.program_id(1) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    at = flat * SPLITS + s
    top = tl.load(STATS + at * 2, mask=s < SPLITS, other=float("-inf"))
    total = tl.load(STATS + at * 2 + 1, mask=s < SPLITS, other=0.0)
    # At once with the two above, not when they have come.
    part = tl.load(
        PART + (at * DV)[:, None] + e[None, :],
        mask=(s < SPLITS)[:, None] & (e < DV)[None, :],
        other=0.0,
    )
    # A split that saw nothing stored no partial result.
    some = total != 0
    part = tl.where(some[:, None], part, 0.0)
    pivot = tl.max(top, axis=0)
    weight = tl.where(some, tl.exp(top - tl.where(pivot == float("-inf"), 0.0, pivot)), 0.0)
    norm = tl.sum(total * weight, axis=0)
    y = tl.sum(part * weight[:, None], axis=0) / tl.where(norm == 0, 1.0, norm)
    head = kv_head * GROUP + row // M
    out = OUT + ((batch * M + row % M) * (KV_HEADS * GROUP) + head) * DV + e
    tl.store(out, y.to(OUT.dtype.element_ty), mask=e < DV)


def attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    *,
    pdl: bool = False,
    splits: int | None = None,
) -> Tensor:
    """`attention_reference` in q's dtype by a split-KV kernel. Its tiles are not tuned.

    Flash decoding (Dao et al., 2023): programs over batch, KV head and KV split, all query rows of
    the KV head (group times tokens) in one tile of up to 64, and a second kernel that combines the
    splits; with one split there is none. Blocks hidden from every row of the tile are skipped
    before their K and V are read, so a long static cache costs its mask and what it holds; within a
    block that any row sees, hidden rows of K and V are read and must be finite, as in eager. Scores
    and softmax are fp32; the weights are rounded to v's dtype for the second product.

    Args:
        pdl: Programmatic dependent launch (sm_90 and later).
        splits: How many programs share one KV head; None asks `_tuning`.

    Raises:
        DeviceError: Triton is missing, or q is on a CPU without Triton's interpreter.
        FactorError: as in `attention_reference`.
    """
    check("attention", q, k, v, mask)
    _triton.require_triton(q)
    b, heads, m, d = q.shape
    kv_heads, s, dv = k.shape[1], k.shape[2], v.shape[3]
    group = heads // kv_heads
    out = torch.empty((b, m, heads, dv), dtype=q.dtype, device=q.device)
    if out.numel() == 0 or s == 0:
        return out.zero_().transpose(1, 2)
    tile = _tuning.attention_tile(
        batch=b,
        kv_heads=kv_heads,
        rows=group * m,
        length=s,
        dim=max(d, dv),
        itemsize=q.element_size(),
        device=q.device,
    )
    splits = splits or tile.splits
    part, stats = partial_results(out, b * heads * m, splits)
    kind, mask = mask_argument(mask, (b, heads, m, s))
    interpreted = _triton.interpreted()
    _triton.launch(
        _attention,
        (splits * cdiv(group * m, tile.block_m), kv_heads, b),
        q.device,
        pdl,
        Q=q,
        K=k,
        V=v,
        MASK=q if mask is None else mask,
        OUT=out,
        PART=part,
        STATS=stats,
        scale=float(scale),
        GROUP=group,
        M=m,
        S=s,
        SPLITS=splits,
        **_triton.strides("q", q, "bhmd"),
        **_triton.strides("k", k, "bhnd"),
        **_triton.strides("v", v, "bhnd"),
        **_triton.strides("m", q if mask is None else mask, "bhmn"),
        D=d,
        DV=dv,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_D=max(16, next_power_of_2(d)),
        BLOCK_DV=max(16, next_power_of_2(dv)),
        MASK_KIND=kind,
        ONE_SPLIT=splits == 1,
        MOST_TURNS=cdiv(cdiv(s, tile.block_n), splits) if interpreted else 0,
        INTERPRET=interpreted,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if splits > 1:
        combine(part, stats, out, kv_heads, group, m, pdl)
    return out.transpose(1, 2)


def mask_argument(mask: Tensor | None, shape: tuple[int, ...]) -> tuple[str, Tensor | None]:
    """(kind, mask) as the kernels take them: "none", "bool" (bytes) or "float", expanded to `shape`."""
    if mask is None:
        return "none", None
    mask = _triton.near(mask).expand(shape)
    return ("bool", mask.view(torch.uint8)) if mask.dtype == torch.bool else ("float", mask)


def partial_results(out: Tensor, rows: int, splits: int) -> tuple[Tensor, Tensor]:
    """fp32 `[rows, splits, Dv]` and (largest score, sum of weights) `[rows, splits, 2]`; `out` for one split."""
    if splits == 1:
        return out, out
    make = {"dtype": torch.float32, "device": out.device}
    return torch.empty((rows, splits, out.shape[3]), **make), torch.empty((rows, splits, 2), **make)


def combine(
    part: Tensor, stats: Tensor, out: Tensor, kv_heads: int, group: int, m: int, pdl: bool
) -> None:
    """Fills `out` `[B, M, Hq, Dv]` with the splits' results, in proportion to their softmax sums."""
    rows, splits, dv = part.shape
    columns = min(64, next_power_of_2(dv))
    _triton.launch(
        _combine,
        (rows, cdiv(dv, columns)),
        out.device,
        pdl,
        PART=part,
        STATS=stats,
        OUT=out,
        GROUP=group,
        M=m,
        KV_HEADS=kv_heads,
        SPLITS=splits,
        DV=dv,
        BLOCK_S=next_power_of_2(splits),
        BLOCK_DV=columns,
        # 64 columns by one warp: 13.0 us for 16 splits of 128 with the attention in front, 13.2 for 33, 5.5 for 8 of a
        # LLaMA-7B layer; all 128 by one to four warps 13.3, 13.9 and 5.9, 32 columns 12.5, 13.2 and 5.7 (H200).
        num_warps=1 if splits <= 32 else 2,
    )


def check(op: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    """Raises FactorError unless `op` can attend with these operands."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 4:
            raise FactorError(
                f"{op}: {name} has shape {tuple(t.shape)}; it must be [batch, heads, length, dim]."
            )
        if t.dtype != q.dtype:
            raise FactorError(
                f"{op}: {name} is {t.dtype} and q is {q.dtype}; cast one to the other first."
            )
    b, heads, m, d = q.shape
    kv_heads, s = k.shape[1], k.shape[2]
    if k.shape[0] != b or k.shape[3] != d:
        raise FactorError(
            f"{op}: k has shape {tuple(k.shape)}; "
            f"q {tuple(q.shape)} asks for [{b}, heads, length, {d}]."
        )
    if tuple(v.shape[:3]) != tuple(k.shape[:3]):
        raise FactorError(
            f"{op}: v has shape {tuple(v.shape)}; "
            f"k {tuple(k.shape)} asks for [{b}, {kv_heads}, {s}, any]."
        )
    if kv_heads == 0 or heads % kv_heads:
        raise FactorError(
            f"{op}: {heads} query heads cannot share {kv_heads} key heads evenly; "
            "the query heads must be a multiple."
        )
    if mask is None:
        return
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise FactorError(f"{op}: mask is {mask.dtype}; it must be bool or floating.")
    want = (b, heads, m, s)
    if mask.dim() > 4 or any(
        have != 1 and have != full
        for have, full in zip(reversed(mask.shape), reversed(want), strict=False)
    ):
        raise FactorError(f"{op}: mask has shape {tuple(mask.shape)}; it must broadcast to {want}.")


def _fake(q, k, v, mask, scale):
    check("attention", q, k, v, mask)
    b, heads, m, _ = q.shape
    return q.new_empty((b, m, heads, v.shape[3])).transpose(1, 2)


def _cuda(q, k, v, mask, scale):
    if phase_of(q.shape[2]) is Phase.PREFILL or q.dtype not in _triton.TRITON_DTYPES:
        # Of a graph of fixed sizes, prefill was lowered to ATen.
        return attention_aten(q, k, v, mask, scale, any_length=True)
    return attention_triton(q, k, v, mask, scale, pdl=_triton.supports_pdl(q.device))


torch.library.register_fake("fsvd::attention", _fake, lib=_LIB)
_LIB.impl("attention", attention_aten, "CPU")
_LIB.impl("attention", _cuda, "CUDA")
