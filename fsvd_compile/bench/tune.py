"""Tile sizes of the kernels that a model asks for, measured on this GPU and kept for every later process.

One linear at a time, over several weights that no cache holds, in one CUDA graph with programmatic dependent launch
where the GPU has it. A candidate's result is compared with fp32 before it is timed.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import datetime
import itertools
import multiprocessing
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor

from fsvd_compile.bench import decode, models
from fsvd_compile.bench.stopwatch import conditions, write_json
from fsvd_compile.errors import BenchError, WrongResultError
from fsvd_compile.kept_cache import argument
from fsvd_compile.kernels import (
    _measured,
    _stream_few,
    _triton,
    _tuning,
    expand_rms_triton,
    expand_triton,
    shrink_triton,
)
from fsvd_compile.kernels._tuning import Launch, Tile
from fsvd_compile.phase import Phase
from fsvd_compile.table import aligned

DTYPES = {2: torch.bfloat16, 4: torch.float32}
ERRORS = {2: 4e-3, 4: 1e-5}  # relative RMS to fp32; rounding to bf16 alone is 2e-3
# Bytes of weight a thread may request at once: 8 to 64 registers.
THREAD_BYTES = range(32, _tuning.THREAD_BYTES + 1)
# Elements of weight a program of `_stream` requests at once: 16 to 64 KB.
STREAM = range(8 << 10, (32 << 10) + 1)
# The same of `_stream_few`, x included: 32 to 176 KB.
FEW = range(16 << 10, (88 << 10) + 1)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What to tune for; each field is an argument of `fsvd-compile tune`.

    Attributes:
        tokens: Tokens of a step, each at most 64; a step is compiled for each to see what it asks for.
        jobs: Processes that compile candidates ahead.
        model, keep, round: As in `decode.Setting`.

    Raises:
        BenchError, FactorizeError: a field is outside what is allowed, or there is no GPU.
    """

    model: str = decode.MODEL["cuda"]
    keep: float = 0.5
    round: int = 16
    tokens: Sequence[int] = (1, 8, 32)
    jobs: int = 8

    def __post_init__(self) -> None:
        if not self.tokens or not all(1 <= n <= 64 for n in self.tokens):
            raise BenchError(
                f"tokens={','.join(map(str, self.tokens))}; each has to be in 1..64: longer prompts "
                "are multiplied by cuBLAS."
            )
        if self.jobs < 1:
            raise BenchError(f"jobs={self.jobs}; it has to be at least 1.")
        object.__setattr__(self, "model", self.subject(1).model)

    def subject(self, tokens: int) -> decode.Setting:
        """One token of each of so many sequences."""
        return decode.Setting(
            model=self.model, keep=self.keep, round=self.round, batch=tokens, context=8,
            cache=8 + decode.FIRST, peers=("eager",), device="cuda", rounds=1, calls=1,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Found:
    """The candidates of one launch.

    Attributes:
        us: Microseconds by tile, the fastest first.
        before: Those of the tile that was taken until now.
        library: Those of cuBLAS, with a gate as a kernel of its own.
        bytes: Of weights.
    """

    launch: Launch
    us: dict[Tile, float]
    before: float
    library: float
    bytes: int

    def row(self) -> dict[str, Any]:
        """The fastest as a row of a table of tiles."""
        (tile, us), *_ = self.us.items()
        where = conditions("cuda")
        return {
            "op": self.launch.op,
            "gated": self.launch.gated,
            "k": self.launch.k,
            "rows": self.launch.rows,
            "tokens": tile.block_m,
            "itemsize": self.launch.itemsize,
            "shifted": self.launch.vector > 1,
            **{name: getattr(tile, name) for name in _measured.TILES[self.launch.kernel]},
            "us": round(us, 2),
            "tb_s": round(self.bytes / us / 1e6, 2),
            "before_us": round(self.before, 2),
            "library_us": round(self.library, 2),
            "of": f"{self.launch.tokens} tokens alone; {where['device']}, torch {where['torch']}, "
            f"triton {where['triton']}, {datetime.date.today()}",
        }


def run(setting: Setting, say: Callable[[str], None] = lambda line: None) -> Iterator[Found]:
    """Tunes every linear that the model asks a tile for, one after the other once all candidates are compiled.

    Args:
        setting: The model and the numbers of tokens.
        say: Called with a line of text before minutes of work.

    Raises:
        BenchError: there is no GPU, or the model cannot be measured this way.
        WrongResultError: a candidate is further from fp32 than rounding explains.
    """
    launches = []
    for launch in asked(setting):
        if candidates(launch) and not Case(launch, copies=1).same_kernel():
            say(f"{launch}: not tuned, for one weight of these sizes takes another kernel")
        elif candidates(launch):
            launches.append(launch)
    jobs = [(launch, tile) for launch in launches for tile in candidates(launch)]
    say(f"{len(launches)} linears, {len(jobs)} candidates to compile")
    # Compiled by other processes, they are found in Triton's cache on disk.
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(setting.jobs, mp_context=spawn) as pool:
        possible = set(itertools.compress(jobs, pool.map(_fits, jobs, chunksize=4)))
    for launch in launches:
        case = Case(launch)
        current = _tuning.linear_tile(launch, case.x.device)
        before = case.us(current)
        times = {t: case.us(t) for t in candidates(launch) if (launch, t) in possible}
        if not times:
            say(f"{launch}: no candidate fits into this GPU's shared memory")
            continue
        times.setdefault(current, before)  # where no candidate is faster it stays
        ordered = dict(sorted(times.items(), key=lambda item: item[1]))
        yield Found(launch, ordered, before, case.replayed(case.library), case.bytes)


def asked(setting: Setting) -> list[Launch]:
    """The launches of a step of the compiled model, for each number of tokens."""
    with _tuning.recording() as launches:
        for tokens in setting.tokens:
            subject = setting.subject(tokens)
            # The first layer has its norm in front, the last may carry none: those between are what is tuned.
            model = models.build(subject, setting.keep, layers=3)
            prompt = torch.randint(100, (tokens, subject.context), device=model.device)
            cache = models.fill(model, prompt, subject.cache)
            torch._dynamo.reset()
            options = {"cuda_graphs": "off"}
            compiled = torch.compile(model, backend="flashsvd", options=options)
            with torch.no_grad():
                compiled(prompt[:, :1], use_cache=True, **{argument(model): cache})
    torch._dynamo.reset()
    return _commonest(launches)


def _commonest(launches: list[Launch]) -> list[Launch]:
    """One launch of those that a table of tiles has one row for: the one that most layers have, of the most tokens."""
    by_row: dict[Launch, Launch] = {}
    for launch in launches:
        tokens = launch.block_m if launch.kernel in ("few", "skinny") else launch.tokens
        row = launch._replace(norm=False, carry=False, tokens=tokens)
        others = [launch, by_row[row]] if row in by_row else [launch]
        by_row[row] = max(others, key=lambda one: (one.carry, not one.norm, one.tokens))
    return list(by_row.values())


def candidates(launch: Launch) -> list[Tile]:
    """The tiles to try; none for what a table of tiles has no rows for."""
    if launch.layout != "row" or launch.itemsize not in DTYPES:
        return []
    both = 2 if launch.gated else 1
    if launch.kernel == "gemv":
        if launch.block_k > _tuning.SINGLE_TILE_K:
            return []
        row = both * launch.block_k * launch.itemsize
        return [
            Tile(rows, launch.block_k, warps, min(launch.tokens, 2))
            for rows, warps in itertools.product((1, 2, 4, 8, 16), repeat=2)
            if rows * row // (32 * warps) in THREAD_BYTES
        ]
    if launch.kernel == "stream":
        tiles = [
            Tile(rows, block_k, warps, 1, stages)
            for rows, warps, block_k, stages in itertools.product(
                (4, 8, 16), (4, 8), (256, 512, 1024), (1, 2, 3, 4, 6, 8)
            )
            if warps <= rows and stages <= _triton.cdiv(launch.k, block_k)
        ]
        return [t for t in tiles if both * t.num_stages * t.block_r * t.block_k in STREAM]
    if launch.kernel == "few":
        tiles = [
            Tile(rows, block_k, warps, launch.block_m, stages)
            for rows, warps, block_k, stages in itertools.product(
                (16, 32, 64, 128), (2, 4, 8), (64, 128, 256, 512), (1, 2, 3, 4, 5, 6, 8)
            )
            # A warp has a piece of 64 columns of 16 rows at least, and of its own where x is normalized.
            if 1024 * warps <= block_k * rows
            and stages <= _triton.cdiv(launch.k, block_k)
            and (not launch.norm or 64 * warps <= block_k)
            and (not launch.carry or rows >= _stream_few.SUMMED_ROWS)
        ]
        return [
            t for t in tiles if both * t.num_stages * (t.block_r + t.block_m) * t.block_k in FEW
        ]
    return [
        Tile(rows, block_k, split, launch.block_m, stages, split)
        for rows, split, block_k, stages in itertools.product(
            (8, 16, 32, 64), (2, 4, 8), (32, 64, 128, 256), (3, 4, 5)
        )
        if 4096 <= rows * split * block_k <= 16384 and 128 <= split * block_k <= 1024
    ]


def _fits(job: tuple[Launch, Tile]) -> bool:
    """Leaves a candidate in Triton's cache on disk; False where it does not fit into shared memory."""
    from triton.runtime.errors import OutOfResources

    launch, tile = job
    try:
        Case(launch, copies=1).wrong(tile)
    except OutOfResources:
        return False
    return True


class Case:
    """One linear with several weights of its own, 300 MB together unless told how many.

    With RMSNorm in front where that is part of the kernel, or what one behind is left; the library's product is
    without.
    """

    def __init__(self, launch: Launch, copies: int | None = None, device: str = "cuda") -> None:
        count = 2 if launch.gated else 1
        self.launch, self.device = launch, torch.device(device)
        self.bytes = count * launch.rows * launch.k * launch.itemsize

        def made(*shape: int) -> Tensor:
            values = torch.randn(*shape, device=device, dtype=DTYPES[launch.itemsize])
            return values * launch.k**-0.5

        copies = copies or int(3e8 / self.bytes) + 1
        self.weights = [[made(launch.rows, launch.k) for _ in range(count)] for _ in range(copies)]
        self.offsets = [i * launch.k for i in range(count)]
        self.x = made(launch.tokens, count * launch.k)
        self.norm = made(launch.k) if launch.norm else None
        self.behind = made(launch.rows) if launch.carry else None

    def ours(self, weights: list[Tensor]) -> Tensor:
        none = [None] * len(weights)
        how = {
            "pdl": _triton.supports_pdl(self.device),
            "phase": Phase.FEW if self.launch.kernel in ("few", "skinny") else Phase.DECODE,
        }
        if self.launch.op == "shrink":
            norm = ("none", None) if self.norm is None else ("rms", self.norm)
            return shrink_triton(self.x, weights, none, *norm, **how)
        if self.behind is not None:
            return expand_rms_triton(
                self.x, weights[0], None, 0, None, self.behind, pdl=how["pdl"]
            )[0]
        act = "silu_mul" if self.launch.gated else "none"
        return expand_triton(self.x, weights, none, self.offsets, None, act, **how)

    def library(self, weights: list[Tensor], x: Tensor | None = None) -> Tensor:
        x = self.x if x is None else x
        parts = [
            F.linear(x[:, at : at + w.shape[1]], w)
            for at, w in zip(self.offsets, weights, strict=True)
        ]
        return F.silu(parts[0]) * parts[1] if self.launch.gated else parts[0]

    def same_kernel(self) -> bool:
        """Whether one weight of these sizes goes where the model's several went."""
        with _tuning.recording() as asked:
            self.ours(self.weights[0])
        return [launch.kernel for launch in asked] == [self.launch.kernel]

    def wrong(self, tile: Tile) -> float:
        """Relative RMS of our result to that of fp32."""
        with _tuning.forced(tile):
            actual = self.ours(self.weights[0])
        x = self.x.double()
        if self.norm is not None:
            x = F.rms_norm(x, x.shape[-1:], self.norm.double(), 0.0)
        return decode.rel_rms(actual, self.library([w.double() for w in self.weights[0]], x))

    def us(self, tile: Tile) -> float:
        """Microseconds a call.

        Raises:
            WrongResultError: the result is further from fp32 than rounding explains.
        """
        error = self.wrong(tile)
        if not error < ERRORS[self.launch.itemsize]:
            raise WrongResultError(
                f"{self.launch} with {tile}: the relative RMS error is {error:.2e}. That is a bug "
                "of the kernel or of its compiler; please report it."
            )
        with _tuning.forced(tile):
            return self.replayed(self.ours)

    def replayed(self, call: Callable[[list[Tensor]], Tensor], replays: int = 10) -> float:
        """The median replay of one call a weight in one graph, over the number of weights."""
        call(self.weights[0])
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for weights in self.weights:
                call(weights)
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


def table(found: Sequence[Found]) -> str:
    """Aligned text: what each linear took, and takes with its best tile."""
    cells = [("", "tokens", "K", "rows", "before us", "now us", "TB/s", "cuBLAS us", "tile")]
    for one in found:
        launch, row = one.launch, one.row()
        tile = " ".join(f"{name}={row[name]}" for name in _measured.TILES[launch.kernel])
        cells.append(
            (
                f"{'gated ' if launch.gated else ''}{launch.op}",
                f"{launch.tokens}",
                f"{launch.k}",
                f"{launch.rows}",
                f"{one.before:.2f}",
                f"{row['us']:.2f}",
                f"{row['tb_s']:.2f}",
                f"{one.library:.2f}",
                tile,
            )
        )
    return "\n".join(aligned(cells))


def keep(found: Sequence[Found], path: Path) -> None:
    """Adds the fastest tiles to a table of tiles, in place of rows for the same launches.

    Raises:
        BenchError: the file cannot be written.
        TableError: it is no table of tiles.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):  # another run adds to the same table
            kept = {kernel: [] for kernel in _measured.TILES}
            if path.is_file():
                kept = _measured.read(path)
            for one in found:
                row = one.row()
                rows = kept[one.launch.kernel]
                same = [r for r in rows if all(r[name] == row[name] for name in _measured.KEY)]
                kept[one.launch.kernel] = [*(r for r in rows if r not in same), row]
            write_json(kept, path)
    except OSError as error:
        raise BenchError(f"{path} cannot be written: {error}. Set FSVD_TUNED.") from error
    _tuning.forget()


def save(found: Sequence[Found], path: str) -> None:
    """Writes all candidates with their times to a file of results."""
    rows = [
        one.launch._asdict()
        | one.row()
        | {"all_us": {str(tuple(t)): round(us, 2) for t, us in one.us.items()}}
        for one in found
    ]
    limit = decode.read_limit(torch.device("cuda"))
    where = conditions("cuda", read_limit_tb_s=round(limit / 1e12, 3))
    write_json({"conditions": where, "tried": rows}, Path(path))


def own_file() -> Path:
    """The user's table for the current GPU.

    Raises:
        BenchError: nothing says where it could be.
    """
    try:
        return _measured.own_file(torch.cuda.get_device_capability())
    except RuntimeError as error:  # no home directory
        raise BenchError(f"{error} Set FSVD_TUNED to a directory.") from error
