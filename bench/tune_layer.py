"""Tile sizes of the decode kernels, by a search over a whole LLaMA layer on this GPU.

    python bench/tune_layer.py [--tokens 8] [--ranks 1228 1791] [--model llama3-8b --context 8192] --json tiles.json

A kernel's best tile alone is not its best in a chain, where the next kernel's weights are requested while
it runs. So every candidate is timed in place: eight layers of random weights in one CUDA graph, norms,
residuals, gate and attention included: by coordinate descent (`--passes`) and, with `--joint 60`, neighbours together.
Prints the tiles that won, for `fsvd_compile/kernels/configs`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import math
import multiprocessing
import random
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from triton.runtime.errors import OutOfResources

from fsvd_compile.bench import models, tune
from fsvd_compile.bench.stopwatch import conditions, write_json
from fsvd_compile.kernels import (
    _tuning,
    decode_attention_triton,
    expand_rms_triton,
    expand_triton,
    mask_reach,
    shrink_rms_triton,
    shrink_triton,
)
from fsvd_compile.kernels._linear import carries
from fsvd_compile.kernels._tuning import AttentionTile, Launch

attention_rule = _tuning.decode_attention_tile  # `serve` replaces it
tiles: dict[str, tuple] = {}
served = contextlib.ExitStack()  # for as long as this process lives

# The residual stream: between layers with what carries its norm.
Stream = torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Setting(NamedTuple):
    """A layer and its step: a key of `models.MODELS`, ranks (attention, MLP, k and v), how many tokens lie where."""

    model: str = "llama-7b"
    ranks: tuple[int, ...] = (1024, 1488, 1024)  # keep 0.5, multiples of 16
    tokens: int = 1
    context: int = 530  # no multiple of a block of rows, which would hide what the last one costs
    cache: int = 1024

    @property
    def hidden(self) -> int:
        return models.MODELS[self.model]["hidden_size"]

    @property
    def inner(self) -> int:
        return models.MODELS[self.model]["intermediate_size"]

    @property
    def heads(self) -> int:
        return models.MODELS[self.model]["num_attention_heads"]

    @property
    def kv_heads(self) -> int:
        return models.MODELS[self.model].get("num_key_value_heads", self.heads)

    @property
    def head(self) -> int:
        return self.hidden // self.heads

    @property
    def qkv(self) -> list[int]:
        """Features of q, of k and of v."""
        return [self.hidden, *[self.kv_heads * self.head] * 2]


setting = Setting()  # `begin` replaces it


def linears() -> dict[str, tuple]:
    """Every linear of a layer: what `_tuning` is asked for it."""
    hidden, inner = setting.hidden, setting.inner
    attention, mlp, kv = setting.ranks
    return {
        "qkv shrink": ("shrink", hidden, attention + 2 * kv, False),
        "qkv expand": ("expand", max(attention, kv), sum(setting.qkv), False),
        "o shrink": ("shrink", hidden, attention, False),
        "o expand": ("expand", attention, hidden, False),
        "gate-up shrink": ("shrink", hidden, 2 * mlp, False),
        "gate-up expand": ("expand", mlp, inner, True),
        "down shrink": ("shrink", inner, mlp, False),
        "down expand": ("expand", mlp, hidden, False),
    }


NAMES = (*linears(), "attention")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--model", choices=[*models.MODELS], default="llama-7b")
    parser.add_argument("--tokens", type=int, default=1, help="sequences of a step, a token each")
    parser.add_argument(
        "--context", type=int, default=Setting().context, help="tokens in the cache"
    )
    parser.add_argument(
        "--cache", type=int, help="its positions; about twice the context if not given"
    )
    parser.add_argument(
        "--ranks",
        type=int,
        nargs="+",
        default=[1024, 1488],
        metavar="RANK",
        help="of attention, of MLP and, if they are others, of k and v",
    )
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument(
        "--joint",
        type=float,
        default=0,
        metavar="SECONDS",
        help="how long neighbours are tried together",
    )
    parser.add_argument(
        "--jobs", type=int, default=8, help="processes that compile candidates ahead"
    )
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tune_layer: tiles are timed on a GPU and there is none.")
    if not 1 <= args.tokens <= 64:
        sys.exit(f"tune_layer: --tokens {args.tokens}; the decode kernels take 1 to 64.")
    if len(args.ranks) not in (2, 3):
        sys.exit(
            f"tune_layer: {len(args.ranks)} --ranks; attention, MLP and perhaps k and v have one."
        )
    cache = args.cache or max(64, 2 * args.context // 64 * 64)
    if cache <= args.context:
        sys.exit(f"tune_layer: --cache {cache} has no room behind --context {args.context}.")
    ranks = (*args.ranks, args.ranks[0])[:3]
    what = Setting(args.model, ranks, args.tokens, args.context, cache)
    begin(what)
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        jobs = [(what, n, c) for n in NAMES for c in candidates(n)]
        fits = pool.map(compile_one, jobs, chunksize=1)
    possible = {
        n: [c for (_, m, c), fit in zip(jobs, fits, strict=True) if m == n and fit] for n in NAMES
    }
    serve()
    layers = [Layer() for _ in range(args.layers)]
    best = layer_us(layers)
    print(
        f"at first {best:.2f} us a layer, linears alone {layer_us(layers, False):.2f}", flush=True
    )
    tried = descend(layers, possible, args.passes, best)
    if args.joint:
        # Among the best of each in the last descent, all of them if there was none.
        anneal(layers, possible | {name: [*times][:20] for name, times in tried}, args.joint)
    best = layer_us(layers, replays=30)
    linears = layer_us(layers, False)
    print(f"at last {best:.2f} us a layer, linears alone {linears:.2f}")
    print(tiles)
    if args.json:
        found = {
            "conditions": conditions(
                "cuda", layers=args.layers, **what._asdict(), dtype=torch.bfloat16
            ),
            "tiles": tiles,
            "us_per_layer": best,
            "us_linears": linears,
            "tried": [
                {"kernel": n, "us": {str(c): round(us, 2) for c, us in times.items()}}
                for n, times in tried
            ],
        }
        write_json(found, Path(args.json))


def descend(layers: list, possible: dict[str, list], passes: int, best: float) -> list[tuple]:
    """Coordinate descent: (kernel, its candidates with microseconds a layer, best first), one after another."""
    tried = []
    for _, name in itertools.product(range(passes), NAMES):
        before, times = tiles[name], {}
        for candidate in possible[name]:
            tiles[name] = candidate
            times[candidate] = layer_us(layers)
        winner = min(times, key=times.get)
        tiles[name] = winner if times[winner] < 0.999 * best else before
        best = min(best, times[winner])
        tried.append((name, dict(sorted(times.items(), key=lambda item: item[1]))))
        print(f"{name:<15} {before} -> {tiles[name]}  {best:.2f} us", flush=True)
    return tried


def anneal(layers: list, possible: dict[str, list], seconds: float) -> None:
    """Changes tiles of one kernel or up to three neighbours at a time, as each needs room beside the one before.

    By simulated annealing from 0.4 us a layer down to nothing.
    """
    choices = {name: list(dict.fromkeys([tiles[name], *found])) for name, found in possible.items()}
    chance = random.Random(0)
    now = best = dict(tiles)
    least = current = layer_us(layers, replays=20)
    known: dict[tuple, float] = {}
    begun = time.perf_counter()
    while (passed := (time.perf_counter() - begun) / seconds) < 1:
        first, count = chance.randrange(len(NAMES)), chance.choice((1, 1, 1, 2, 2, 3))
        moved = [NAMES[(first + i) % len(NAMES)] for i in range(count)]
        tiles.update(now | {name: chance.choice(choices[name]) for name in moved})
        key = tuple(tiles.values())
        if key not in known:
            known[key] = layer_us(layers, replays=6)
        if known[key] < current or chance.random() < math.exp(
            (current - known[key]) / (0.4 * (1 - passed) + 0.02)
        ):
            now, current = dict(tiles), known[key]
        if current < least:
            best, least = now, current
    tiles.update(best)
    print(f"jointly, {len(known)} layers: {least:.2f} us", flush=True)


def asked(name: str) -> Launch:
    """What `_tuning` is asked for a linear, on this GPU."""
    return next(a for a in asks()[0] if (a.op, a.k, a.rows, a.gated) == linears()[name])


@functools.cache
def asks() -> tuple[list[Launch], dict]:
    """What a layer asks tiles for: its linears, and its attention."""
    questions = []

    def rule(**question):
        questions.append(question)
        return attention_rule(**question)

    _tuning.decode_attention_tile = rule
    layer = Layer()
    x = layer(start())
    with _tuning.recording() as launches:
        layer(x)
    _tuning.decode_attention_tile = attention_rule
    return launches, questions[0]


def begin(what: Setting) -> None:
    """The tiles as they are now for a layer."""
    global setting
    setting = what
    for name in linears():
        tiles[name] = _tuning._linear_tile(asked(name), torch.device("cuda", 0))
    tiles["attention"] = attention_rule(**asks()[1])[1:]


def candidates(name: str) -> list[tuple]:
    """Tiles of a linear; (rows, splits, warps, stages) of attention."""
    if name == "attention":
        _, rows, splits, *_ = attention_rule(**asks()[1])
        if setting.tokens == 1:
            parts = (6, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 24)
            several = sorted({max(1, splits * n // 12) for n in parts})
            found = [*itertools.product((rows // 2, rows, 2 * rows), several, (2, 4), (1, 2, 3))]
            if setting.context <= 2048:
                # One split has no combine; few of them have most of their text on its way at once.
                found += itertools.product((rows, 2 * rows), (1, 2, 3), (2, 4, 8), (3, 4, 6))
        else:
            several = sorted({1, 2, splits})
            found = itertools.product((32, 64, 128), several, (2, 4), (1, 2, 3, 4))
        return [tile for tile in dict.fromkeys(found) if tile[0] >= 16 * tile[2]]
    return tune.candidates(asked(name))


def serve() -> None:
    """Makes the launchers take `tiles`."""
    names = {what: name for name, what in linears().items()}

    def linear_tile(launch):
        return tiles[names[launch.op, launch.k, launch.rows, launch.gated]]

    def attention_tile(**_):
        return AttentionTile(1, *tiles["attention"])

    served.enter_context(_tuning.forced(linear_tile))
    _tuning.decode_attention_tile = attention_tile


def compile_one(job: tuple[Setting, str, tuple]) -> bool:
    """Leaves a candidate in Triton's cache on disk; False where it does not fit."""
    what, name, tile = job
    begin(what)
    serve()
    tiles[name] = tile
    try:
        layer = Layer()
        layer(layer(start()))
        torch.cuda.synchronize()
    except OutOfResources:
        return False
    return True


def start() -> torch.Tensor:
    return torch.randn(setting.tokens, 1, setting.hidden, device="cuda", dtype=torch.bfloat16)


class Layer:
    """One decode step of one layer with weights of its own; norms are carried where kernels carry them."""

    def __init__(self) -> None:
        def made(*shape: int, count: int = 1) -> list[torch.Tensor]:
            return [
                0.02 * torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
                for _ in range(count)
            ]

        hidden, inner = setting.hidden, setting.inner
        attention, mlp, kv = setting.ranks
        self.qkv = (
            [*made(attention, hidden), *made(kv, hidden, count=2)],
            [
                *made(hidden, attention),
                *made(setting.kv_heads * setting.head, kv, count=2),
            ],
        )
        self.o = made(attention, hidden), made(hidden, attention)
        self.gate_up = made(mlp, hidden, count=2), made(inner, mlp, count=2)
        self.down = made(mlp, inner), made(hidden, mlp)
        self.norms = made(hidden, count=2)
        shape = setting.tokens, setting.kv_heads, setting.cache, setting.head
        self.caches = made(*shape, count=2)
        self.table = torch.randn(1, 1, setting.head, device="cuda")
        self.position = torch.tensor([setting.context], device="cuda")
        rows = torch.arange(setting.cache, device="cuda")
        self.mask = (rows <= setting.context)[None, None, None]
        self.reach = mask_reach(self.mask, setting.cache)

    def __call__(self, x: Stream, attention: bool = True) -> Stream:
        """What the layer before, or `start`, returned becomes what the next one reads."""
        tokens, (rank, mlp, kv) = setting.tokens, setting.ranks
        z = self._normed(x, self.qkv[0], self.norms[0])
        y = expand_triton(z, self.qkv[1], [None] * 3, [0, rank, rank + kv], pdl=True)
        q, k, v = (
            t.view(tokens, 1, -1, setting.head).transpose(1, 2) for t in y.split(setting.qkv, -1)
        )
        if attention:
            y = decode_attention_triton(
                q, k, v, self.table, self.table, *self.caches, self.position, self.mask,
                setting.head**-0.5, self.reach, pdl=True, read_ahead=True,
            ).transpose(1, 2).reshape(tokens, 1, -1)  # fmt: skip
        z = shrink_triton(y[..., : setting.hidden], self.o[0], [None], pdl=True)
        x = self._added(z, self.o[1], x, self.norms[1], self.gate_up[0])
        z = self._normed(x, self.gate_up[0], self.norms[1])
        y = expand_triton(z, self.gate_up[1], [None] * 2, [0, mlp], None, "silu_mul", pdl=True)
        z = shrink_triton(y, self.down[0], [None], pdl=True)
        # In a model the norm and the shrink are the next layer's.
        return self._added(z, self.down[1], x, self.norms[0], self.qkv[0])

    def _normed(self, x: Stream, weights: list, norm: torch.Tensor) -> torch.Tensor:
        none = [None] * len(weights)
        if isinstance(x, tuple):
            return shrink_rms_triton(*x[1:], weights, none, 1e-5, pdl=True)
        return shrink_triton(x, weights, none, "rms", norm, None, 1e-5, pdl=True)

    def _added(
        self, z: torch.Tensor, weights: list, x: Stream, norm: torch.Tensor, behind: list
    ) -> Stream:
        residual = x[0] if isinstance(x, tuple) else x
        rows = (t.view(setting.tokens, t.shape[-1]) for t in (z, residual))
        sides = zip(("expand", "shrink"), rows, (weights, behind), strict=True)
        if all(carries(op, t, w, [0] * len(w)) for op, t, w in sides):
            return expand_rms_triton(z, weights[0], None, 0, residual, norm, pdl=True)
        return expand_triton(z, weights, [None], [0], residual, pdl=True)


def captured(layers: list[Layer], attention: bool = True) -> torch.cuda.CUDAGraph:
    """All layers in one graph, behind what a layer before leaves, a carried norm included."""
    x = layers[0](start(), attention)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in layers:
            x = layer(x, attention)
    return graph


def layer_us(layers: list[Layer], attention: bool = True, replays: int = 12) -> float:
    """Microseconds a layer: the median replay of all of them in one graph."""
    graph = captured(layers, attention)
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
