"""Tile sizes: a measured row where there is one near, a rule elsewhere; no GPU is needed to ask.

The rows are those of `_measured`, for weights stored K-contiguous. Everything else, and every GPU that was not measured
(8.0, 8.9, 10.0, 12.0), takes the rules below. They follow the measured rows of an H200 in shape: about 64 registers of
weight requested per thread, at least two programs per multiprocessor.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from fsvd_compile.kernels import _measured, _stream, _stream_few, _triton
from fsvd_compile.kernels._triton import cdiv, next_power_of_2


class Tile(NamedTuple):
    """Block sizes of one launch.

    `block_m` tokens by `block_r` weight rows, `split` times `block_k` columns at a time, `num_stages` such blocks on
    their way.
    """

    block_r: int
    block_k: int
    num_warps: int
    block_m: int = 1
    num_stages: int = 1
    split: int = 1


class Launch(NamedTuple):
    """What the tile of a launch depends on.

    Attributes:
        op: "shrink" or "expand".
        kernel: "gemv", "stream", "few" or "skinny".
        k: Length of the longest weight row.
        rows: Weight rows; of gate alone when gated.
        tokens: M.
        itemsize: Bytes of an element.
        layout: As `_linear.layout_of` names it.
        gated: Whether gate and up are multiplied.
        vector: Elements of a load where rows start anywhere between two multiples of 16 bytes (see
            `_linear`), else 1.
        norm: Whether x is normalized by the kernel, of those to which it matters ("stream" and "few").
        carry: Whether RMSNorm behind it is carried ("few").
    """

    op: str
    kernel: str
    k: int
    rows: int
    tokens: int
    itemsize: int
    layout: str = "row"
    gated: bool = False
    vector: int = 1
    norm: bool = False
    carry: bool = False

    @property
    def block_k(self) -> int:
        """What holds a whole row, its distance from a multiple of 16 bytes included."""
        return max(16, next_power_of_2(self.k + self.vector - 1))

    @property
    def block_m(self) -> int:
        """Tokens of a `_skinny` or `_stream_few` program."""
        return min(64, max(8 if self.kernel == "few" else 16, next_power_of_2(self.tokens)))


# Whole rows up to this K are requested at once; longer ones loop. 16384 covers the 11008 that was
# measured.
SINGLE_TILE_K = 16384
# Bytes of weight a thread requests before it waits: 64 registers, what the measured tiles come to.
THREAD_BYTES = 256

# Another one each time that tables may have changed.
generation = 0

_asked: list[Launch] | None = None
_forced: Tile | Callable[[Launch], Tile] | None = None


@contextlib.contextmanager
def forced(tile: Tile | Callable[[Launch], Tile]) -> Iterator[None]:
    """Every linear takes this tile, or what it says of its launch, to time it."""
    global _forced
    before, _forced = _forced, tile
    try:
        yield
    finally:
        _forced = before


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collects what tiles are asked for, each once."""
    global _asked
    before, _asked = _asked, []
    try:
        yield _asked
    finally:
        _asked = before


def linear_tile(launch: Launch, device: torch.device) -> Tile:
    """The tile for a launch."""
    if _asked is not None and launch not in _asked:
        _asked.append(launch)
    if _forced is not None:
        return _forced(launch) if callable(_forced) else _forced
    return _linear_tile(launch, device)


def settled() -> bool:
    """Whether a launch takes the tile that the tables and rules say, and nobody is told of it."""
    return _asked is None and _forced is None


def forget() -> None:
    """Looks at the tables again."""
    global generation
    _measured.measured.cache_clear()
    _linear_tile.cache_clear()
    generation += 1


@functools.lru_cache(4096)
def _linear_tile(launch: Launch, device: torch.device) -> Tile:
    row = None
    capability = _triton.capability(device)
    whole = launch.layout == "row" and launch.block_k <= SINGLE_TILE_K
    if launch.kernel == "skinny":
        if capability is not None and launch.layout == "row":
            row = _measured.nearest(launch, launch.block_m, capability)
        shared = _triton.shared_memory(device)
        if row is None:
            return _skinny_rule(launch, shared)
        # A GPU of the same capability with less shared memory takes a shorter tile than was measured.
        found = (row[name] for name in _measured.TILES["skinny"])
        return _skinny(launch, *found, shared)
    if launch.kernel in ("stream", "few"):
        few = launch.kernel == "few"
        if capability is not None:
            row = _measured.nearest(launch, launch.block_m if few else 1, capability)
        found = [] if row is None else [[row[name] for name in _measured.TILES[launch.kernel]]]
        return (_few_tile if few else _stream_tile)(launch, found, device)
    # Two tokens of a gated pair are four accumulators; in a loop over K those made the LLVM of
    # Triton 3.6 abort, so there each token has its own program.
    tokens = 1 if launch.gated and not whole else min(launch.tokens, 2)
    if whole and capability is not None:
        row = _measured.nearest(launch, tokens, capability)
    if row is None:
        return _gemv_rule(launch, tokens, _triton.multiprocessors(device))
    return Tile(row["block_r"], launch.block_k, row["num_warps"], tokens)


def _gemv_rule(launch: Launch, tokens: int, sms: int) -> Tile:
    budget = THREAD_BYTES // launch.itemsize // (2 if launch.gated else 1) // tokens
    if launch.layout != "row":
        # Neighbours in memory are neighbouring rows: 16 of them fill a 32-byte sector in bf16.
        return Tile(block_r=16, block_k=128 // tokens, num_warps=4, block_m=tokens)
    block_k = launch.block_k
    if block_k > SINGLE_TILE_K:
        return Tile(block_r=4 // tokens, block_k=1024, num_warps=4, block_m=tokens)
    num_warps = 2 if block_k <= 1024 else 4 if block_k <= 2048 else 8
    while block_k > budget * 32 * num_warps:
        num_warps *= 2
    block_r = max(1, min(8, budget * 32 * num_warps // block_k))
    while block_r > 1 and cdiv(launch.rows, block_r) < 2 * sms:
        block_r //= 2
    return Tile(block_r, block_k, num_warps, tokens)


def _stream_tile(launch: Launch, measured: list[list[int]], device: torch.device) -> Tile:
    """The measured (rows, columns, warps, stages) where they fit, or 48 KB of weights on their way a program."""
    halves = 2 if launch.gated else 1
    block_r = 8 // halves if cdiv(launch.rows, 8) >= 2 * _triton.multiprocessors(device) else 4
    block_k = 512 if launch.k > 1024 else 256
    rule = [block_r, block_k, 4, max(1, 48 * 1024 // (2 * block_r * block_k * halves))]

    def used(tile: Tile) -> int:
        return _stream.shared_bytes(
            launch.k + launch.vector - 1,
            tile.block_r,
            tile.block_k,
            tile.num_stages,
            launch.gated,
            launch.norm,
        )

    return _fitting(launch, [*measured, rule], 1, used, device)


def _few_tile(launch: Launch, measured: list[list[int]], device: torch.device) -> Tile:
    """The measured (rows, columns, warps, stages) where they fit, or two blocks and 64 KB on their way a program.

    x is read once a program, so there are more rows than tokens in one where that leaves two to a multiprocessor:
    32000 rows of 4096, 32 tokens: 69.8 us with 64 rows, 77.4 with 16; 8 tokens: 63.1 with 16, 63.9 with 32 (H200).
    """
    halves = 2 if launch.gated else 1
    block_r = 32 if launch.gated else 16
    most = launch.rows // (2 * _triton.multiprocessors(device))
    # A warp keeps the sums of all rows and tokens, of gate and of up: 128 registers a thread at most.
    most = min(most, 4096 // launch.block_m // halves)
    while block_r < 2 * launch.block_m and 2 * block_r <= most:
        block_r *= 2
    block_k = 128 if launch.gated or block_r > 32 else 256
    if launch.gated and launch.block_m > 8:
        # Warps that divide rows hold half as many sums: gate and up of LLaMA-7B for 32 tokens take 2.6 us less of a
        # layer, 3.9 with the tile of the table (H200).
        block_k = 64
    column = 2 * (block_r + launch.block_m) * halves
    rule = [block_r, block_k, 2, max(2, 64 * 1024 // (column * block_k))]

    def used(tile: Tile) -> int:
        return _stream_few.shared_bytes(
            tile.block_r,
            tile.block_k,
            tile.block_m,
            tile.num_warps,
            tile.num_stages,
            launch.gated,
            launch.k if launch.norm else 0,
        )

    choices = [*measured, rule, [16, 128, 2, 1]]
    if launch.norm:
        # Every warp has columns of its own, of which it squares x.
        choices = [[r, k, min(w, k // _stream.PIECE), s] for r, k, w, s in choices]
    if launch.carry:
        # More warps for more rows: where there are rows for them, none keeps more sums.
        more = [max(1, _stream_few.SUMMED_ROWS // r) for r, *_ in choices]
        choices = [[r * n, k, w * n, s] for n, (r, k, w, s) in zip(more, choices, strict=True)]
    return _fitting(launch, choices, launch.block_m, used, device)


def _fitting(
    launch: Launch,
    choices: list[list[int]],
    block_m: int,
    used: Callable[[Tile], int],
    device: torch.device,
) -> Tile:
    """The first of (rows, columns, warps, stages) that fits shared memory, with fewer stages if need be."""
    for block_r, block_k, num_warps, stages in choices:
        for fewer in range(min(stages, cdiv(launch.k, block_k)), 0, -1):
            tile = Tile(block_r, block_k, num_warps, block_m, fewer)
            if used(tile) <= _triton.shared_memory(device):
                return tile
    raise AssertionError(f"no tile of a streamed kernel fits: {launch}")


def _skinny_rule(launch: Launch, shared: int) -> Tile:
    """One tile for all shapes of an op.

    The best by the sum over the linears of a LLaMA-7B layer at keep 0.5, of 8 and of 32 tokens, on an H200: 89 and
    113 us a layer, 10 and 16 above what the best tile of each would take (bench/results/tune_few_h200.json).
    """
    if launch.itemsize != 2:
        return _skinny(launch, 16, 4, 16, 3, shared)
    if launch.block_m == 64:
        return _skinny(launch, 16, 4, 64, 4, shared)  # twice the K spills
    if launch.op == "shrink":
        return _skinny(launch, 16, 4, 128, 4, shared)
    if launch.gated:
        return _skinny(launch, 32, 2, 64, 3, shared)
    return _skinny(launch, 16, 2, 128, 5, shared)


def _skinny(launch, block_r, split, block_k, num_stages, shared) -> Tile:
    # A stage, of which one is in registers, holds a tile of x and one of W, both twice when gated.
    column = (launch.block_m + block_r) * split * launch.itemsize * (2 if launch.gated else 1)
    while block_k > 16 and column * block_k * (num_stages - 1) > shared - 4096:
        block_k //= 2
    # Two warps a slice for the registers of multiply-adds without tensor cores.
    num_warps = 2 * split if launch.itemsize != 2 and launch.gated else split
    return Tile(block_r, block_k, num_warps, launch.block_m, num_stages, split)


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
    streamed: bool,
    batch: int,
    kv_heads: int,
    group: int,
    length: int,
    dim: int,
    itemsize: int,
    device: torch.device,
) -> AttentionTile:
    """Programs that are all side by side: one more would wait for the first to end.

    *Streamed,* on an H200 in bf16, 64 rows and three blocks on their way (many heads: 32 and two), a layer with its
    attention by the other kernel and by this one: LLaMA-7B, 512 tokens in a cache of 1024, 59.4 us and 58.1 with 8
    splits and two warps (four warps 58.3, 4 splits 58.2, one block 58.1); 8 and 32 such sequences 85.7 and 81.3,
    158.4 and 151.6 (four warps 81.6 and 152.0, 128 rows 81.9 and 152.4); Llama-3-8B, 8192 tokens in a cache of
    8320, 79.4 and 75.5 with 24 splits and four warps (two 79.6; 16 splits 77.1, 22 75.4, 32 77.1; 128 rows and
    eight warps 75.9 with 16), later 71.0 with 26 splits and 71.7 with 24. `python bench/tune_layer.py` tries such
    tiles; bench/results/tune_layer_attention_h200.json, tune_layer_joint_llama3_h200.json and so on. LLaMA-7B, 3000
    tokens in 4096 and 8000 in 8320, 68.3 and 88.1 with 6 splits, 67.9 and 85.8 with 8 (bench/NOTES.md).

    *Elsewhere* as found there before: 64 rows, four warps, two blocks for one sequence of as many heads as KV heads
    (none on its way 59.3 for 59.6 us, 32 rows and two blocks 60.3, eight warps 61.6, two 62.9, 4 splits 60.8), 128
    rows over long texts of grouped heads (16.0 us with the combine; 64 rows 16.2 to 16.8, 32 rows 20.3); where there is
    a program for each place and more, in 16-bit types, 128 rows for 8 sequences (86.6 us a layer; 32 rows 89.3), 64 and
    two warps for 16 and 32 (111.8 and 161.0; 32 rows 120.7 and 173.7).

    Args:
        streamed: Whether it is the tile of `_stream_attention`.
        group: Query heads of one KV head.
        length: S, the length of the cache, filled or not.
        dim: The wider of the two head dims.
    """
    if streamed:
        # Two programs for each multiprocessor, eight for five over long texts but for one sequence of ungrouped heads.
        most = length <= 2048 or (group == 1 and batch == 1)
        wanted = (10 if most else 8) * _triton.multiprocessors(device) // 5
        splits = max(1, min(wanted // (batch * kv_heads), cdiv(length, 64), 64))
        if group == 1 and batch * kv_heads >= 4 * _triton.multiprocessors(device):
            # Many heads: 0.9 us less of a layer of 32 sequences, 530 tokens in a cache of 1024, as more of the kernel
            # behind fits beside it.
            return AttentionTile(1, 32, 1, 2, 2)
        return AttentionTile(1, 64, splits, 2 if group == 1 else 4, 3)
    narrow = dim * itemsize <= 256 and dim % 8 == 0
    alone = narrow and itemsize == 2 and group == 1
    one = alone and batch == 1
    block_n = 16 if not narrow else 64 if one or group > 1 else 32
    wanted = 2 * _triton.multiprocessors(device) // (batch * kv_heads)
    if alone and wanted <= 1:
        return AttentionTile(1, 128, 1, 4, 2) if wanted == 1 else AttentionTile(1, 64, 1, 2, 2)
    long = narrow and itemsize == 2 and group > 1 and batch == 1 and length >= 128 * wanted
    if long:
        block_n = 128
    splits = max(1, min(wanted, cdiv(length, block_n), 64))
    return AttentionTile(1, block_n, splits, 4 if narrow else 8, num_stages=2 if one or long else 3)
