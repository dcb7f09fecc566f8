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
from torch._inductor.runtime.cache_dir_utils import triton_cache_dir
from torch._subclasses.fake_tensor import FakeTensor

from fsvd_compile.kernels import (
    _triton,
    attention,
    carried,
    decode_attention,
    expand,
    rope_append,
    shrink,
)

Call = tuple[torch._ops.OpOverload, tuple]

_CUDA = {
    torch.ops.fsvd.shrink.default: shrink._cuda,
    torch.ops.fsvd.expand.default: expand._cuda,
    torch.ops.fsvd.expand_rms.default: carried._cuda_expand,
    torch.ops.fsvd.shrink_rms.default: carried._cuda_shrink,
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
    by_device: dict[torch.device, list[Call]] = {}
    for call in calls:
        by_device.setdefault(next(_tensors(call[1])).device, []).append(call)
    _choose_folder(next(iter(by_device)))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for device, own in by_device.items():
            # In a context of its own, for what the block compiles is not ours to put off. And a device by itself, for
            # Triton takes a kernel that it compiles for one device to be the same on others.
            contextvars.copy_context().run(_start, pool, own, captured, device)
        yield


def _start(
    pool: ThreadPoolExecutor, calls: list[Call], captured: bool, device: torch.device
) -> None:
    mode = _triton.triton.AsyncCompileMode(pool).__enter__()
    try:
        with _triton.compiling_only(), torch.no_grad():
            for op, arguments in calls:
                for situation in (contextlib.nullcontext, _triton.own_capture)[: 1 + captured]:
                    with next(_tensors(arguments)).fake_mode, situation():
                        _CUDA[op](*arguments)
    finally:
        for kernel in mode.future_kernels.values():
            pool.submit(_load, kernel, device)


def _choose_folder(device: torch.device) -> None:
    """Inductor chooses a folder for Triton's cache when it first makes a kernel, perhaps while ours are compiled.

    Now, then, so that the next process finds all of them in the same one.
    """
    if "TRITON_CACHE_DIR" not in os.environ and device.index is not None:
        os.environ["TRITON_CACHE_DIR"] = triton_cache_dir(device.index)


def _load(kernel: Any, device: torch.device) -> None:
    """Puts a kernel where launches look for it, and loads it; an error is the first call's to raise."""
    compiled = kernel.result(ignore_errors=True)
    if compiled is not None and device.type == "cuda":
        with torch.cuda.device(device):
            _ = compiled.run  # an attribute that is made when it is first asked for


def _tensors(arguments: Any) -> Iterable[FakeTensor]:
    leaves = torch.utils._pytree.tree_leaves(arguments)
    return (leaf for leaf in leaves if isinstance(leaf, FakeTensor))
