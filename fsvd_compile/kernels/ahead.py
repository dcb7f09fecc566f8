"""Compiling the kernels of a graph before it runs: side by side instead of one after another when they are first met.

Triton releases the interpreter lock in LLVM and waits for ptxas in another process, so threads help: the 13 kernels of
a factorized decode step take 5.8 s one after another, 3.4 s on two cores (sm_90, Triton 3.7, compiled without a GPU).
That these are the kernels which the launchers then ask for is tested there too.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
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


def compile_ahead(calls: Iterable[Call], captured: bool) -> None:
    """Compile what the launchers of these ops would launch.

    A kernel is the one that will run if the tensors lie as the fake ones say, in storages at multiples of 16 bytes, as
    allocators give them; otherwise the first call compiles it.

    Args:
        calls: Ops of this package with their arguments, tensors fake, of static shape and on a CUDA device.
        captured: Whether the graph is captured in a CUDA graph later, where some kernels are other ones.
    """
    calls = list(calls)
    if not calls or _triton.triton is None or _triton.interpreted():
        return  # nothing is compiled; without Triton the ops say so when they are called
    with (
        ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool,
        # An error is the first call's to raise: raised here it would leave the mode on.
        _triton.triton.AsyncCompileMode(pool, ignore_errors=True),
        _triton.compiling_only(),
        torch.no_grad(),
    ):
        for op, arguments in calls:
            for situation in (contextlib.nullcontext, _triton.own_capture)[: 1 + captured]:
                with next(_tensors(arguments)).fake_mode, situation():
                    _CUDA[op](*arguments)


def _tensors(arguments: Any) -> Iterable[FakeTensor]:
    leaves = torch.utils._pytree.tree_leaves(arguments)
    return (leaf for leaf in leaves if isinstance(leaf, FakeTensor))
