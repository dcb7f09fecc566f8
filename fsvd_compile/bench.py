"""One stopwatch: interleaved blocks of calls, medians, and the conditions they were taken under."""

from __future__ import annotations

import dataclasses
import gc
import importlib.metadata
import itertools
import json
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class Row:
    """The time of one variant.

    Attributes:
        name: The variant.
        median_ms: Median time of a call, milliseconds.
        p20_ms: 20th percentile.
        p80_ms: 80th percentile.
        calls: How many calls were timed.
        tokens: Tokens one call processes over the whole batch.
        conditions: What the number holds for, see `conditions`.
    """

    name: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    calls: int
    tokens: int
    conditions: dict[str, Any]

    @property
    def tokens_per_s(self) -> float:
        return 1e3 * self.tokens / self.median_ms


def measure(
    variants: Mapping[str, Callable[[], Any]],
    *,
    device: torch.device | str = "cpu",
    tokens: int = 1,
    rounds: int = 5,
    calls: int = 10,
    warmup: int = 3,
    before: Mapping[str, Callable[[], Any]] | None = None,
    **given: Any,
) -> list[Row]:
    """Times callables under the same conditions.

    Every round runs each variant for a block of consecutive calls, so that clocks, neighbours and
    heat drift over all of them alike, while within a block caches are as warm as in real use. The
    first call of a block is not timed, unless a block is a single call. On CUDA the times are
    between events around each call, in the order the GPU runs them: they include waiting for the
    host.

    Args:
        variants: Name to callable without arguments.
        device: Where the callables run.
        tokens: Tokens one call processes, for `Row.tokens_per_s`.
        rounds: Blocks per variant.
        calls: Timed calls per block.
        warmup: Untimed calls per variant before the first round (compilation, autotuning).
        before: Name to callable that runs untimed before the warm-up and before each block, such as
            resetting a KV cache.
        **given: Further conditions to record: dtype, batch, context, ...

    Returns:
        One row per variant, in the order given.

    Raises:
        ValueError: no variants, or rounds, calls below 1.
    """
    if not variants or rounds < 1 or calls < 1:
        raise ValueError(
            f"measure: {len(variants)} variants, rounds={rounds}, calls={calls}; each has to be at "
            f"least 1."
        )
    device = torch.device(device)
    before = before or {}
    timer = _cuda_block if device.type == "cuda" else _cpu_block
    for name, variant in variants.items():
        before.get(name, _nothing)()
        for _ in range(warmup):
            variant()
    times: dict[str, list[float]] = {name: [] for name in variants}
    gc.collect()
    for _ in range(rounds):
        for name, variant in variants.items():
            before.get(name, _nothing)()
            if calls > 1:
                variant()
            times[name] += timer(variant, calls)
    where = conditions(device, **given)
    return [_row(name, values, tokens, where) for name, values in times.items()]


def conditions(device: torch.device | str, **given: Any) -> dict[str, Any]:
    """Versions, device and threads, and whatever is given (dtypes are written as names)."""
    device = torch.device(device)
    found = {
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "triton": _version("triton"),
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
    }
    if device.type == "cuda":
        found["cuda"] = torch.version.cuda
    else:
        found["threads"] = torch.get_num_threads()
    plain = {
        key: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
        for key, value in given.items()
    }
    return found | plain


def table(rows: Sequence[Row]) -> str:
    """Aligned text: the conditions, then one line per row; speed-ups are over the first row."""
    if not rows:
        return "(nothing measured)"
    header = ("", "ms", "p20..p80", "tokens/s", "speed-up")
    cells = [header] + [
        (
            row.name,
            f"{row.median_ms:.2f}",
            f"{row.p20_ms:.2f}..{row.p80_ms:.2f}",
            f"{row.tokens_per_s:,.1f}",
            f"{rows[0].median_ms / row.median_ms:.2f}x",
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    lines = [", ".join(f"{key} {value}" for key, value in rows[0].conditions.items())]
    for line in cells:
        pairs = list(zip(line, widths, strict=True))
        lines.append("  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(pairs)))
    return "\n".join(lines)


def save(rows: Sequence[Row], path: str | pathlib.Path) -> None:
    """Writes the rows as JSON, a list of objects with `tokens_per_s` included."""
    entries = [dataclasses.asdict(row) | {"tokens_per_s": row.tokens_per_s} for row in rows]
    pathlib.Path(path).write_text(json.dumps(entries, indent=1) + "\n")


def _nothing() -> None:
    pass


def _cpu_block(variant: Callable[[], Any], calls: int) -> list[float]:
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        variant()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def _cuda_block(variant: Callable[[], Any], calls: int) -> list[float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        variant()
        event.record()
    torch.cuda.synchronize()
    return [first.elapsed_time(second) for first, second in itertools.pairwise(events)]


def _row(name: str, times: list[float], tokens: int, where: dict[str, Any]) -> Row:
    tenths = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else times * 9
    return Row(name, statistics.median(times), tenths[1], tenths[7], len(times), tokens, where)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
