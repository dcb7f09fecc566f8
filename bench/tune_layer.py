"""Tile sizes of the decode kernels, by coordinate descent over a whole LLaMA layer on this GPU.

    python bench/tune_layer.py [--tokens 8] [--ranks 1228 1791] --json tiles.json

A kernel's best tile alone is not its best in a chain, where the next kernel's weights are requested while
it runs. So every candidate is timed in place: eight layers of random weights in one CUDA graph, norms,
residuals, gate and attention included. Prints the tiles that won, for `fsvd_compile/kernels/configs`.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import multiprocessing
import statistics
import sys

import torch
from triton.runtime.errors import OutOfResources

from fsvd_compile import bench
from fsvd_compile.bench import tune
from fsvd_compile.kernels import (
    _tuning,
    decode_attention_triton,
    expand_triton,
    mask_reach,
    shrink_triton,
)
from fsvd_compile.kernels._tuning import AttentionTile, Launch

HIDDEN, INNER, HEADS, HEAD = 4096, 11008, 32, 128  # LLaMA-7B
RANKS = 1024, 1488  # its ranks at keep 0.5, multiples of 16: attention, MLP
CONTEXT, CACHE = 512, 1024
attention_rule = _tuning.decode_attention_tile  # `serve` replaces it
tiles: dict[str, tuple] = {}
tokens, attention_rank, mlp_rank = 1, *RANKS


def linears() -> dict[str, tuple]:
    """Every linear of a layer: what `_tuning` is asked for it."""
    return {
        "qkv shrink": ("shrink", HIDDEN, 3 * attention_rank, False),
        "qkv expand": ("expand", attention_rank, 3 * HIDDEN, False),
        "o shrink": ("shrink", HIDDEN, attention_rank, False),
        "o expand": ("expand", attention_rank, HIDDEN, False),
        "gate-up shrink": ("shrink", HIDDEN, 2 * mlp_rank, False),
        "gate-up expand": ("expand", mlp_rank, INNER, True),
        "down shrink": ("shrink", INNER, mlp_rank, False),
        "down expand": ("expand", mlp_rank, HIDDEN, False),
    }


NAMES = (*linears(), "attention")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1, help="sequences of a step, a token each")
    parser.add_argument(
        "--ranks", type=int, nargs=2, default=RANKS, metavar="RANK", help="of attention and of MLP"
    )
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument(
        "--jobs", type=int, default=8, help="processes that compile candidates ahead"
    )
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tune_layer: tiles are timed on a GPU and there is none.")
    if not 1 <= args.tokens <= 64:
        sys.exit(f"tune_layer: --tokens {args.tokens}; the decode kernels take 1 to 64.")
    what = args.tokens, *args.ranks
    begin(*what)
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        jobs = [(what, n, c) for n in NAMES for c in candidates(n)]
        possible = set(itertools.compress(jobs, pool.map(compile_one, jobs, chunksize=1)))
    serve()
    layers = [Layer() for _ in range(args.layers)]
    best, tried = layer_us(layers), []
    print(
        f"at first {best:.2f} us a layer, linears alone {layer_us(layers, False):.2f}", flush=True
    )
    for _, name in itertools.product(range(args.passes), NAMES):
        before, times = tiles[name], {}
        for candidate in candidates(name):
            if (what, name, candidate) not in possible:
                continue
            tiles[name] = candidate
            times[candidate] = layer_us(layers)
        winner = min(times, key=times.get)
        tiles[name] = winner if times[winner] < 0.999 * best else before
        best = min(best, times[winner])
        tried.append(
            {
                "kernel": name,
                "us": {str(c): round(t, 2) for c, t in sorted(times.items(), key=lambda i: i[1])},
            }
        )
        print(f"{name:<15} {before} -> {tiles[name]}  {best:.2f} us", flush=True)
    linears = layer_us(layers, False)
    print(f"at last {layer_us(layers):.2f} us a layer, linears alone {linears:.2f}")
    print(tiles)
    if args.json:
        where = bench.conditions(
            "cuda",
            layers=args.layers,
            tokens=args.tokens,
            ranks=args.ranks,
            context=CONTEXT,
            cache=CACHE,
            dtype=torch.bfloat16,
        )
        with open(args.json, "w") as file:
            json.dump(
                {
                    "conditions": where,
                    "tiles": tiles,
                    "us_per_layer": best,
                    "us_linears": linears,
                    "tried": tried,
                },
                file,
                indent=1,
            )


def asked(name: str) -> Launch:
    """What `_tuning` is asked for a linear, on this GPU."""
    return next(a for a in asks() if (a.op, a.k, a.rows, a.gated) == linears()[name])


@functools.cache
def asks() -> list[Launch]:
    """What a layer asks tiles for."""
    with _tuning.recording() as launches:
        Layer()(start())
    return launches


def begin(count: int, attention: int = RANKS[0], mlp: int = RANKS[1]) -> None:
    """The tiles as they are now, for so many tokens and these ranks."""
    global tokens, attention_rank, mlp_rank
    tokens, attention_rank, mlp_rank = count, attention, mlp
    for name in linears():
        tiles[name] = _tuning._linear_tile(asked(name), torch.device("cuda", 0))
    tiles["attention"] = attention_rule(
        batch=tokens,
        kv_heads=HEADS,
        group=1,
        length=CACHE,
        dim=HEAD,
        itemsize=2,
        device=torch.device("cuda", 0),
    )[1:]


def candidates(name: str) -> list[tuple]:
    """Tiles of a linear; (rows, splits, warps, stages) of attention."""
    if name == "attention":
        if tokens == 1:
            return list(itertools.product((16, 32), (6, 8, 12, 16), (2, 4), (1, 3)))
        return list(itertools.product((32, 64, 128), (1, 2, 4), (2, 4), (2, 3, 4)))
    return tune.candidates(asked(name))


def serve() -> None:
    """Makes the launchers take `tiles`."""
    names = {what: name for name, what in linears().items()}

    def linear_tile(launch, device):
        return tiles[names[launch.op, launch.k, launch.rows, launch.gated]]

    def attention_tile(**_):
        return AttentionTile(1, *tiles["attention"])

    _tuning.linear_tile, _tuning.decode_attention_tile = linear_tile, attention_tile


def compile_one(job: tuple[tuple[int, int, int], str, tuple]) -> bool:
    """Leaves a candidate in Triton's cache on disk; False where it does not fit."""
    what, name, tile = job
    begin(*what)
    serve()
    tiles[name] = tile
    try:
        Layer()(start())
        torch.cuda.synchronize()
    except OutOfResources:
        return False
    return True


def start() -> torch.Tensor:
    return torch.randn(tokens, 1, HIDDEN, device="cuda", dtype=torch.bfloat16)


class Layer:
    """One decode step of one layer with weights of its own."""

    def __init__(self) -> None:
        def made(*shape: int, count: int = 1) -> list[torch.Tensor]:
            return [
                0.02 * torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
                for _ in range(count)
            ]

        self.qkv = (
            made(attention_rank, HIDDEN, count=3),
            made(HIDDEN, attention_rank, count=3),
        )
        self.o = made(attention_rank, HIDDEN), made(HIDDEN, attention_rank)
        self.gate_up = made(mlp_rank, HIDDEN, count=2), made(INNER, mlp_rank, count=2)
        self.down = made(mlp_rank, INNER), made(HIDDEN, mlp_rank)
        self.norms = made(HIDDEN, count=2)
        self.caches = made(tokens, HEADS, CACHE, HEAD, count=2)
        self.table = torch.randn(1, 1, HEAD, device="cuda")
        self.position = torch.tensor([CONTEXT], device="cuda")
        self.mask = (torch.arange(CACHE, device="cuda") <= CONTEXT)[None, None, None]
        self.reach = mask_reach(self.mask, CACHE)

    def __call__(self, x: torch.Tensor, attention: bool = True) -> torch.Tensor:
        z = shrink_triton(x, self.qkv[0], [None] * 3, "rms", self.norms[0], None, 1e-5, pdl=True)
        y = expand_triton(
            z, self.qkv[1], [None] * 3, [0, attention_rank, 2 * attention_rank], pdl=True
        )
        q, k, v = (t.view(tokens, 1, HEADS, HEAD).transpose(1, 2) for t in y.split(HIDDEN, -1))
        if attention:
            y = decode_attention_triton(
                q, k, v, self.table, self.table, *self.caches, self.position, self.mask, HEAD**-0.5,
                self.reach, pdl=True, read_ahead=True,
            ).transpose(1, 2).reshape(tokens, 1, HIDDEN)  # fmt: skip
        z = shrink_triton(y[..., :HIDDEN], self.o[0], [None], pdl=True)
        x = expand_triton(z, self.o[1], [None], [0], x, pdl=True)
        z = shrink_triton(
            x, self.gate_up[0], [None] * 2, "rms", self.norms[1], None, 1e-5, pdl=True
        )
        y = expand_triton(z, self.gate_up[1], [None] * 2, [0, mlp_rank], None, "silu_mul", pdl=True)
        z = shrink_triton(y, self.down[0], [None], pdl=True)
        return expand_triton(z, self.down[1], [None], [0], x, pdl=True)


def layer_us(layers: list[Layer], attention: bool = True, replays: int = 12) -> float:
    """Microseconds a layer: the median replay of all of them in one graph."""
    x = start()
    layers[0](x, attention)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in layers:
            x = layer(x, attention)
    for _ in range(2):
        graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
    return 1e3 * statistics.median(times) / len(layers)


if __name__ == "__main__":
    main()
