"""What every Triton kernel here shares: guarded import, device facts, launch, small jit functions.

Nothing in this file touches a GPU at import, and without Triton it still imports: the jit functions
then stay plain Python functions that nobody calls, and `require_triton` says what is missing.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
from collections.abc import Iterator
from typing import Any

import torch

from fsvd_compile.errors import DeviceError

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None
    tl = None

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def jit(fn):
    """`triton.jit`, or the function itself where Triton is not installed."""
    return fn if triton is None else triton.jit(fn)


def require_triton(tensor: torch.Tensor) -> None:
    """Raises DeviceError unless a Triton kernel can run on `tensor`."""
    if triton is None:
        raise DeviceError(
            "a Triton kernel was asked for, but the triton package is not installed; "
            'install triton>=3.6 or take the ATen path (options={"kernels": "aten"}).'
        )
    if tensor.device.type == "cpu" and not interpreted():
        raise DeviceError(
            "a Triton kernel was asked for on CPU tensors; that works only through Triton's "
            "interpreter: set TRITON_INTERPRET=1 before the first import, or take the ATen path."
        )
    if tensor.dtype not in TRITON_DTYPES:
        raise DeviceError(
            f"a Triton kernel was asked for on {tensor.dtype}; the kernels take "
            f"{', '.join(map(str, TRITON_DTYPES))}; cast, or take the ATen path."
        )


def interpreted() -> bool:
    """Whether kernels run through Triton's interpreter (decided when they were decorated)."""
    return triton is not None and not isinstance(_touch, triton.runtime.JITFunction)


@functools.cache
def capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of a CUDA device, None for any other, for ROCm and without CUDA."""
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    return torch.cuda.get_device_capability(device)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side: SMs of a GPU; 4 stands for a CPU (interpreter, tests)."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory a program may use; untold, what every GPU since sm_80 has."""
    if device.type != "cuda":
        return 99 * 1024
    found = torch.cuda.get_device_properties(device)
    return getattr(found, "shared_memory_per_block_optin", 99 * 1024)


@functools.cache
def supports_pdl(device: torch.device) -> bool:
    """Whether kernels use programmatic dependent launch: from sm_90 on, unless `FSVD_PDL=0`."""
    found = capability(device)
    return found is not None and found >= (9, 0) and os.environ.get("FSVD_PDL", "1") != "0"


_own_capture = contextvars.ContextVar("fsvd_own_capture", default=False)


@contextlib.contextmanager
def own_capture() -> Iterator[None]:
    """Marks the capture of one CUDA graph of this package, which holds one call of a compiled graph."""
    token = _own_capture.set(True)
    try:
        yield
    finally:
        _own_capture.reset(token)


def in_own_capture() -> bool:
    return _own_capture.get()


_compiling_only = contextvars.ContextVar("fsvd_compiling_only", default=False)


@contextlib.contextmanager
def compiling_only() -> Iterator[None]:
    """Inside, `launch` compiles a kernel for its arguments, fake tensors perhaps, and does not run it."""
    token = _compiling_only.set(True)
    try:
        yield
    finally:
        _compiling_only.reset(token)


def is_compiling_only() -> bool:
    return _compiling_only.get()


_told: contextvars.ContextVar[list[tuple] | None] = contextvars.ContextVar(
    "fsvd_told", default=None
)


@contextlib.contextmanager
def recording() -> Iterator[list[tuple]]:
    """Collects what `launch` is given inside: (kernel, grid, device, pdl, its other arguments)."""
    token = _told.set([])
    try:
        yield _told.get()
    finally:
        _told.reset(token)


def near(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy where elements of a row are further apart than a kernel's 32 bits say."""
    if (tensor.shape[-1] - 1) * tensor.stride(-1) < 1 << 31:
        return tensor
    return tensor.contiguous()


def aligned(tensor: torch.Tensor) -> bool:
    """Whether a tensor begins at a multiple of 16 bytes; inside `compiling_only` its storage is taken to."""
    if _compiling_only.get():
        return tensor.storage_offset() * tensor.element_size() % 16 == 0
    return tensor.data_ptr() % 16 == 0


class _Unread:
    """What Triton asks of a tensor to choose a kernel: its dtype, and whether its address is a multiple of 16."""

    def __init__(self, tensor: torch.Tensor):
        self.dtype = tensor.dtype
        self._address = 0 if aligned(tensor) else tensor.element_size()

    def data_ptr(self) -> int:
        return self._address


def unread(argument: Any) -> Any:
    """A kernel argument; inside `compiling_only` without its tensors."""
    if not _compiling_only.get():
        return argument
    if isinstance(argument, (tuple, list)):
        return type(argument)(map(unread, argument))
    return _Unread(argument) if isinstance(argument, torch.Tensor) else argument


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, pdl: bool, **kwargs: Any):
    """Runs `kernel` on `device`, whichever CUDA device is current."""
    if (told := _told.get()) is not None:
        told.append((kernel, grid, device, pdl, dict(kwargs)))
    if pdl:
        kwargs["launch_pdl"] = True
    if "TRITON_DEFAULT_FP_FUSION" not in os.environ:
        # The default up to Triton 3.9, which warns that 3.10 has another.
        kwargs["enable_fp_fusion"] = True
    elsewhere = device.type == "cuda" and device.index not in (None, torch.cuda.current_device())
    with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
        if _compiling_only.get():
            arguments = {name: unread(argument) for name, argument in kwargs.items()}
            kernel.warmup(USE_PDL=pdl, grid=grid, **arguments)
        else:
            kernel[grid](USE_PDL=pdl, **kwargs)


def strides(name: str, tensor: torch.Tensor, dims: str) -> dict[str, int]:
    """Kernel arguments `stride_<name><dim>`, a letter of `dims` for each leading dimension."""
    return {f"stride_{name}{dim}": tensor.stride(i) for i, dim in enumerate(dims)}


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


@jit
def pick_pointer(which, items, COUNT: tl.constexpr):
    """items[which] of a tuple of pointers, by branches: Triton has no dynamic index into one."""
    out = items[0]
    for i in tl.static_range(1, COUNT):
        if which == i:
            out = items[i]
    return out


@jit
def pick_int(which, items, COUNT: tl.constexpr):
    """items[which] of a tuple of ints, as int64: strides and offsets end up in addresses."""
    out = tl.cast(items[0], tl.int64)
    for i in tl.static_range(1, COUNT):
        out = tl.where(which == i, tl.cast(items[i], tl.int64), out)
    return out


@jit
def pick_size(which, items, COUNT: tl.constexpr):
    """items[which] of a tuple of ints, as int32: sizes are compared with indices.

    In 64 bits the comparison costs two instructions, and Triton 3.6 (LLVM) gets the index wrong where
    two of them widen side by side: it drops the mask of `tid & 31` (seen in fp32 tiles in a K loop).
    """
    out = tl.cast(items[0], tl.int32)
    for i in tl.static_range(1, COUNT):
        out = tl.where(which == i, tl.cast(items[i], tl.int32), out)
    return out


@jit
def activate(x, ACT: tl.constexpr):
    """An activation of fp32 values; `gelu_tanh` uses 0.5 * (1 + tanh(u)) = sigmoid(2u)."""
    if ACT == "relu":
        x = tl.where(x < 0, 0.0, x)
    elif ACT == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACT == "silu":
        x = x * tl.sigmoid(x)
    return x


@jit
def tile_statistics(x, valid, K, eps):
    """LayerNorm's (mean, 1 / root) of the K valid values of an fp32 tile; the variance is about the mean."""
    mean = tl.sum(x, axis=0) / K
    x = tl.where(valid, x - mean, 0.0)
    return mean, tl.rsqrt(tl.sum(x * x, axis=0) / K + tl.cast(eps, tl.float32))


@jit
def norm_statistics(
    x, stride, K, eps, NORM: tl.constexpr, BLOCK_K: tl.constexpr, NUM_K: tl.constexpr
):
    """(mean, 1 / root) of either norm, of K values at `x` that do not fit one tile."""
    k = tl.arange(0, BLOCK_K)
    mean = 0.0
    if NORM == "layer":
        total = tl.zeros([BLOCK_K], tl.float32)
        for i in range(NUM_K):
            at = i * BLOCK_K + k
            total += tl.load(x + at * stride, mask=at < K, other=0.0).to(tl.float32)
        mean = tl.sum(total, axis=0) / K
    square = tl.zeros([BLOCK_K], tl.float32)
    for i in range(NUM_K):
        at = i * BLOCK_K + k
        value = tl.load(x + at * stride, mask=at < K, other=0.0).to(tl.float32)
        if NORM == "layer":
            value = tl.where(at < K, value - mean, 0.0)
        square += value * value
    return mean, tl.rsqrt(tl.sum(square, axis=0) / K + tl.cast(eps, tl.float32))


@jit
def norm_parameters(
    weight,
    bias,
    at,
    K,
    offset,
    NORM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """(weight, bias) of the norm at columns `at`, fp32; static, so a kernel need not wait."""
    w = 1.0
    b = 0.0
    if HAS_WEIGHT:
        w = tl.load(weight + at, mask=at < K, other=0.0).to(tl.float32)
        if NORM == "rms":
            w += tl.cast(offset, tl.float32)
    if HAS_BIAS:
        b = tl.load(bias + at, mask=at < K, other=0.0).to(tl.float32)
    return w, b


@jit
def norm_apply(x, mean, rstd, weight, bias, NORM: tl.constexpr):
    """Normalized fp32 values; columns past K come out finite."""
    if NORM == "layer":
        x = x - mean
    if NORM != "none":
        x = x * rstd * weight + bias
    return x


@jit
def locate(
    pid, N, N_ALIGN: tl.constexpr, COUNT: tl.constexpr, BLOCK_R: tl.constexpr, STEP: tl.constexpr
):
    """(which weight, its first row here, its first output column) of a program whose rows are STEP apart."""
    which = 0
    first = 0
    column = 0
    for i in tl.static_range(0, COUNT - 1):
        n = N[i] * N_ALIGN
        here = tl.cdiv(n, BLOCK_R * STEP) * STEP
        past = pid >= first + here
        past = past & (which == i)
        which = tl.where(past, i + 1, which)
        first = tl.where(past, first + here, first)
        column = tl.where(past, column + n, column)
    block = pid - first
    return which, block // STEP * (BLOCK_R * STEP) + block % STEP, column


@jit
def weight_offsets(rows, k, stride_r, stride_k, LAYOUT: tl.constexpr):
    """Offsets of a tile; `rows` and `k` come shaped to broadcast."""
    if LAYOUT == "row":
        return rows * stride_r + k
    elif LAYOUT == "col":
        return rows + k * stride_k
    else:
        return rows * stride_r + k * stride_k


@jit
def _touch():
    pass
