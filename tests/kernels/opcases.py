"""What the tests of the ops share: dtypes, limits and storage orders."""

from __future__ import annotations

import torch

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


STORAGE = ("contiguous", "transposed", "padded", "strided")
