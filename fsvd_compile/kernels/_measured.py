"""Tile sizes that were measured: rows that come with the package, and the user's own that `fsvd-compile tune` adds.

Both are JSON tables by compute capability, with the provenance of their rows. A row counts for the same op, number of
tokens and element size, with K within a factor of 1.5 of it and rows within a factor of 2; the nearest by the
sum of the two log-distances wins, the user's own before another as near.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import pathlib
from importlib import resources
from typing import TYPE_CHECKING

from fsvd_compile.errors import TableError
from fsvd_compile.kernels._triton import next_power_of_2

if TYPE_CHECKING:
    from fsvd_compile.kernels._tuning import Launch

log = logging.getLogger(__name__)

# What a row was measured for; K and rows may differ, the rest has to be the same.
SAME = ("op", "gated", "itemsize")
TILES = {
    "gemv": ("block_r", "num_warps"),
    "stream": ("block_r", "block_k", "num_warps", "num_stages"),
    "few": ("block_r", "block_k", "num_warps", "num_stages"),
    "skinny": ("block_r", "split", "block_k", "num_stages"),
}
KEY = (*SAME, "k", "rows", "tokens", "shifted")


def nearest(launch: Launch, tokens: int, capability: tuple[int, int]) -> dict | None:
    """The row for a launch of so many tokens a program, None if none counts."""
    best, least = None, math.inf
    for row in measured(capability)[launch.kernel]:
        if any(row[name] != getattr(launch, name) for name in SAME):
            continue
        if (row["tokens"], row["shifted"]) != (tokens, launch.vector > 1):
            continue
        by_k = abs(math.log2(max(launch.k, 1) / row["k"]))
        by_rows = abs(math.log2(max(launch.rows, 1) / row["rows"]))
        # A GEMV tile for a shorter power of two would need more registers than were measured.
        most = next_power_of_2(row["k"] + launch.vector - 1)
        fits = launch.kernel != "gemv" or launch.block_k <= most
        if fits and by_k <= math.log2(1.5) and by_rows <= 1 and by_k + by_rows < least:
            best, least = row, by_k + by_rows
    return best


@functools.cache
def measured(capability: tuple[int, int]) -> dict[str, list[dict]]:
    """The rows for a compute capability, by kernel: the user's own first, then what comes with the package.

    Raises:
        TableError: the user's file is no table of tiles.
    """
    name = f"sm{capability[0]}{capability[1]}.json"
    stock = resources.files("fsvd_compile.kernels").joinpath("configs", name)
    tables = [json.loads(stock.read_text())] if stock.is_file() else []
    try:
        own = own_file(capability)
        there = own.is_file()
    except (
        OSError,
        RuntimeError,
    ) as error:  # no home directory, or one that may not be looked into
        log.warning("tiles of `fsvd-compile tune` are not looked for: %s. Set FSVD_TUNED.", error)
        there = False
    if there:
        tables.insert(0, read(own))
    return {kernel: [row for t in tables for row in t.get(kernel, [])] for kernel in TILES}


def own_file(capability: tuple[int, int]) -> pathlib.Path:
    """Where `fsvd-compile tune` adds rows: in `FSVD_TUNED`, a directory, by default one in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = os.environ.get("FSVD_TUNED") or f"{cache}/fsvd_compile"
    return pathlib.Path(folder).expanduser() / f"sm{capability[0]}{capability[1]}.json"


def read(path: pathlib.Path) -> dict[str, list[dict]]:
    """A table of tiles from a file.

    Raises:
        TableError: it holds something else.
    """
    try:
        table = json.loads(path.read_text())
        table = {"stream": [], "few": [], **table}  # tables from before they were there
        for kernel in TILES:
            for row in table[kernel]:
                _check_row(row, kernel)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TableError(
            f"{path} is no table of tiles as `fsvd-compile tune` writes it ({type(error).__name__}: {error}). "
            "Delete it, or set FSVD_TUNED to another directory."
        ) from error
    return table


def _check_row(row: dict, kernel: str) -> None:
    tile = TILES[kernel]
    if row["op"] not in ("shrink", "expand"):
        raise ValueError(f"op {row['op']!r}")
    for name in ("itemsize", "k", "rows", "tokens", *tile):
        if not (isinstance(row[name], int) and row[name] > 0):
            raise ValueError(f"{name} {row[name]!r}")
    for name in tile:
        if name != "num_stages" and row[name] & (row[name] - 1):
            raise ValueError(f"{name} {row[name]}, no power of two")
    if max(row.get("num_warps", 1), row.get("split", 1)) > 32:
        raise ValueError("more than 32 warps")
    if kernel == "stream" and not (
        256 <= row["block_k"] <= 16384 and row["num_warps"] <= row["block_r"] <= 256
    ):
        raise ValueError("a block of the streamed kernel that no copy or no warp holds")
    if kernel == "few" and not (
        16 <= row["block_r"] <= 128
        and 64 <= row["block_k"] <= 1024
        and 1024 * row["num_warps"] <= row["block_k"] * row["block_r"]
    ):
        raise ValueError("a block of the streamed kernel for few tokens that no program holds")
    for name in ("gated", "shifted"):
        if not isinstance(row[name], bool):
            raise ValueError(f"{name} {row[name]!r}")
