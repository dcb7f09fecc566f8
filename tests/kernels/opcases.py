"""What the tests of the ops share: dtypes, limits and storage orders."""

from __future__ import annotations

import pytest
import torch

from fsvd_compile.kernels import _memo, _stream

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Relative RMS error against the fp32 reference: the result is rounded, and what goes into a second
# product may be.
LIMITS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def stored(w: torch.Tensor, how: str) -> torch.Tensor:
    """`w` with the same values in another storage order; what lies between its elements is NaN."""
    if how == "transposed":
        return w.t().contiguous().t()
    if how == "padded":
        room = w.new_full((w.shape[0], w.shape[1] + 7), float("nan"))
        view = room[:, : w.shape[1]]
    elif how == "strided":
        room = w.new_full((w.shape[0], 2 * w.shape[1]), float("nan"))
        view = room[:, ::2]
    else:
        return w
    return view.copy_(w)


def made(*shape, dtype=torch.bfloat16, scale=1.0) -> torch.Tensor:
    """Normal values on the GPU."""
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


def gapped(rows: int, k: int, dtype=torch.bfloat16, scale: float = 1.0) -> torch.Tensor:
    """Rows on the GPU with a gap of 32 bytes behind each, and NaN in the gaps and behind the last row."""
    room = torch.full((rows + 1, k + 16), float("nan"), device="cuda", dtype=dtype)
    room[:rows, :k] = made(rows, k, dtype=dtype, scale=scale)
    return room[:rows, :k]


def gapped_weights(rows, ks, dtype=torch.bfloat16) -> list[torch.Tensor]:
    return [gapped(n, k, dtype, k**-0.5) for n, k in zip(rows, ks, strict=True)]


class Kernel:
    """Stands in for one of Triton's and collects what its launches are given."""

    def __init__(self):
        self.given: list[dict] = []

    def __getitem__(self, grid):
        return lambda **kwargs: self.warmup(grid=grid, **kwargs)

    def warmup(self, **kwargs):
        self.given.append(kwargs)


streamed_only = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
    reason="streamed on compute capability 9.0 only",
)


def watch_streamed(monkeypatch, module, tile: int) -> list:
    """Lets small weights stream, too, works out every launch and collects the tiles of a kernel's: argument `tile`."""
    monkeypatch.setattr(_stream, "LEAST_BYTES", 0)
    monkeypatch.setattr(_stream, "LEAST_HIDDEN", 0)
    monkeypatch.setattr(_memo, "launch", lambda key, tensors, anew: anew())
    launched = []
    launch = module.launch
    monkeypatch.setattr(module, "launch", lambda *a: launched.append(a[tile]) or launch(*a))
    return launched


STORAGE = ("contiguous", "transposed", "padded", "strided")
