"""Tile sizes: a measured row where there is one near, a rule elsewhere; no GPU is needed to ask.

`configs/sm90.json` holds what was measured, with its provenance. A row counts for the same op,
number of tokens and element size, for weights stored K-contiguous, with K within a factor of 1.5 of
it and rows within a factor of 2; the nearest by the sum of the two log-distances wins. Everything
else, and every other GPU, takes the rules below. They are not tuned: they follow the measured rows
in shape (about 64 registers of weight requested per thread, at least two programs per
multiprocessor) and wait for measurements.
"""

from __future__ import annotations

import functools
import json
import math
from importlib import resources
from typing import NamedTuple

import torch

from fsvd_compile.kernels import _triton
from fsvd_compile.kernels._triton import cdiv, next_power_of_2
from fsvd_compile.phase import Phase


class Tile(NamedTuple):
    """Block sizes of one launch: `block_m` tokens by `block_r` weight rows, `split` times `block_k` at a time."""

    block_r: int
    block_k: int
    num_warps: int
    block_m: int = 1
    num_stages: int = 1
    split: int = 1


# Whole rows up to this K are requested at once; longer ones loop. 16384 covers the 11008 that was
# measured.
SINGLE_TILE_K = 16384
# Bytes of weight a thread requests before it waits: 64 registers, what the measured tiles come to.
THREAD_BYTES = 256


@functools.lru_cache(4096)
def linear_tile(
    op: str,
    phase: Phase,
    *,
    k: int,
    rows: int,
    tokens: int,
    itemsize: int,
    layout: str,
    gated: bool,
    device: torch.device,
) -> Tile:
    """The tile for a launch of `rows` weight rows (of gate alone when gated) of length `k`."""
    if phase is not Phase.DECODE:
        return _skinny_rule(op, tokens, itemsize, gated, _triton.shared_memory(device))
    whole = layout == "row" and k <= SINGLE_TILE_K
    # Two tokens of a gated pair are four accumulators; in a loop over K those made the LLVM of
    # Triton 3.6 abort, so there each token has its own program.
    tokens = 1 if gated and not whole else min(tokens, 2)
    if whole and _triton.capability(device) == (9, 0):
        # What was measured is the packed gate-up: a gated program takes half its rows from each of
        # the two.
        both = 2 if gated else 1
        row = _nearest(op, k, rows * both, tokens, itemsize)
        if row is not None:
            block_r = max(1, row["block_r"] // both)
            return Tile(block_r, max(16, next_power_of_2(k)), row["num_warps"], tokens)
    return _gemv_rule(k, rows, tokens, itemsize, layout, gated, _triton.multiprocessors(device))


def _gemv_rule(k, rows, tokens, itemsize, layout, gated, sms) -> Tile:
    budget = THREAD_BYTES // itemsize // (2 if gated else 1) // tokens
    if layout != "row":
        # Neighbours in memory are neighbouring rows: 16 of them fill a 32-byte sector in bf16.
        return Tile(block_r=16, block_k=128 // tokens, num_warps=4, block_m=tokens)
    block_k = max(16, next_power_of_2(k))
    if block_k > SINGLE_TILE_K:
        return Tile(block_r=4 // tokens, block_k=1024, num_warps=4, block_m=tokens)
    num_warps = 2 if block_k <= 1024 else 4 if block_k <= 2048 else 8
    while block_k > budget * 32 * num_warps:
        num_warps *= 2
    block_r = max(1, min(8, budget * 32 * num_warps // block_k))
    while block_r > 1 and cdiv(rows, block_r) < 2 * sms:
        block_r //= 2
    return Tile(block_r, block_k, num_warps, tokens)


def _skinny_rule(op, tokens, itemsize, gated, shared) -> Tile:
    """One tile for all shapes of an op.

    The best by the sum over the linears of a LLaMA-7B layer at keep 0.5, of 8 and of 32 tokens, on an H200: 89 and
    113 us a layer, 10 and 16 above what the best tile of each would take, 99 and 107 with cuBLAS without its
    kernels for gate, residual and norm (`python bench/tune_few.py`, bench/results/tune_few_h200.json). Other
    GPUs were not measured.
    """
    block_m = min(64, max(16, next_power_of_2(tokens)))
    if itemsize != 2:
        block_r, split, block_k, num_stages = 16, 4, 16, 3
    elif block_m == 64:
        block_r, split, block_k, num_stages = 16, 4, 64, 4  # twice the K spills
    elif op == "shrink":
        block_r, split, block_k, num_stages = 16, 4, 128, 4
    elif gated:
        block_r, split, block_k, num_stages = 32, 2, 64, 3
    else:
        block_r, split, block_k, num_stages = 16, 2, 128, 5
    # A stage, of which one is in registers, holds a tile of x and one of W, both twice when gated.
    column = (block_m + block_r) * split * itemsize * (2 if gated else 1)
    while block_k > 16 and column * block_k * (num_stages - 1) > shared - 4096:
        block_k //= 2
    # Two warps a slice for the registers of multiply-adds without tensor cores.
    num_warps = 2 * split if itemsize != 2 and gated else split
    return Tile(block_r, block_k, num_warps, block_m, num_stages, split)


def _nearest(op, k, rows, tokens, itemsize) -> dict | None:
    best, least = None, math.inf
    for row in measured()["gemv"]:
        if (row["op"], row["tokens"], row["itemsize"]) != (op, tokens, itemsize):
            continue
        by_k = abs(math.log2(max(k, 1) / row["k"]))
        by_rows = abs(math.log2(max(rows, 1) / row["rows"]))
        # A tile for a shorter power of two would need more registers than were measured.
        fits = next_power_of_2(k) <= next_power_of_2(row["k"])
        if fits and by_k <= math.log2(1.5) and by_rows <= 1 and by_k + by_rows < least:
            best, least = row, by_k + by_rows
    return best


@functools.cache
def measured() -> dict:
    """`configs/sm90.json`."""
    path = resources.files("fsvd_compile.kernels").joinpath("configs/sm90.json")
    return json.loads(path.read_text())


class AttentionTile(NamedTuple):
    """Block sizes and the number of KV splits of one attention launch."""

    block_m: int
    block_n: int
    splits: int
    num_warps: int
    num_stages: int


@functools.lru_cache(4096)
def attention_tile(
    *,
    batch: int,
    kv_heads: int,
    rows: int,
    length: int,
    dim: int,
    itemsize: int,
    device: torch.device,
) -> AttentionTile:
    """An untuned default: two programs per multiprocessor, at least 128 tokens of cache in each.

    Args:
        rows: Query rows of one KV head, group times tokens.
        length: S, the length of the cache, filled or not.
        dim: The wider of the two head dims.
    """
    block_m = min(64, max(16, next_power_of_2(rows)))
    # What fits in registers beside the tile of K and V that is being read: 64 rows of 256 aligned
    # bytes.
    block_n = 64 if dim * itemsize <= 256 and dim % 8 == 0 else 32 if itemsize == 2 else 16
    programs = batch * kv_heads * cdiv(rows, block_m)
    wanted = cdiv(2 * _triton.multiprocessors(device), programs)
    splits = max(1, min(wanted, cdiv(length, 128), 64))
    wide = itemsize == 4 or block_m == 64 or dim % 8 != 0
    return AttentionTile(block_m, block_n, splits, num_warps=8 if wide else 4, num_stages=2)


@functools.lru_cache(4096)
def decode_attention_tile(
    *,
    batch: int,
    kv_heads: int,
    group: int,
    length: int,
    dim: int,
    itemsize: int,
    device: torch.device,
) -> AttentionTile:
    """Programs that are all side by side: one more would wait for the first to end.

    On an H200 in bf16, LLaMA-7B with 512 tokens in a cache of 1024, a whole layer: 8 splits of 32 rows and four
    warps 65.3 us, 12 such 66.0, 8 of 64 rows 70.8, two warps a program 67.7. For 8 KV heads of four query heads
    over 8192 tokens, the kernel and its combine alone: 32 splits of 64 rows 16.7 us (7.4 at the read limit), 16
    such 20.9, 48 such 18.1, 32 of 32 rows 20.4. For 8 sequences of 32 heads with 512 tokens: no split 26.5 us,
    two splits 28.2.

    Args:
        group: Query heads of one KV head.
        length: S, the length of the cache, filled or not.
        dim: The wider of the two head dims.
    """
    narrow = dim * itemsize <= 256 and dim % 8 == 0
    block_n = 16 if not narrow else 32 if group == 1 else 64
    wanted = 2 * _triton.multiprocessors(device) // (batch * kv_heads)
    splits = max(1, min(wanted, cdiv(length, block_n), 64))
    return AttentionTile(1, block_n, splits, num_warps=4 if narrow else 8, num_stages=3)
