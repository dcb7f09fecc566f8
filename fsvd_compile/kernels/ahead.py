"""Compiling the kernels of a graph before it runs: side by side instead of one after another when they are first met.

Triton releases the interpreter lock in LLVM and waits for ptxas in another process, so threads help: the 13 kernels of
a factorized decode step take 5.8 s one after another, 3.4 s on two cores (sm_90, Triton 3.7, compiled without a GPU).
That these are the kernels which the launchers then ask for is tested there too. Up to Triton 3.6 a C compiler builds
the launcher of every signature as well: 2.2 s of such a step's first call (H200, one after another).
"""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from fsvd_compile.kernels import (
    _triton,
    attention,
    decode_attention,
    expand,
    rope_append,
    shrink,
)

Call = tuple[torch._ops.OpOverload, tuple]

_CUDA = {
    torch.ops.fsvd.shrink.default: shrink._cuda,
    torch.ops.fsvd.expand.default: expand._cuda,
    torch.ops.fsvd.rope_append.default: rope_append._cuda,
    torch.ops.fsvd.attention.default: attention._cuda,
    torch.ops.fsvd.decode_attention.default: decode_attention._cuda,
}


@contextlib.contextmanager
def compiling_ahead(calls: Iterable[Call], captured: bool) -> Iterator[None]:
    """Compile and load what the launchers of these ops would launch while the block runs; its end waits for the rest.

    A kernel is the one that will run if the tensors lie as the fake ones say, in storages at multiples of 16 bytes, as
    allocators give them; otherwise the first call compiles it. The block itself may not launch any of them.

    Args:
        calls: Ops of this package with their arguments, tensors fake, of static shape and on a CUDA device.
        captured: Whether the graph is captured in a CUDA graph later, where some kernels are other ones.
    """
    calls = list(calls)
    if not calls or _triton.triton is None or _triton.interpreted():
        yield  # nothing is compiled; without Triton the ops say so when they are called
        return
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        # In a context of its own, for what the block compiles is not ours to put off.
        started = contextvars.copy_context().run(_start, pool, calls, captured)
        for kernel, device in started:
            pool.submit(_load, kernel, device)
        yield


def _start(
    pool: ThreadPoolExecutor, calls: list[Call], captured: bool
) -> list[tuple[Any, torch.device]]:
    """Kernels that are being compiled, and the devices that they are for; others are there already."""
    started: list[tuple[Any, torch.device]] = []
    mode = _triton.triton.AsyncCompileMode(pool).__enter__()
    with _triton.compiling_only(), torch.no_grad():
        for op, arguments in calls:
            tensor = next(_tensors(arguments))
            for situation in (contextlib.nullcontext, _triton.own_capture)[: 1 + captured]:
                with tensor.fake_mode, situation():
                    _CUDA[op](*arguments)
            kernels = [*mode.future_kernels.values()][len(started) :]
            started += [(kernel, tensor.device) for kernel in kernels]
    return started


def _load(kernel: Any, device: torch.device) -> None:
    """Puts a kernel where launches look for it, and loads it; an error is the first call's to raise."""
    compiled = kernel.result(ignore_errors=True)
    if compiled is not None and device.type == "cuda":
        with torch.cuda.device(device):
            _ = compiled.run  # an attribute that is made when it is first asked for


def _tensors(arguments: Any) -> Iterable[FakeTensor]:
    leaves = torch.utils._pytree.tree_leaves(arguments)
    return (leaf for leaf in leaves if isinstance(leaf, FakeTensor))
