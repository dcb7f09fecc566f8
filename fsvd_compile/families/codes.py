"""Factors as 8-bit codes of bitsandbytes' dynamic type, expanded to fp16 as the families' own loaders do."""

from __future__ import annotations

import functools
from typing import Any

import torch

from fsvd_compile.errors import CheckpointError


@functools.cache
def dynamic_map() -> torch.Tensor:
    """The 256 values of bitsandbytes' signed dynamic 8-bit type, rising, in fp32.

    A code has a sign, a decimal exponent of 0 to -6 written in unary, and a linear fraction in the bits that
    are left: of each decade from 1e-6 to 1 the centres of 2^i equal parts of [0.1, 1], i = 0 for the
    lowest. 0 and 1 fill the two codes left over, so the least value is about -0.993, not -1.
    (arXiv 1511.04561 and 2110.02861; `create_dynamic_map` of bitsandbytes/functional.py.)
    """
    values = [torch.tensor([0.0, 1.0])]
    for bits in range(7):
        edges = torch.linspace(0.1, 1, 2**bits + 1)
        centres = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (bits - 6)
        values += [centres, -centres]
    return torch.cat(values).sort().values


def dequantized(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """`codes [r, n]` of `dynamic_map`, each row times its entry of `scales [r]`, in fp32."""
    return dynamic_map()[codes.long()] * scales.float()[:, None]


def remapped(where: str, entry: Any, m: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(U `[m, k]`, V `[k, n]`) in fp16 of a module `[m, n]` that Dobi-SVD remapped.

    Per rank the first min(m, n) entries of U's column and of V's row are 8-bit codes with a scale each, the rest
    of the longer of the two is fp16 (arXiv 2502.02723; `modules/remapping.py` of wangqinsi1/Dobi-SVD):
    `us_quan` and `vt_quan` `[k, min]` uint8, `us_absmax` and `vt_absmax` `[k]`, `tuple_info` ("us",
    `[m - n, k]`), ("vt", `[k, n - m]`) or None.

    Raises:
        CheckpointError: a part is missing, of another shape or dtype, or not finite.
    """
    names = ("us_quan", "vt_quan", "us_absmax", "vt_absmax")
    parts = [entry.get(name) if isinstance(entry, dict) else None for name in names]
    if not all(isinstance(part, torch.Tensor) for part in parts):
        raise CheckpointError(f"{where} has not all of {', '.join(names)}.")
    us, vt, us_scales, vt_scales = parts
    rank, least = (us.shape[0] if us.dim() else 0), min(m, n)
    info = entry.get("tuple_info")
    side, tail = info if isinstance(info, tuple | list) and len(info) == 2 else (None, None)
    expected = {
        "us_quan": (us, torch.uint8, (rank, least)),
        "vt_quan": (vt, torch.uint8, (rank, least)),
        "us_absmax": (us_scales, us_scales.dtype, (rank,)),
        "vt_absmax": (vt_scales, vt_scales.dtype, (rank,)),
    }
    if m != n:
        shape = (m - n, rank) if m > n else (rank, n - m)
        expected["tuple_info"] = (tail, torch.float16, shape)
    for part, (tensor, dtype, shape) in expected.items():
        fits = isinstance(tensor, torch.Tensor) and tuple(tensor.shape) == shape
        if not fits or tensor.dtype != dtype or rank < 1:
            given = (
                f"{list(tensor.shape)} {tensor.dtype}"
                if isinstance(tensor, torch.Tensor)
                else type(tensor).__name__
            )
            raise CheckpointError(
                f"{where}: {part} is {given}; for a module [{m}, {n}] of rank {rank} it has to be "
                f"{list(shape)} {dtype}."
            )
        if dtype.is_floating_point and not tensor.isfinite().all():
            raise CheckpointError(f"{where}: {part} holds NaN or inf.")
    if side != ("us" if m > n else "vt" if m < n else None):
        raise CheckpointError(
            f"{where}: tuple_info names {side!r} as the longer factor of a module [{m}, {n}]."
        )
    u, v = dequantized(us, us_scales).T.half(), dequantized(vt, vt_scales).half()
    if m > n:
        u = torch.cat((u, tail))
    elif m < n:
        v = torch.cat((v, tail), dim=1)
    return u.contiguous(), v


def rowwise(where: str, codes: Any, scales: Any) -> torch.Tensor:
    """`codes [rows, n]`, uint8, with a scale for each row, in fp16: ZS-SVD's form of any weight.

    Raises:
        CheckpointError: they do not fit together, or a scale is not finite.
    """
    fits = isinstance(codes, torch.Tensor) and isinstance(scales, torch.Tensor)
    if (
        not fits
        or codes.dtype != torch.uint8
        or codes.dim() != 2
        or scales.shape != codes.shape[:1]
    ):
        given = (
            f"{list(t.shape)} {t.dtype}" if isinstance(t, torch.Tensor) else type(t).__name__
            for t in (codes, scales)
        )
        raise CheckpointError(
            f"{where}: codes and scales are {', '.join(given)}; they have to be [rows, n] uint8 and [rows]."
        )
    if not scales.isfinite().all():
        raise CheckpointError(f"{where}: scales hold NaN or inf.")
    return dequantized(codes, scales).half()
