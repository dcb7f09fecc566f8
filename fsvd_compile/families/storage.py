"""Factors that a checkpoint stores otherwise than as two weights, as two weights: Dobi-SVD's 8-bit codes and
Palu's block-diagonal second factor.

Both can be larger as an ordinary pair than multiplied out; then they are multiplied out, which the summary says.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import torch

from fsvd_compile.errors import CheckpointError
from fsvd_compile.families.source import Source, torch_load

REMAPPED = "remapping_weight.pt"


@dataclasses.dataclass(frozen=True)
class Unpacked:
    """A checkpoint's tensors with every factor an ordinary weight.

    Attributes:
        tensors: Under the plain model's names; the factors as `adapters.FAMILIES` knows them.
        multiplied: The rank of each module whose factors were multiplied out to its dense weight.
        keys: Names of first factors, also of those: they tell the family when no pair is left.
    """

    tensors: dict[str, torch.Tensor]
    multiplied: dict[str, int] = dataclasses.field(default_factory=dict)
    keys: list[str] = dataclasses.field(default_factory=list)


@torch.no_grad()
def unpacked(
    source: Source, tensors: dict[str, torch.Tensor], shapes: Mapping[str, tuple[int, int]]
) -> Unpacked:
    """What is stored in a family's own way, as pairs or dense weights; all else as it is.

    Args:
        source: The checkpoint.
        tensors: Its tensors under the plain model's names.
        shapes: (out, in) of the plain model's linear modules.

    Raises:
        CheckpointError: something of such a layout is there but incomplete, of other shapes, or not finite.
    """
    out = Unpacked(dict(tensors))
    if (source.folder / REMAPPED).is_file():
        _add_remapped(out, source, shapes)
    _add_grouped(out, source, shapes)
    return out


def _add(out: Unpacked, name: str, u: torch.Tensor, v: torch.Tensor, keys: tuple[str, str]) -> None:
    """The pair under the `keys` of V and U, or the product where that has no more parameters."""
    (m, rank), n = u.shape, v.shape[1]
    out.keys.append(f"{name}.{keys[0]}")
    if rank * (m + n) < m * n:
        out.tensors[f"{name}.{keys[0]}.weight"] = v
        out.tensors[f"{name}.{keys[1]}.weight"] = u
    else:
        product = (u.float() @ v.float()).to(u.dtype)
        if not product.isfinite().all():
            raise CheckpointError(f"{name}: U V of rank {rank} does not fit into {u.dtype}.")
        out.tensors[f"{name}.weight"] = product
        out.multiplied[name] = rank


# Dobi-SVD.


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


def _add_remapped(out: Unpacked, source: Source, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Dobi-SVD's remapped weights (arXiv 2502.02723; `modules/remapping.py` of wangqinsi1/Dobi-SVD).

    Per module and rank the first min(out, in) entries of U's column and of V's row as 8-bit codes with a scale
    each, the rest of the longer of the two in fp16: `us_quan` and `vt_quan` `[k, min]` uint8, `us_absmax`
    and `vt_absmax` `[k]`, `tuple_info` ("us", `[out - in, k]`), ("vt", `[k, in - out]`) or None. As in the
    family's loader the factors are fp16, and take the place of a weight that stands in the model's file too.
    """
    file = source.folder / REMAPPED
    modules = torch_load(file)
    if not isinstance(modules, dict) or not modules:
        raise CheckpointError(f"{file} holds a {type(modules).__name__}, not a dict of modules.")
    for name, entry in modules.items():
        if name not in shapes:
            raise CheckpointError(
                f"{file} holds factors of {str(name)[:80]!r}, which is no linear module of the model that "
                "config.json describes."
            )
        u, v = _remapped(f"{file}: {name}", entry, *shapes[name])
        out.tensors.pop(f"{name}.weight", None)
        _add(out, name, u, v, ("vt", "us"))


def _remapped(where: str, entry: Any, m: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(U `[m, k]`, V `[k, n]`) in fp16 of one module's entry."""
    names = ("us_quan", "vt_quan", "us_absmax", "vt_absmax")
    parts = [entry.get(name) if isinstance(entry, dict) else None for name in names]
    if not all(isinstance(part, torch.Tensor) for part in parts):
        raise CheckpointError(f"{where} has not all of {', '.join(names)}.")
    us, vt, us_scales, vt_scales = parts
    rank, least = (us.shape[0] if us.dim() else 0), min(m, n)
    side, tail = entry.get("tuple_info") or (None, None)
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


# Palu.

_GROUP = re.compile(r"(.+)\.U\.(\d+)\.(weight|bias)")


def _add_grouped(out: Unpacked, source: Source, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Palu's modules (arXiv 2407.21118; `HeadwiseLowRankModule` of shadowpa0327/Palu).

    `VT` `[sum of r_i, in]` and one `U.i` `[out / groups, r_i]` for each group of heads, each with its part of
    the bias. As one pair U is block-diagonal, exact, and holds zeros for all groups but one.
    """
    groups: dict[str, dict[str, dict[int, torch.Tensor]]] = {}
    for key in list(out.tensors):
        found = _GROUP.fullmatch(key)
        if found is not None and f"{found[1]}.VT.weight" in out.tensors and found[1] in shapes:
            parts = groups.setdefault(found[1], {"weight": {}, "bias": {}})
            parts[found[3]][int(found[2])] = out.tensors.pop(key)
    told = source.config.get("head_wise_ranks")
    for name, parts in groups.items():
        v = out.tensors.pop(f"{name}.VT.weight")
        blocks, biases = (
            [part[i] for i in sorted(part)] for part in (parts["weight"], parts["bias"])
        )
        _check_groups(name, parts, v, shapes[name], told)
        _add(out, name, torch.block_diag(*blocks), v, ("VT", "U"))
        if biases:
            last = "bias" if name in out.multiplied else "U.bias"
            out.tensors[f"{name}.{last}"] = torch.cat(biases)


def _check_groups(
    name: str,
    parts: Mapping[str, Mapping[int, torch.Tensor]],
    v: torch.Tensor,
    shape: tuple[int, int],
    told: Any,
) -> None:
    """Raises CheckpointError if a group is missing or the shapes, or the config's ranks, disagree."""
    weights, biases = parts["weight"], parts["bias"]
    count = max((*weights, *biases)) + 1
    missing = [f"U.{i}.weight" for i in range(count) if i not in weights]
    missing += [f"U.{i}.bias" for i in range(count) if biases and i not in biases]
    if missing:
        raise CheckpointError(
            f"{name} has {count} groups of heads but no {', '.join(missing[:4])}."
        )
    ranks = [weights[i].shape[-1] for i in range(count)]
    rows = shape[0] // count
    wrong = [i for i in range(count) if tuple(weights[i].shape) != (rows, ranks[i])]
    wrong += [i for i in biases if tuple(biases[i].shape) != (rows,)]
    if wrong or rows * count != shape[0] or tuple(v.shape) != (sum(ranks), shape[1]):
        given = ", ".join(str(list(weights[i].shape)) for i in range(min(count, 4)))
        raise CheckpointError(
            f"{name} [{shape[0]}, {shape[1]}]: VT {list(v.shape)} and {count} groups U {given}"
            f"{', ...' * (count > 4)}; groups have equal rows that add up to the first, ranks that add up "
            "to VT's rows, and biases of their rows."
        )
    for part in (v, *weights.values(), *biases.values()):
        if not part.is_floating_point() or not part.isfinite().all():
            raise CheckpointError(f"{name}: VT or U holds NaN, inf or {part.dtype}.")
    if isinstance(told, dict) and told.get(name, ranks) != ranks:
        raise CheckpointError(
            f"{name}: head_wise_ranks of the config says {told[name]}, the factors have {ranks}."
        )
