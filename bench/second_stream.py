"""What work on another stream does to a captured decode step: its time before, and after each piece of such work.

    python bench/second_stream.py --model llama-7b --by kernel --json FILE

The same graph is replayed at the same addresses throughout, on the current stream, with nothing else on the device;
only what has happened to the process differs. bench/NOTES.md says what was found.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from fsvd_compile import bench
from fsvd_compile.bench import decode, models
from fsvd_compile.cuda_graph import CudaApi


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama-7b", help="as in `fsvd-compile bench decode`")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--cache", type=int)
    parser.add_argument("--by", choices=WORK, default="kernel", help="what is done between timings")
    parser.add_argument("--times", type=int, default=8)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("second_stream: streams are those of a GPU and there is none.")
    setting = decode.Setting(
        model=args.model, keep=args.keep, context=args.context, cache=args.cache, device="cuda",
        peers=("flashsvd-step",), rounds=6, apart=True,
    )  # fmt: skip
    if args.json:
        bench.load(args.json)  # which says what is wrong with it
    run(setting, args.by, args.times, args.json)


def run(setting: decode.Setting, by: str, times: int, path: str | None) -> None:
    torch.manual_seed(0)
    limit = decode.read_limit(torch.device("cuda", 0))
    subject = decode.Subject(setting, setting.keep)
    step = subject.step(decode.PEERS["flashsvd-step"])
    subject.walk(step)
    error = decode.rel_rms(subject.logits, subject.reference)
    if not error <= decode.allowed(subject.eager_error):  # also NaN
        sys.exit(f"second_stream: wrong logits, nothing is timed; relative RMS to fp32 {error:.3e}")
    print(f"read limit {limit / 1e12:.3f} TB/s, relative RMS to fp32 {error:.3e}", flush=True)
    x = torch.zeros(1000, device="cuda")
    work = functools.partial(WORK[by], x)
    for done in range(times + 1):
        if done:
            work()
            torch.cuda.synchronize()
        name = f"after {done} x {by}"
        rows = bench.measure(
            {name: step}, before={name: functools.partial(models.rewind, subject.cache, setting.context)},
            device="cuda", rounds=setting.rounds, calls=setting.calls, warmup=1, timer="event", phase="decode",
            model=setting.model, keep=setting.keep, batch=setting.batch, context=setting.context,
            cache=setting.cache, dtype=setting.dtype, by=by,
        )  # fmt: skip
        rows[0].extra.update(error=error, read_limit_tb_s=round(limit / 1e12, 6))
        print(f"{name:<24} {rows[0].median_ms:.4f} ms", flush=True)
        if path:
            bench.add(rows, path)


def nothing(x: torch.Tensor) -> None:
    """On no other stream: what the others are compared with."""
    x.add_(1)


def kernel(x: torch.Tensor) -> None:
    with torch.cuda.stream(_other()):
        x.add_(1)


def copy(x: torch.Tensor) -> None:
    with torch.cuda.stream(_other()):
        x.copy_(torch.ones(len(x)).pin_memory(), non_blocking=True)
        torch.cuda.current_stream().synchronize()


def capture(x: torch.Tensor) -> None:
    """A graph of one kernel, never replayed; before it torch runs two kernels on the stream of the capture."""
    _graphs.append(torch.cuda.CUDAGraph())
    with torch.cuda.graph(_graphs[-1]):
        x.add_(1)


def ours(x: torch.Tensor) -> None:
    """The same by this package, which keeps those two off the stream."""
    _graphs.append(_api().capture(lambda x: [x + 1], [x], _pool(), x.device))


def destroyed(x: torch.Tensor) -> None:
    """On a stream that is gone afterwards, as none of torch's own ever is."""
    with _own() as stream, torch.cuda.stream(stream):
        x.add_(1)
        stream.synchronize()


_graphs: list = []
_api = functools.cache(CudaApi)


@functools.cache
def _pool():
    return _api().new_pool()


@functools.cache
def _other() -> torch.cuda.Stream:
    return torch.cuda.Stream()


@contextmanager
def _own() -> Iterator[torch.cuda.ExternalStream]:
    handle = ctypes.c_void_p()
    cudart = torch.cuda.cudart()
    torch.cuda.check_error(cudart.cudaStreamCreate(ctypes.addressof(handle)))
    try:
        yield torch.cuda.ExternalStream(handle.value)
    finally:
        torch.cuda.check_error(cudart.cudaStreamDestroy(handle.value))


WORK: dict[str, Callable[[torch.Tensor], None]] = {
    "nothing": nothing, "kernel": kernel, "copy": copy, "capture": capture, "ours": ours, "destroyed": destroyed,
}  # fmt: skip


if __name__ == "__main__":
    main()
