"""That `compiling_ahead` on fake tensors compiles the very kernels that the launchers ask for with real ones.

Run as a script by test_compile_ahead.py, as compile_ahead.py is: with a stand-in driver, on CPU tensors that are never
read. Prints which kernels were compiled ahead, which others the launchers then asked for, what they were given, and
whether Triton compiled as ever what the block itself asked for.
"""

from __future__ import annotations

import json
import sys

import compile_ahead
import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime import _async_compile

from fsvd_compile.kernels import _triton, ahead

BF16, FP16 = torch.bfloat16, torch.float16


def arguments() -> list[tuple]:
    """Calls of one layer of a decode step, as shapes; one weight and its slice lie at odd addresses."""
    t = lambda *size, dtype=BF16: torch.empty(*size, dtype=dtype)  # noqa: E731
    ops = torch.ops.fsvd
    q, kv, cache = t(1, 8, 1, 64), t(1, 4, 1, 64), t(1, 4, 128, 64)
    table, at = t(1, 1, 64), t(1, dtype=torch.int64)
    mask = t(1, 1, 1, 128, dtype=torch.bool)
    half = t(8, 1, 4096, dtype=FP16)
    odd = t(65 * 256).as_strided((64, 256), (256, 1), 1)
    x, z = t(1, 1, 256), t(1, 1, 128)
    shrink = (x, [t(64, 256), odd], [None, None], "rms", t(256), None, 1e-5, 0.0)
    expand = (z, [t(256, 64), t(256, 64)], [None, None], [0, 64], None, "silu_mul")
    return [
        (ops.shrink.default, shrink),
        (ops.shrink.default, (t(1, 1, 4096), [t(512, 4096)], [None], "rms", t(4096), None, 1e-5, 0.0)),
        (ops.shrink.default, (t(8, 1, 4096), [t(512, 4096)], [None], "rms", t(4096), None, 1e-5, 0.0)),
        (ops.shrink.default, (half, [t(512, 4096, dtype=FP16)], [None], "rms", None, None, 1e-5, 0.0)),
        (ops.expand.default, expand),
        (ops.expand_rms.default, (t(8, 1, 1024), t(4096, 1024), None, 0, t(8, 1, 4096), t(4096), 0.0)),
        (ops.shrink_rms.default, (t(8, 1, 4096), t(128, 8, dtype=torch.float32), [t(512, 4096)], [None], 1e-5)),
        (ops.expand.default, (t(1, 1, 75), [t(256, 37), t(256, 38)], [None, None], [0, 37], None, "none")),
        (ops.decode_attention.default, (q, kv, kv, table, table, cache, t(1, 4, 128, 64), at, mask, 0.1)),
        (ops.attention.default, (q, cache, cache, mask, 0.1)),
        (ops.rope_append.default, (q, kv, kv, table, table, cache, t(1, 4, 128, 64), at)),
    ]  # fmt: skip


def main() -> None:
    triton.runtime.driver.set_active(compile_ahead.Driver(90))
    _triton.capability = lambda device: (9, 0)
    _triton.multiprocessors = lambda device: 132
    _triton.shared_memory = lambda device: 232448
    _triton.require_triton = lambda tensor: None
    _triton.supports_pdl = lambda device: True
    compiled: list[str] = []
    plain = triton.runtime.JITFunction._do_compile

    def counted(self, key, *args, **kwargs):
        compiled.append(self.fn.__name__)
        return plain(self, key, *args, **kwargs)

    triton.runtime.JITFunction._do_compile = counted
    with FakeTensorMode():
        calls = arguments()
    with ahead.compiling_ahead(calls, captured=True):
        plainly = _async_compile.active_mode.get() is None
    ahead_of_time = list(compiled)

    run = triton.runtime.JITFunction.run
    given_out: set[str] = set()

    def warmed(*args, **kwargs):
        given_out.add(type(run(*args, **{**kwargs, "warmup": True})).__name__)

    triton.runtime.JITFunction.run = warmed
    for op, given in arguments():
        ahead._CUDA[op](*given)
        with _triton.own_capture():
            ahead._CUDA[op](*given)
    line = {
        "ahead": ahead_of_time,
        "later": compiled[len(ahead_of_time) :],
        "given out": sorted(given_out),
        "block as ever": plainly,
    }
    sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
