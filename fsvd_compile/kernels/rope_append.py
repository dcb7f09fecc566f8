"""`fsvd::rope_append`: rotary embedding of q and k, and k and v into the cache, in one kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from fsvd_compile.errors import FactorError
from fsvd_compile.kernels import _triton
from fsvd_compile.kernels._triton import (
    cdiv,
    jit,
    next_power_of_2,
    tl,
)

_LIB = torch.library.Library("fsvd", "FRAGMENT")
_LIB.define(
    "rope_append(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) k_cache, "
    "Tensor(b!) v_cache, Tensor position) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def rope_append_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The ground truth in fp32 (fp64 for fp64), not in place: (roped q, k_cache, v_cache).

    Args:
        q: `[B, Hq, M, D]`, any strides.
        k: `[B, Hkv, M, D]`, any strides.
        v: `[B, Hkv, M, Dv]`, any strides.
        cos: `[B or 1, M, D]`, in fp32 or the model's dtype.
        sin: As cos. Rotate-half convention: out = x * cos + concat(-x_2, x_1) * sin.
        k_cache: `[B, Hkv, S, D]`.
        v_cache: `[B, Hkv, S, Dv]`.
        position: int64 `[M]`, the rows of the caches that k and v go to; each at most once.

    Raises:
        FactorError: shapes or dtypes disagree. IndexError, RuntimeError: a position outside the
        cache (ATen); the Triton kernel skips such a row.
    """
    check("rope_append", q, k, v, cos, sin, k_cache, v_cache, position)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    cos, sin = cos.to(wide)[:, None], sin.to(wide)[:, None]
    k_out = k_cache.to(wide).index_copy(2, position, _rotated(k.to(wide), cos, sin))
    v_out = v_cache.to(wide).index_copy(2, position, v.to(wide))
    return _rotated(q.to(wide), cos, sin), k_out, v_out


def rope_append_aten(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: Tensor,
) -> Tensor:
    """Ropes q and k in fp32, writes k and v into the caches in place, returns q.

    Returns:
        `[B, Hq, M, D]`, a view of a contiguous `[B, M, Hq, D]`: the order in which the projection
        wrote q, so nothing is transposed on the way; for one token it is the contiguous `[B, Hq, M,
        D]` as well.
    """
    check("rope_append", q, k, v, cos, sin, k_cache, v_cache, position)
    wide = torch.promote_types(q.dtype, torch.float32)
    cos, sin = cos.to(wide).unsqueeze(1), sin.to(wide).unsqueeze(1)
    k_cache.index_copy_(2, position, _rotated(k.to(wide), cos, sin).to(k_cache.dtype))
    v_cache.index_copy_(2, position, v.to(v_cache.dtype))
    out = _rotated(q.to(wide), cos, sin).to(q.dtype)
    b, h, m, d = q.shape
    return out.transpose(1, 2).contiguous().view(b, m, h, d).transpose(1, 2)


# Which arguments the function writes, for everyone who asks what a node writes.
rope_append_aten.writes = (5, 6)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, -1)
    return x * cos + torch.cat((-x2, x1), -1) * sin


@jit
def rotated(x, stride_d, cos, sin, d, ok, HALF: tl.constexpr):
    """fp32 values of rows at `x` (shaped to broadcast with `d`), rotated: x * cos + (-x_2, x_1) * sin."""
    across = tl.where(d < HALF, d + HALF, d - HALF)
    here = tl.load(x + d * stride_d, mask=ok, other=0.0).to(tl.float32)
    there = tl.load(x + across * stride_d, mask=ok, other=0.0).to(tl.float32)
    c = tl.load(cos + d, mask=d < 2 * HALF, other=0.0).to(tl.float32)
    s = tl.load(sin + d, mask=d < 2 * HALF, other=0.0).to(tl.float32)
    return here * c + tl.where(d < HALF, -there, there) * s


@jit
def _rotate(x, cos, sin, d, ok, stride_xd, HALF: tl.constexpr):
    """The two rotated halves [heads, HALF] of the rows at `x`; `d` are the columns of one half."""
    x1 = tl.load(x + d * stride_xd, mask=ok, other=0.0).to(tl.float32)
    x2 = tl.load(x + (d + HALF) * stride_xd, mask=ok, other=0.0).to(tl.float32)
    c1 = tl.load(cos + d, mask=d < HALF, other=0.0).to(tl.float32)
    c2 = tl.load(cos + d + HALF, mask=d < HALF, other=0.0).to(tl.float32)
    s1 = tl.load(sin + d, mask=d < HALF, other=0.0).to(tl.float32)
    s2 = tl.load(sin + d + HALF, mask=d < HALF, other=0.0).to(tl.float32)
    return x1 * c1 - x2 * s1, x2 * c2 + x1 * s2


@jit
def _rope_append(
    Q,
    K,
    V,
    COS,
    SIN,
    K_CACHE,
    V_CACHE,
    POSITION,
    OUT,
    HQ,
    HKV,
    M,
    S,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_km,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vm,
    stride_vd,
    stride_cb,
    stride_cm,
    stride_sb,
    stride_sm,
    stride_kcb,
    stride_kch,
    stride_kcs,
    stride_vcb,
    stride_vch,
    stride_vcs,
    stride_p,
    HALF: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.cast(tl.program_id(0), tl.int64)
    b = token // M
    m = token % M
    block = tl.program_id(1)
    q_blocks = tl.cdiv(HQ, BLOCK_H)
    d = tl.arange(0, BLOCK_HALF)[None, :]
    cos = COS + b * stride_cb + m * stride_cm
    sin = SIN + b * stride_sb + m * stride_sm
    if block < q_blocks:
        h = tl.cast(block * BLOCK_H + tl.arange(0, BLOCK_H), tl.int64)[:, None]
        ok = (h < HQ) & (d < HALF)
        q = Q + b * stride_qb + m * stride_qm + h * stride_qh
        y1, y2 = _rotate(q, cos, sin, d, ok, stride_qd, HALF)
        out = OUT + (token * HQ + h) * (2 * HALF) + d
        tl.store(out, y1.to(OUT.dtype.element_ty), mask=ok)
        tl.store(out + HALF, y2.to(OUT.dtype.element_ty), mask=ok)
    else:
        h = tl.cast((block - q_blocks) * BLOCK_H + tl.arange(0, BLOCK_H), tl.int64)[:, None]
        position = tl.load(POSITION + m * stride_p)
        # A position outside the cache is an error in eager; a kernel cannot raise, so it writes
        # nothing.
        head_ok = h < tl.where((position >= 0) & (position < S), HKV, 0)
        ok = head_ok & (d < HALF)
        k = K + b * stride_kb + m * stride_km + h * stride_kh
        y1, y2 = _rotate(k, cos, sin, d, ok, stride_kd, HALF)
        k_out = K_CACHE + b * stride_kcb + h * stride_kch + position * stride_kcs + d
        tl.store(k_out, y1.to(K_CACHE.dtype.element_ty), mask=ok)
        tl.store(k_out + HALF, y2.to(K_CACHE.dtype.element_ty), mask=ok)
        e = tl.arange(0, BLOCK_DV)[None, :]
        v_ok = head_ok & (e < DV)
        v = V + b * stride_vb + m * stride_vm + h * stride_vh + e * stride_vd
        v_out = V_CACHE + b * stride_vcb + h * stride_vch + position * stride_vcs + e
        y = tl.load(v, mask=v_ok, other=0.0)
        tl.store(v_out, y.to(V_CACHE.dtype.element_ty), mask=v_ok)


def rope_append_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: Tensor,
    *,
    pdl: bool = False,
) -> Tensor:
    """`rope_append_aten` in one Triton kernel.

    A program owns one token and a few query heads, or a few key/value heads. A position outside the
    cache is skipped, where ATen raises.

    Args:
        pdl: Programmatic dependent launch (sm_90 and later).

    Returns:
        `[B, Hq, M, D]`, a view of a contiguous `[B, M, Hq, D]`.

    Raises:
        DeviceError: Triton is missing, or q is on a CPU without Triton's interpreter.
        FactorError: as in `rope_append_reference`; or the head dim of a cache is not contiguous.
    """
    check("rope_append", q, k, v, cos, sin, k_cache, v_cache, position)
    _triton.require_triton(q)
    check_contiguous_heads("rope_append", k_cache, v_cache)
    cos, sin = (t if t.stride(2) == 1 else t.contiguous() for t in (cos, sin))
    b, heads, m, d = q.shape
    kv_heads, dv = v.shape[1], v.shape[3]
    out = torch.empty((b, m, heads, d), dtype=q.dtype, device=q.device)
    # One token has few heads to share: more, smaller programs. Untuned.
    block_h = 2 if b * m <= 16 else 8
    if b * m > 0:
        _triton.launch(
            _rope_append,
            (b * m, cdiv(heads, block_h) + cdiv(kv_heads, block_h)),
            q.device,
            pdl,
            Q=q,
            K=k,
            V=v,
            COS=cos,
            SIN=sin,
            K_CACHE=k_cache,
            V_CACHE=v_cache,
            POSITION=position,
            OUT=out,
            HQ=heads,
            HKV=kv_heads,
            M=m,
            S=k_cache.shape[2],
            **_triton.strides("q", q, "bhmd"),
            **_triton.strides("k", k, "bhmd"),
            **_triton.strides("v", v, "bhmd"),
            stride_cb=cos.stride(0) if cos.shape[0] > 1 else 0,
            stride_cm=cos.stride(1),
            stride_sb=sin.stride(0) if sin.shape[0] > 1 else 0,
            stride_sm=sin.stride(1),
            **_triton.strides("kc", k_cache, "bhs"),
            **_triton.strides("vc", v_cache, "bhs"),
            stride_p=position.stride(0),
            HALF=d // 2,
            DV=dv,
            BLOCK_H=block_h,
            BLOCK_HALF=next_power_of_2(d // 2),
            BLOCK_DV=next_power_of_2(dv),
            num_warps=2 if block_h == 2 else 4,
        )
    return out.transpose(1, 2)


def check_contiguous_heads(op: str, k_cache: Tensor, v_cache: Tensor) -> None:
    """Raises FactorError unless the last dimension of both caches is contiguous."""
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.stride(3) != 1 and cache.shape[3] > 1:
            raise FactorError(
                f"{op}: {name} has strides {cache.stride()}; its last dimension must be contiguous."
            )


def check(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: Tensor,
) -> None:
    """Raises FactorError unless `op` can rotate and append with these operands."""
    for name, t in (("q", q), ("k", k), ("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
        if t.dim() != 4:
            raise FactorError(
                f"{op}: {name} has shape {tuple(t.shape)}; it must be [batch, heads, length, dim]."
            )
    b, _, m, d = q.shape
    heads, dv = k.shape[1], v.shape[3]
    if d % 2:
        raise FactorError(f"{op}: head dim {d} is odd; rotating halves needs an even one.")
    for name, t, want in (
        ("k", k, (b, heads, m, d)),
        ("v", v, (b, heads, m, dv)),
        ("k_cache", k_cache, (b, heads, k_cache.shape[2], d)),
        ("v_cache", v_cache, (b, heads, k_cache.shape[2], dv)),
        ("position", position, (m,)),
    ):
        if tuple(t.shape) != want:
            raise FactorError(
                f"{op}: {name} has shape {tuple(t.shape)}; q {tuple(q.shape)} and its "
                f"companions ask for {want}."
            )
    for name, t in (("cos", cos), ("sin", sin)):
        if t.dim() != 3 or tuple(t.shape[1:]) != (m, d) or t.shape[0] not in (1, b):
            raise FactorError(
                f"{op}: {name} has shape {tuple(t.shape)}; q {tuple(q.shape)} asks for "
                f"[1 or {b}, {m}, {d}]."
            )
    if position.dtype != torch.int64:
        raise FactorError(f"{op}: position is {position.dtype}; it must be torch.int64.")


def _fake(q, k, v, cos, sin, k_cache, v_cache, position):
    check("rope_append", q, k, v, cos, sin, k_cache, v_cache, position)
    b, h, m, d = q.shape
    return q.new_empty((b, m, h, d)).transpose(1, 2)


def _cuda(q, k, v, cos, sin, k_cache, v_cache, position):
    args = (q, k, v, cos, sin, k_cache, v_cache, position)
    if q.dtype not in _triton.TRITON_DTYPES:
        return rope_append_aten(*args)
    return rope_append_triton(*args, pdl=_triton.supports_pdl(q.device))


torch.library.register_fake("fsvd::rope_append", _fake, lib=_LIB)
_LIB.impl("rope_append", rope_append_aten, "CPU")
_LIB.impl("rope_append", _cuda, "CUDA")
