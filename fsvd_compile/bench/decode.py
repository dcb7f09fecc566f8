"""One decode step of a factorized language model: ours beside eager, Inductor, the dense model and the read limit.

A step takes one token of every sequence, reads all weights and the KV cache, and gives logits. Its
time does not depend on values, so weights are random where no checkpoint is needed. Correctness
comes first: every variant's logits are compared with an fp32 copy of its model, and nothing is
timed if one of ours is worse than eager.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import multiprocessing
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from fsvd_compile.bench import models
from fsvd_compile.bench.stopwatch import Row, listed, measure
from fsvd_compile.errors import BenchError, WrongResultError
from fsvd_compile.factorize.select import check_keep
from fsvd_compile.kept_cache import argument
from fsvd_compile.table import aligned


@dataclasses.dataclass(frozen=True)
class Peer:
    """One way to run a step.

    Attributes:
        how: Arguments of `torch.compile`; empty for eager.
        dense: Whether it runs the dense model of the same shape instead of the factorized one.
    """

    how: Mapping[str, Any]
    dense: bool = False


PEERS = {
    "eager": Peer({}),
    "inductor": Peer({"backend": "inductor", "mode": "reduce-overhead"}),
    "inductor-max": Peer({"backend": "inductor", "mode": "max-autotune"}),
    "flashsvd-step": Peer({"backend": "flashsvd", "options": {"cuda_graphs": "step"}}),
    "flashsvd-layer": Peer({"backend": "flashsvd", "options": {"cuda_graphs": "layer"}}),
    "flashsvd-off": Peer({"backend": "flashsvd", "options": {"cuda_graphs": "off"}}),
    "dense-eager": Peer({}, dense=True),
    "dense-inductor": Peer({"backend": "inductor", "mode": "reduce-overhead"}, dense=True),
    "dense-inductor-max": Peer({"backend": "inductor", "mode": "max-autotune"}, dense=True),
    "dense-flashsvd": Peer({"backend": "flashsvd"}, dense=True),
}
MODEL = {"cpu": "tiny", "cuda": "llama-7b"}  # unless another is named
DEFAULT_PEERS = {
    "cpu": ("eager", "inductor", "flashsvd-off"),
    "cuda": ("eager", "inductor", "inductor-max", "flashsvd-step", "flashsvd-layer"),
}

ROOM = 512  # positions of the KV cache beyond the context, unless --cache says otherwise
FIRST = 4  # consecutive steps before the timing: compile and warm up, capture, replay, replay
ALLOWED = 1.1  # of eager's error
FLOOR = 1e-5  # an error that is always allowed: eager fp32 has none, and sums may be reordered


@dataclasses.dataclass(frozen=True)
class Setting:
    """What to measure; each field is an argument of `fsvd-compile bench decode`.

    Attributes:
        model: A key of `models.MODELS`, or a directory that `AutoModelForCausalLM.from_pretrained` loads; by default
            that of `MODEL` for the device.
        keep: The share of parameters of every linear layer but the head, in (0, 1]. Below 1 each is
            replaced by a `LowRankLinear` with random weights; at 1 the model stays as it is.
        round: Ranks int(keep m n / (m + n)) are rounded down to a multiple of this.
        batch: Sequences.
        context: Tokens of each sequence in the KV cache when a block of calls starts.
        cache: Positions of the KV cache; `ROOM` more than the context by default.
        peers: Keys of `PEERS`; by default those of `DEFAULT_PEERS` for the device.
        device: "cpu" or "cuda". Weights are bfloat16 on a GPU and float32 elsewhere.
        rounds: Blocks per peer and timer.
        calls: Timed calls a block; each advances the KV cache by one token.
        check: Whether to compare logits with an fp32 copy of the model before timing.
        apart: Whether each peer runs in a process of its own, one after the other, instead of all by turns in one.
            By turns they share the clocks, the heat and the neighbours of the moment, and whatever another peer
            does to the process: on an H200 every step is 1.5 to 4 % slower once something else has captured or run
            on other streams (bench/NOTES.md). Apart, a peer is timed as in a program that has only it.

    Raises:
        BenchError, FactorizeError: a field is outside what is allowed.
    """

    model: str | None = None
    keep: float = 0.5
    round: int = 16
    batch: int = 1
    context: int = 512
    cache: int | None = None
    peers: Sequence[str] | None = None
    device: str = "cpu"
    rounds: int = 10
    calls: int = 20
    check: bool = True
    apart: bool = False

    def __post_init__(self) -> None:
        _check_device(self.device)
        if self.model is None:
            self._set("model", MODEL[self.device])
        self._set("model", str(self.model))
        models.check_model(self.model)
        check_keep(self.keep)
        self._set("keep", float(self.keep))
        if self.peers is None:
            self._set("peers", DEFAULT_PEERS[self.device])
        self._set("peers", tuple(dict.fromkeys(self.peers)))
        _check_peers(self.peers, self.keep)
        for name in ("round", "batch", "context", "rounds", "calls"):
            value = getattr(self, name)
            if value < 1:
                raise BenchError(f"{name}={value}; it has to be at least 1.")
        if self.cache is None:
            self._set("cache", self.context + ROOM)
        self._check_room()

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_room(self) -> None:
        untimed = int(self.calls > 1)
        room, needed = self.cache - self.context, max(self.calls + untimed, FIRST)
        if room < needed:
            raise BenchError(
                f"cache={self.cache} is too short: context={self.context} leaves {room} positions, "
                f"and every call takes one: {needed} are needed (a block of {untimed} untimed and "
                f"{self.calls} timed calls, and at least {FIRST} first calls). Use a cache of at "
                f"least {self.context + needed}, fewer calls or a shorter context."
            )

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    @property
    def path(self) -> pathlib.Path | None:
        """Where the model is loaded from; `None` for the shapes of `models.MODELS`."""
        return None if self.model in models.MODELS else pathlib.Path(self.model)


def run(setting: Setting, say: Callable[[str], None] = lambda line: None) -> list[Row]:
    """Checks, then times every peer.

    Args:
        setting: What to measure.
        say: Called with a line of text for each thing found on the way; minutes may lie in between.

    Returns:
        Two rows per peer, in the order of `setting.peers`: "wall" and "event" (see
        `bench.measure`). `conditions["bytes"]` is what a step reads: all weights but the rows of
        embedding tables that are not looked up, and keys and values of the tokens held. `extra`
        holds the read limit of the device (TB/s) and the time it gives (`limit_ms`), the row's
        rate and share of the limit, `first_call_s` (compilation included, as fast as Inductor's
        caches on disk make it), `error` (relative RMS of the logits to fp32 over the first steps;
        `None` unchecked), and on CUDA `peak_over_weights_kv_gb`: the most memory allocated from
        the first call to the last replay before the timing, weights and KV cache not counted.

    Raises:
        BenchError: transformers is missing, the model cannot be loaded or measured this way, or the process of a
            peer is killed.
        WrongResultError: one of ours is further from fp32 than `ALLOWED` times eager.
    """
    if setting.apart and len(setting.peers) > 1:
        return _apart(setting, say)
    models.need_transformers()
    torch.manual_seed(0)
    device = torch.device(setting.device)
    limit = read_limit(device)
    say(f"read limit {limit / 1e12:.3f} TB/s")
    # All peers compile the same forward; at Dynamo's limit the last ones would silently run eagerly.
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        subjects = {
            dense: Subject(setting, 1.0 if dense else setting.keep)
            for dense in sorted({PEERS[name].dense for name in setting.peers})
        }
        steps, before, found = {}, {}, {}
        for name in setting.peers:
            subject = subjects[PEERS[name].dense]
            steps[name], found[name] = subject.prepare(PEERS[name])
            before[name] = subject.rewind
            say(_prepared(name, found[name]))
        _check_errors(
            {name: found[name]["error"] for name in setting.peers},
            {name: subjects[PEERS[name].dense].eager_error for name in setting.peers},
        )
        for subject in subjects.values():
            subject.reference = subject.logits = None
        _free()
        timed = {
            timer: measure(
                steps, before=before, device=device, tokens=setting.batch, rounds=setting.rounds,
                calls=setting.calls, warmup=1, timer=timer, phase="decode", model=setting.model,
                batch=setting.batch, context=setting.context, cache=setting.cache,
                dtype=setting.dtype, pdl=os.environ.get("FSVD_PDL", "1"), apart=setting.apart,
            )
            for timer in ("event", "wall")
        }  # fmt: skip
    rows = []
    for pair in zip(timed["wall"], timed["event"], strict=True):
        for row in pair:
            subject = subjects[PEERS[row.name].dense]
            rows.append(_complete(row, subject, limit, found[row.name]))
    return rows


def _apart(setting: Setting, say: Callable[[str], None]) -> list[Row]:
    """What `run` returns, by a fresh process for each peer, with its own copy of model, text and fp32 logits."""
    rows = []
    spawn = multiprocessing.get_context("spawn")  # a process that is forked has no CUDA
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        for name in setting.peers:
            one = dataclasses.replace(setting, peers=(name,))
            try:
                lines, found = pool.submit(_alone, one).result()
            except BrokenProcessPool as error:
                raise BenchError(
                    f"peers: the process of {name!r} was killed, by the system if memory ran out, or could not start "
                    "(its output says more). Use a smaller model or --skip-check, which keeps no fp32 copy; in a "
                    "script, call it under `if __name__ == '__main__':`."
                ) from error
            for line in lines:
                say(line)
            rows += found
    return rows


def _alone(setting: Setting) -> tuple[list[str], list[Row]]:
    lines: list[str] = []
    return lines, run(setting, lines.append)


def table(rows: Sequence[Row]) -> str:
    """Aligned text for what `run` returns: the conditions all rows share, then one line per peer.

    Rates, shares of the read limit and speed-ups (over the first row) are of the wall time.
    """
    walls = [row for row in rows if row.conditions["timer"] == "wall"]
    events = [row for row in rows if row.conditions["timer"] == "event"]
    shared = {
        key: value
        for key, value in rows[0].conditions.items()
        if all(row.conditions[key] == value for row in rows)
    }
    header = ("", "wall ms", "p20..p80", "event ms", "limit ms", "TB/s", "of limit", "tokens/s")
    cells = [(*header, "speed-up")]
    for wall, event in zip(walls, events, strict=True):
        cells.append(
            (
                wall.name,
                f"{wall.median_ms:.3f}",
                f"{wall.p20_ms:.3f}..{wall.p80_ms:.3f}",
                f"{event.median_ms:.3f}",
                f"{wall.extra['limit_ms']:.3f}",
                f"{wall.extra['tb_s']:.4f}",
                f"{100 * wall.extra['share_of_limit']:.1f} %",
                f"{wall.tokens_per_s:,.1f}",
                f"{walls[0].median_ms / wall.median_ms:.2f}x",
            )
        )
    return "\n".join([listed(shared), *aligned(cells)])


class Subject:
    """A model in the middle of a text: `context` tokens in its KV cache and the next ones given.

    All peers of a model share its cache, which may be larger than the weights: a step writes one
    token behind the context and changes nothing else, and `rewind` forgets that token.
    """

    def __init__(self, setting: Setting, keep: float) -> None:
        self.keep = keep
        self.multiple = setting.round if keep < 1 else None
        self.context = setting.context
        self.model = models.build(setting, keep)
        models.check_positions(self.model, setting)
        vocabulary = self.model.config.get_text_config().vocab_size
        size = (setting.batch, setting.context + 1)
        ids = torch.randint(0, vocabulary, size, device=self.model.device)
        self.token = ids[:, -1:].contiguous()
        self.cache = models.fill(self.model, ids[:, :-1], setting.cache)
        self.bytes = models.weight_bytes(self.model) + models.kv_bytes(self.cache, setting.context)
        head = self.model.get_output_embeddings().weight
        # Allocated before any peer runs, so that it does not count as a peer's memory.
        self.logits: torch.Tensor | None = head.new_empty(
            FIRST, setting.batch, 1, len(head), dtype=torch.float32
        )
        self.reference: torch.Tensor | None = None
        self.eager_error: float | None = None
        if setting.check:
            self.reference = self._fp32_logits()
            _free()
            self.walk(self.step(Peer({})))
            self.eager_error = rel_rms(self.logits, self.reference)

    def step(self, peer: Peer) -> Callable[[], torch.Tensor]:
        """A decode step as a callable without arguments that returns logits `[batch, 1, vocab]`."""
        forward = torch.compile(self.model, dynamic=False, **peer.how) if peer.how else self.model
        return functools.partial(_logits, forward, self.token, {argument(self.model): self.cache})

    def rewind(self) -> None:
        models.rewind(self.cache, self.context)

    def walk(self, step: Callable[[], torch.Tensor]) -> float:
        """Runs the first steps, from an empty cache behind the context, and keeps their logits.

        Returns:
            The seconds of the first one.
        """
        self.rewind()
        for layer in self.cache.layers:
            layer.keys[:, :, self.context :].zero_()
            layer.values[:, :, self.context :].zero_()
        synchronize(self.token.device)
        started = time.perf_counter()
        self.logits[0] = step()
        synchronize(self.token.device)
        seconds = time.perf_counter() - started
        for i in range(1, FIRST):
            self.logits[i] = step()
        return seconds

    def prepare(self, peer: Peer) -> tuple[Callable[[], torch.Tensor], dict[str, Any]]:
        """A peer's step, compiled and captured, and what was found on the way (see `run`)."""
        device = self.token.device
        step = self.step(peer)
        if device.type == "cuda":
            _free()
            torch.cuda.reset_peak_memory_stats(device)
            held = torch.cuda.memory_allocated(device)
        seconds = self.walk(step)
        found = {"first_call_s": round(seconds, 3), "error": None}
        if device.type == "cuda":
            extra = torch.cuda.max_memory_allocated(device) - held
            found["peak_over_weights_kv_gb"] = round(extra / 1e9, 4)
        if self.reference is not None:
            found["error"] = rel_rms(self.logits, self.reference)
        return step, found

    @torch.no_grad()
    def _fp32_logits(self) -> torch.Tensor:
        """Logits `[FIRST, batch, 1, vocab]` of an fp32 copy of the model and the cache."""
        wide = copy.deepcopy(self.model).float()
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.float(), layer.values.float()
            layer.dtype = torch.float32
            layer.cumulative_length = torch.full_like(layer.cumulative_length, self.context)
        given = {argument(wide): cache}
        return torch.stack([_logits(wide, self.token, given) for _ in range(FIRST)])


@torch.no_grad()
def _logits(forward: Callable, token: torch.Tensor, cache: dict[str, Any]) -> torch.Tensor:
    return forward(input_ids=token, use_cache=True, **cache).logits


def rel_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference over that of what is expected."""
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).square().mean() / expected.square().mean()).sqrt().item()


def read_limit(device: torch.device) -> float:
    """Bytes a second of the fastest plain sum over data far larger than any cache."""
    size = 1 << 30
    if device.type == "cuda":
        # A sum of fewer than 2**31 elements is one launch.
        size = min(7 << 30, torch.cuda.mem_get_info(device)[0] // 2)
    data = torch.ones(size // 8, dtype=torch.int64, device=device)
    # Not int32, which torch.sum copies to int64 first.
    sums = {str(dtype): data.view(dtype).sum for dtype in (torch.int64, torch.float32)}
    rows = measure(sums, device=device, rounds=3, calls=5)
    rate = data.nbytes / min(row.p20_ms for row in rows) * 1e3
    del data, sums
    _free()
    return rate


def _complete(row: Row, subject: Subject, limit: float, found: Mapping[str, Any]) -> Row:
    rate = subject.bytes / row.median_ms * 1e3
    own = {"keep": subject.keep, "rank_multiple": subject.multiple, "bytes": subject.bytes}
    extra = {
        "read_limit_tb_s": round(limit / 1e12, 6),
        "limit_ms": round(1e3 * subject.bytes / limit, 4),
        "tb_s": round(rate / 1e12, 6),
        "share_of_limit": round(rate / limit, 4),
    }
    return dataclasses.replace(row, conditions=row.conditions | own, extra=extra | dict(found))


def _prepared(name: str, found: Mapping[str, Any]) -> str:
    parts = [f"{name:<18} first call {found['first_call_s']:.1f} s"]
    if found["error"] is not None:
        parts.append(f"relative RMS to fp32 {found['error']:.3e}")
    if "peak_over_weights_kv_gb" in found:
        parts.append(f"peak over weights and KV {found['peak_over_weights_kv_gb']:.3f} GB")
    return ", ".join(parts)


def allowed(eager: float) -> float:
    """The largest error that is one of rounding, by eager's."""
    return max(ALLOWED * eager, FLOOR)


def _check_errors(errors: Mapping[str, float | None], eager: Mapping[str, float | None]) -> None:
    """Raises WrongResultError if one of ours is off. Both by peer, `eager` being eager's error on its model."""
    wrong = []
    for name, error in errors.items():
        if error is None or "flashsvd" not in name:
            continue
        if not error <= (most := allowed(eager[name])):  # also NaN
            wrong.append(f"{name} {error:.3e} (eager {eager[name]:.3e}, allowed {most:.3e})")
    if wrong:
        raise WrongResultError(
            f"WRONG RESULT, nothing is timed. Relative RMS of the logits to fp32: "
            f"{'; '.join(wrong)}. That is a bug: look for the rewrite with "
            "options={'disable': [...]} and report it. --skip-check times wrong results too."
        )


def _check_device(device: str) -> None:
    if device not in DEFAULT_PEERS:
        raise BenchError(
            f"device={device!r}; it has to be {' or '.join(DEFAULT_PEERS)} (CUDA_VISIBLE_DEVICES "
            "chooses among several GPUs)."
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise BenchError(
            "device='cuda', but torch sees no GPU. Use the device cpu, or a torch and a driver "
            "that see it (python -m torch.utils.collect_env shows both)."
        )


def check_peers(peers: Sequence[str], allowed: Mapping[str, Any]) -> None:
    """Raises BenchError unless there are peers, and all are keys of what is allowed."""
    unknown = [name for name in peers if name not in allowed]
    if unknown or not peers:
        given = ", ".join(map(repr, unknown)) or "none"
        raise BenchError(f"peers: {given} given; allowed, comma-separated: {', '.join(allowed)}.")


def _check_peers(peers: Sequence[str], keep: float) -> None:
    check_peers(peers, PEERS)
    same = [name for name in peers if PEERS[name].dense]
    if same and keep == 1:
        raise BenchError(
            f"peers: {', '.join(same)} with keep=1, where the model of the other peers is dense "
            "already. Leave dense-* out or use a keep below 1."
        )


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
