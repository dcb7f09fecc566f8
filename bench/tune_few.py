"""Tiles of the tensor-core kernel for a few tokens, one linear of a LLaMA-7B layer at a time, on this GPU.

    python bench/tune_few.py --tokens 8 32 --json tiles.json

Every candidate runs over several weights, 300 MB together so that no cache holds them, in one CUDA graph with
programmatic dependent launch, after its result was compared with fp32. Beside it: what cuBLAS takes for the
same products, with the gate, the residual and the concatenation as kernels of their own.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import multiprocessing
import statistics
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from tune_layer import LINEARS

from fsvd_compile import bench
from fsvd_compile.bench.decode import read_limit, rel_rms
from fsvd_compile.kernels import _tuning, expand_triton, shrink_triton
from fsvd_compile.kernels._triton import next_power_of_2
from fsvd_compile.phase import Phase

# (weight rows, slices of K = warps, K of a slice, stages)
CANDIDATES = [
    (rows, split, block_k, stages)
    for rows, split, block_k, stages in itertools.product(
        (8, 16, 32, 64), (2, 4, 8), (32, 64, 128, 256), (3, 4, 5)
    )
    if 4096 <= rows * split * block_k <= 16384 and 128 <= split * block_k <= 1024
]
RESIDUAL = ("o expand", "down expand")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--jobs", type=int, default=16, help="processes that compile ahead")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tune_few: tiles are timed on a GPU and there is none.")
    todo = list(itertools.product(LINEARS, args.tokens, CANDIDATES))
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.jobs, mp_context=spawn) as pool:
        possible = set(itertools.compress(todo, pool.map(compiles, todo, chunksize=8)))
    limit, rows = read_limit(torch.device("cuda")), []
    for tokens, name in itertools.product(args.tokens, LINEARS):
        case = Case(name, tokens)
        times = {t: case.us(t) for t in CANDIDATES if (name, tokens, t) in possible}
        order = sorted(times.items(), key=lambda item: item[1])
        found = {
            "kernel": name,
            "tokens": tokens,
            "limit_us": round(1e6 * case.bytes / limit, 2),
            "cublas_us": round(case.replayed(case.library), 2),
            "us": {str(tile): round(us, 2) for tile, us in order},
        }
        rows.append(found)
        best = ", ".join(f"{us:.1f} {tile}" for tile, us in order[:4])
        print(
            f"{tokens:>3} {name:<15} cuBLAS {found['cublas_us']:5.1f}, limit {found['limit_us']:5.1f} | {best}",
            flush=True,
        )
    if args.json:
        where = bench.conditions("cuda", dtype=torch.bfloat16, read_limit_tb_s=limit / 1e12)
        with open(args.json, "w") as file:
            json.dump({"conditions": where, "tried": rows}, file, indent=1)


def compiles(job: tuple[str, int, tuple]) -> bool:
    """Leaves a candidate in Triton's cache on disk; False where it does not fit into shared memory."""
    from triton.runtime.errors import OutOfResources

    name, tokens, tile = job
    try:
        Case(name, tokens, copies=1).wrong(tile)
    except OutOfResources:
        return False
    return True


class Case:
    """One linear of a layer for a number of tokens, with several weights of its own."""

    def __init__(self, name: str, tokens: int, copies: int | None = None) -> None:
        (self.op, k, rows, self.gated), _ = LINEARS[name]
        count = {"qkv": 3, "gate-up": 2}.get(name.split()[0], 1)
        each = rows if self.gated else rows // count
        self.tokens, self.bytes = tokens, 2 * count * each * k

        def made(*shape: int) -> torch.Tensor:
            return k**-0.5 * torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

        copies = copies or int(3e8 / self.bytes) + 1
        self.weights = [[made(each, k) for _ in range(count)] for _ in range(copies)]
        self.offsets = [0 if self.op == "shrink" else i * k for i in range(count)]
        self.k = k
        self.x = made(tokens, self.offsets[-1] + k)
        self.residual = made(tokens, each) if name in RESIDUAL else None

    def ours(self, weights: list[torch.Tensor]) -> torch.Tensor:
        none = [None] * len(weights)
        if self.op == "shrink":
            return shrink_triton(self.x, weights, none, pdl=True, phase=Phase.FEW)
        activation = "silu_mul" if self.gated else "none"
        return expand_triton(
            self.x, weights, none, self.offsets, self.residual, activation, pdl=True,
            phase=Phase.FEW,
        )  # fmt: skip

    def library(self, weights: list[torch.Tensor]) -> torch.Tensor:
        parts = [
            F.linear(self.x[:, at : at + self.k], w)
            for at, w in zip(self.offsets, weights, strict=True)
        ]
        if self.gated:
            return F.silu(parts[0]) * parts[1]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return y if self.residual is None else y + self.residual

    def wrong(self, tile: tuple) -> float:
        """Relative RMS of our result to that of fp32."""
        serve(tile)
        weights = self.weights[0]
        actual, kept = self.ours(weights), (self.x, self.residual)
        self.x, self.residual = (None if t is None else t.float() for t in kept)
        expected = self.library([w.float() for w in weights])
        self.x, self.residual = kept
        return rel_rms(actual, expected)

    def us(self, tile: tuple) -> float:
        error = self.wrong(tile)
        if not error < 4e-3:  # bf16 rounds to 2e-3
            sys.exit(f"tune_few: {tile} gives a relative RMS error of {error:.2e}")
        return self.replayed(self.ours)

    def replayed(self, run: Callable, replays: int = 10) -> float:
        """Microseconds a call: the median replay of one call a weight in one graph."""
        run(self.weights[0])
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for weights in self.weights:
                run(weights)
        graph.replay()
        times = []
        for _ in range(replays):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return 1e3 * statistics.median(times) / len(self.weights)


def serve(tile: tuple) -> None:
    """Makes the launchers take the tile."""
    rows, split, block_k, stages = tile

    def linear_tile(op: str, phase: Phase, *, tokens: int, **_) -> _tuning.Tile:
        block_m = min(64, max(16, next_power_of_2(tokens)))
        return _tuning.Tile(rows, block_k, split, block_m, stages, split)

    _tuning.linear_tile = linear_tile


if __name__ == "__main__":
    main()
