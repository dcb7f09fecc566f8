"""One stopwatch: interleaved blocks of calls, medians, and the conditions they were taken under."""

from __future__ import annotations

import dataclasses
import gc
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fsvd_compile.errors import BenchError
from fsvd_compile.table import aligned


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
        extra: What else was measured for the variant: its error, its memory, ...
    """

    name: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    calls: int
    tokens: int
    conditions: dict[str, Any]
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

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
    timer: str = "event",
    **given: Any,
) -> list[Row]:
    """Times callables under the same conditions.

    Every round runs each variant for a block of consecutive calls, so that clocks, neighbours and
    heat drift over all of them alike, while within a block caches are as warm as in real use. The
    first call of a block is not timed, unless a block is a single call.

    `timer="event"` times every call of a block: on CUDA between events around it, in the order the
    GPU runs them (they include waiting for the host); elsewhere by the host's clock.
    `timer="wall"` times the block as a whole by the host's clock, from an idle device to an idle
    device without a synchronisation in between, and divides by the number of calls. Medians and
    percentiles are over calls for "event" and over blocks for "wall".

    Args:
        variants: Name to callable without arguments.
        device: Where the callables run.
        tokens: Tokens one call processes, for `Row.tokens_per_s`.
        rounds: Blocks per variant.
        calls: Timed calls per block.
        warmup: Untimed calls per variant before the first round (compilation, autotuning).
        before: Name to callable that runs untimed before the warm-up and before each block, such as
            resetting a KV cache.
        timer: "event" or "wall"; written into the rows' conditions with the calls of a block.
        **given: Further conditions to record: dtype, batch, context, ...

    Returns:
        One row per variant, in the order given.

    Raises:
        ValueError: no variants, rounds or calls below 1, or an unknown timer.
    """
    if not variants or rounds < 1 or calls < 1:
        raise ValueError(
            f"measure: {len(variants)} variants, rounds={rounds}, calls={calls}; each has to be at "
            f"least 1."
        )
    if timer not in ("event", "wall"):
        raise ValueError(f'measure: timer={timer!r}; it has to be "event" or "wall".')
    device = torch.device(device)
    before = before or {}
    clock = _CLOCKS[timer, device.type == "cuda"]
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
            times[name] += clock(variant, calls)
    where = conditions(device, timer=timer, block=calls, **given)
    return [_row(name, values, rounds * calls, tokens, where) for name, values in times.items()]


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
    return "\n".join([listed(rows[0].conditions), *aligned(cells)])


def listed(conditions: Mapping[str, Any]) -> str:
    """The conditions in one line."""
    return ", ".join(f"{key} {value}" for key, value in conditions.items())


def save(rows: Sequence[Row], path: str | pathlib.Path) -> None:
    """Writes the rows as JSON: a list of objects, with `tokens_per_s` and what `extra` holds beside
    the other fields. A file that is there is replaced."""
    write_json(_entries(rows), pathlib.Path(path))


def add(rows: Sequence[Row], path: str | pathlib.Path) -> None:
    """Adds the rows to those of a JSON file, which need not be there yet. A row takes the place of
    one with its name and equal conditions. What `load` raises is raised here.
    """
    merged = {_identity(entry): entry for entry in [*load(path), *_entries(rows)]}
    write_json(list(merged.values()), pathlib.Path(path))


def check_folder(path: str | pathlib.Path) -> pathlib.Path:
    """The path of a file that is to be written. Raises BenchError if its folder does not exist."""
    path = pathlib.Path(path)
    if not path.parent.is_dir():
        raise BenchError(f"{path}: there is no folder {path.parent}; make it first.")
    return path


def load(path: str | pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a JSON file as `save` and `add` write them; none where there is no file.

    Raises:
        BenchError: the file holds something else, or its folder does not exist.
    """
    path = check_folder(path)
    try:
        entries = json.loads(path.read_text())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise BenchError(
            f"{path} cannot be read as JSON rows ({error}); name another file, or remove this one."
        ) from error
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and {"name", "conditions"} <= entry.keys() for entry in entries
    ):
        raise BenchError(
            f'{path} is JSON, but not a list of rows with a "name" and "conditions"; name another '
            "file, or remove this one."
        )
    return entries


def _entries(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as JSON holds them."""
    entries = []
    for row in rows:
        fields = dataclasses.asdict(row)
        extra = fields.pop("extra")
        entries.append(fields | {"tokens_per_s": row.tokens_per_s} | extra)
    return json.loads(json.dumps(entries))


def _identity(entry: Mapping[str, Any]) -> str:
    return json.dumps([entry["name"], entry["conditions"]], sort_keys=True)


def write_json(value: Any, path: pathlib.Path) -> None:
    """Writes a file whole or not at all: readers, and a run that is interrupted, never see half of it.

    Raises:
        OSError: it cannot be written.
    """
    path = path.resolve()
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(json.dumps(value, indent=1) + "\n")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _nothing() -> None:
    pass


def _cpu_event(variant: Callable[[], Any], calls: int) -> list[float]:
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        variant()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def _cuda_event(variant: Callable[[], Any], calls: int) -> list[float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        variant()
        event.record()
    torch.cuda.synchronize()
    return [first.elapsed_time(second) for first, second in itertools.pairwise(events)]


def _cpu_wall(variant: Callable[[], Any], calls: int) -> list[float]:
    start = time.perf_counter()
    for _ in range(calls):
        variant()
    return [1e3 * (time.perf_counter() - start) / calls]


def _cuda_wall(variant: Callable[[], Any], calls: int) -> list[float]:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        variant()
    torch.cuda.synchronize()
    return [1e3 * (time.perf_counter() - start) / calls]


# By timer and whether the device is CUDA: milliseconds a call, one or more samples a block.
_CLOCKS = {
    ("event", False): _cpu_event,
    ("event", True): _cuda_event,
    ("wall", False): _cpu_wall,
    ("wall", True): _cuda_wall,
}


def _row(name: str, times: list[float], calls: int, tokens: int, where: dict[str, Any]) -> Row:
    tenths = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else times * 9
    return Row(name, statistics.median(times), tenths[1], tenths[7], calls, tokens, where)


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
