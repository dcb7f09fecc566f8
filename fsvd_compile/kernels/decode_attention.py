"""`fsvd::decode_attention`: one token a sequence: RoPE, append to the cache and attention over it, in one kernel.

It computes `fsvd::rope_append` and then `fsvd::attention`. Apart, the cache can be requested only after
the append has finished, and three short kernels stand one behind the other; here every program copies its
first blocks of K and V to shared memory while the projection before it still runs, and takes the new
token's row from the projection instead of from the cache.

Two kernels compute it: `_stream_attention` on compute capability 9.0 what it takes, `_decode_attention` all else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fsvd_compile.errors import FactorError
from fsvd_compile.kernels import (
    _decode_attention,
    _stream_attention,
    _triton,
    _tuning,
    attention,
    rope_append,
)

_LIB = torch.library.Library("fsvd", "FRAGMENT")
_LIB.define(
    "decode_attention(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) k_cache, "
    "Tensor(b!) v_cache, Tensor position, Tensor? mask, float scale, Tensor? reach=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def decode_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: Tensor,
    mask: Tensor | None,
    scale: float,
    reach: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The ground truth in fp32 (fp64 for fp64), not in place: (attention, k_cache, v_cache).

    Args:
        q: `[B, Hq, 1, D]`, any strides, before RoPE.
        k: `[B, Hkv, 1, D]`, any strides, before RoPE.
        v: `[B, Hkv, 1, Dv]`, any strides.
        cos: `[B or 1, 1, D]`, in fp32 or the model's dtype.
        sin: As cos; rotate-half convention, see `fsvd::rope_append`.
        k_cache: `[B, Hkv, S, D]`.
        v_cache: `[B, Hkv, S, Dv]`.
        position: int64 `[1]`, the row of the caches that k and v go to.
        mask: As for `fsvd::attention`, with one query token.
        scale: Multiplies q @ k^T.
        reach: int64 of one element, `mask_reach` of the mask: from this row on it hides everything. None: not known.

    Returns:
        `[B, Hq, 1, Dv]`, and the caches after the append.

    Raises:
        FactorError: shapes or dtypes disagree, or there is more than one token.
    """
    _check(q, k, v, cos, sin, k_cache, v_cache, position, mask, reach)
    q, keys, values = rope_append.rope_append_reference(
        q, k, v, cos, sin, k_cache, v_cache, position
    )
    return attention.attention_reference(q, keys, values, mask, scale), keys, values


def decode_attention_aten(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: Tensor,
    mask: Tensor | None,
    scale: float,
    reach: Tensor | None = None,
) -> Tensor:
    """`rope_append_aten`, then `attention_aten`: writes the caches in place, returns `[B, Hq, 1, Dv]`."""
    _check(q, k, v, cos, sin, k_cache, v_cache, position, mask, reach)
    q = rope_append.rope_append_aten(q, k, v, cos, sin, k_cache, v_cache, position)
    return attention.attention_aten(q, k_cache, v_cache, mask, scale)


def mask_reach(mask: Tensor, length: int) -> Tensor:
    """int64 scalar: one more than the last of `length` rows that a mask shows to any head of any sequence, 0 for none.

    Args:
        mask: As for `fsvd::attention`, not empty; its last dimension is `length` or 1.
    """
    shown = mask if mask.dtype == torch.bool else mask > float("-inf")
    rows = torch.arange(1, length + 1, device=mask.device)
    return torch.where(shown, rows, 0).amax()


# Which arguments the function writes, for everyone who asks what a node writes.
decode_attention_aten.writes = (5, 6)


def decode_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: Tensor,
    mask: Tensor | None,
    scale: float,
    reach: Tensor | None = None,
    *,
    pdl: bool = False,
    read_ahead: bool = False,
    splits: int | None = None,
) -> Tensor:
    """`decode_attention_aten` by split KV (flash decoding, Dao et al., 2023) and a kernel that combines the splits.

    Programs over KV split, KV head and sequence. A program copies K and V blocks ahead, as far as
    `position` says the cache is filled; what the mask shows beyond that is read late (hidden rows of a
    block that is read must be finite, as in eager). The products run on tensor cores, where rows of the
    tile that have no query head repeat the first; q is rounded to its dtype after RoPE, as in
    eager. Scores and softmax are fp32.

    Args:
        pdl: Programmatic dependent launch (sm_90 and later).
        read_ahead: Copy the first blocks before the kernels in front are complete. They may be
            many: each is launched when the one before it has started. So between whatever wrote the
            caches last and this launch there must be a kernel without dependent launch, or the
            boundary of a CUDA graph.
        splits: How many programs share one KV head; None asks `_tuning`.

    Raises:
        DeviceError: Triton is missing, or q is on a CPU without Triton's interpreter.
        FactorError: as in `decode_attention_reference`; or the head dim of a cache or table is not
            contiguous.
    """
    _check(q, k, v, cos, sin, k_cache, v_cache, position, mask, reach)
    _triton.require_triton(q)
    rope_append.check_contiguous_heads("decode_attention", k_cache, v_cache)
    cos, sin = (t if t.stride(2) == 1 else t.contiguous() for t in (cos, sin))
    b, heads, _, d = q.shape
    kv_heads, s, dv = k_cache.shape[1], k_cache.shape[2], v_cache.shape[3]
    group = heads // kv_heads
    out = torch.empty((b, 1, heads, dv), dtype=q.dtype, device=q.device)
    if out.numel() == 0 or s == 0:
        return out.zero_().transpose(1, 2)
    kind, mask = attention.mask_argument(mask, (b, heads, 1, s))
    by_head = mask is not None and group > 1 and mask.stride(1) != 0
    streamed = _stream_attention.takes(q, k_cache, v_cache, by_head)
    tile = _tuning.decode_attention_tile(
        streamed=streamed,
        batch=b,
        kv_heads=kv_heads,
        group=group,
        length=s,
        dim=max(d, dv),
        itemsize=q.element_size(),
        device=q.device,
    )
    splits = splits or tile.splits
    part, stats = attention.partial_results(out, b * heads, splits)
    grid = splits, kv_heads, b
    shared = {
        "Q": q,
        "K_NEW": k,
        "V_NEW": v,
        "COS": cos,
        "SIN": sin,
        "K": k_cache,
        "V": v_cache,
        "POSITION": position,
        "MASK": q if mask is None else mask,
        "REACH": position if reach is None else reach,
        "OUT": out,
        "PART": part,
        "STATS": stats,
        "scale": float(scale),
        "GROUP": group,
        "S": s,
        "SPLITS": splits,
        "stride_qb": q.stride(0),
        "stride_qh": q.stride(1),
        "stride_qd": q.stride(3),
        "stride_nb": k.stride(0),
        "stride_nh": k.stride(1),
        "stride_nd": k.stride(3),
        "stride_wb": v.stride(0),
        "stride_wh": v.stride(1),
        "stride_wd": v.stride(3),
        "stride_cb": cos.stride(0) if cos.shape[0] > 1 else 0,
        "stride_sb": sin.stride(0) if sin.shape[0] > 1 else 0,
        **_triton.strides("k", k_cache, "bhn"),
        **_triton.strides("v", v_cache, "bhn"),
        "stride_mb": 0 if mask is None else mask.stride(0),
        "stride_mh": 0 if mask is None else mask.stride(1),
        "stride_mn": 0 if mask is None else mask.stride(3),
        "D": d,
        "DV": dv,
        "ONE_HEAD": group == 1,
        "BLOCK_N": tile.block_n,
        "STAGES": tile.num_stages,
        "MASK_KIND": kind,
        "HAS_REACH": reach is not None,
        "ONE_SPLIT": splits == 1,
        "READ_AHEAD": pdl and read_ahead,
        "num_warps": tile.num_warps,
    }
    if streamed:
        _stream_attention.launch(shared, k_cache, v_cache, grid, pdl)
    else:
        _decode_attention.launch(shared, q, grid, by_head, pdl)
    if splits > 1:
        attention.combine(part, stats, out, kv_heads, group, 1, pdl)
    return out.transpose(1, 2)


def _check(q, k, v, cos, sin, k_cache, v_cache, position, mask, reach) -> None:
    rope_append.check("decode_attention", q, k, v, cos, sin, k_cache, v_cache, position)
    if q.shape[2] != 1:
        raise FactorError(
            f"decode_attention: q has shape {tuple(q.shape)}; it takes one token a sequence. "
            "Use rope_append and attention for more."
        )
    attention.check("decode_attention", q, k_cache, v_cache, mask)
    if reach is None:
        return
    if mask is None or reach.dtype != torch.int64 or reach.numel() != 1:
        raise FactorError(
            f"decode_attention: reach is {reach.dtype} of shape {tuple(reach.shape)} and mask "
            f"{'None' if mask is None else 'given'}; it takes `mask_reach` of the mask, one int64, or None."
        )


def _fake(q, k, v, cos, sin, k_cache, v_cache, position, mask, scale, reach=None):
    _check(q, k, v, cos, sin, k_cache, v_cache, position, mask, reach)
    b, heads, m, _ = q.shape
    return q.new_empty((b, m, heads, v.shape[3])).transpose(1, 2)


def _cuda(q, k, v, cos, sin, k_cache, v_cache, position, mask, scale, reach=None):
    args = (q, k, v, cos, sin, k_cache, v_cache, position, mask, scale, reach)
    if q.dtype not in _triton.TRITON_DTYPES:
        return decode_attention_aten(*args)
    # In a capture of our own the op stands once per cache (the pass sees to it), and a graph's end is
    # a boundary; anywhere else two steps may follow one another with nothing in between.
    return decode_attention_triton(
        *args, pdl=_triton.supports_pdl(q.device), read_ahead=_triton.in_own_capture()
    )


torch.library.register_fake("fsvd::decode_attention", _fake, lib=_LIB)
_LIB.impl("decode_attention", decode_attention_aten, "CPU")
_LIB.impl("decode_attention", _cuda, "CUDA")
