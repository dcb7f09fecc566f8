"""Factors that a checkpoint stores otherwise than as two weights, as two weights: 8-bit codes, directories of
modules, Palu's block-diagonal second factor.

Some can be larger as an ordinary pair than multiplied out; then they are multiplied out, which the summary says.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import torch

from fsvd_compile.errors import CheckpointError
from fsvd_compile.families.codes import remapped, rowwise
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
    _add_rowwise(out, source, shapes)
    _add_directories(out, source, shapes)
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


def _add_remapped(out: Unpacked, source: Source, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Dobi-SVD's remapped modules, of the file beside the model's.

    As in the family's loader they take the place of a weight that stands in the model's file too.
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
        u, v = remapped(f"{file}: {name}", entry, *shapes[name])
        out.tensors.pop(f"{name}.weight", None)
        _add(out, name, u, v, ("vt", "us"))


# ZS-SVD.


def _add_rowwise(out: Unpacked, source: Source, shapes: Mapping[str, tuple[int, int]]) -> None:
    """ZS-SVD's `--quantize_8_bit` (`utils/quant_utils.py` of mint-vu/Zero-Sum-SVD).

    Codes lie in the pickled model in the place of the weights, factors and dense ones alike; `mapping_info` beside
    the model has the scales of their rows, by "layer<i>.<name in the layer>".
    """
    info = source.beside.get("mapping_info")
    if info is None:
        return
    meta = info.get("meta") if isinstance(info, dict) else None
    modules = info.get("modules") if isinstance(info, dict) else None
    known = {"scheme": "bnb_rowwise_uint8", "code_kind": "dynamic_map"}
    if meta != known or not isinstance(modules, dict):
        raise CheckpointError(
            f"{source.path}: mapping_info describes {str(meta)[:80]}; {known} with a dict of modules is read."
        )
    for key, entry in modules.items():
        layer, _, inside = str(key).partition(".")
        end = f".{layer.removeprefix('layer')}.{inside}"
        names = [name for name in shapes if name.endswith(end)]
        kind = entry.get("kind") if isinstance(entry, dict) else None
        parts = {"lowrank": {"u": "u_proj.weight", "v": "v_proj.weight"}, "dense": {"w": "weight"}}
        if len(names) != 1 or kind not in parts:
            raise CheckpointError(
                f"{source.path}: mapping_info has {str(key)[:80]!r} of kind {kind!r}; it takes one module of a "
                "layer, as 'layer0.mlp.up_proj', and 'lowrank' or 'dense'."
            )
        for side, part in parts[kind].items():
            weight = f"{names[0]}.{part}"
            scales = entry.get(f"{side}_absmax")
            out.tensors[weight] = rowwise(
                f"{source.path}: {weight}", out.tensors.get(weight), scales
            )


# AA-SVD.

_DOBI = {"UK_q": "us_quan", "VK_q": "vt_quan", "UK_absmax": "us_absmax", "VK_absmax": "vt_absmax"}


def _add_directories(out: Unpacked, source: Source, shapes: Mapping[str, tuple[int, int]]) -> None:
    """AA-SVD's directories, one a module, beside the base model's files (`CompressedLinear.save` and
    `ModelAdapter.load` of atulkumarin/AA-SVD).

    Named as the module with _ for dots: `U.pt` `[out, r]` and `V.pt` `[in, r]`, or both as codes, like Dobi-SVD's
    remapped ones; of a norm that was trained further `state_dict.pt`. The bias is the base's.
    """
    found = False
    for name, (m, n) in shapes.items():
        folder = source.folder / name.replace(".", "_")
        if not folder.is_dir():
            continue
        parts = {file.stem: torch_load(file) for file in sorted(folder.glob("*.pt"))}
        if "UK_q" in parts:
            entry = {dobi: parts.get(part) for part, dobi in _DOBI.items()}
            rest = parts.get("rem")
            if m != n and isinstance(rest, torch.Tensor) and rest.dim() == 2:
                entry["tuple_info"] = ("us", rest) if m > n else ("vt", rest.T)
            u, v = remapped(str(folder), entry, m, n)
        else:
            u, v = _plain(folder, parts, m, n)
        bias = parts.get("bias")
        if isinstance(bias, torch.Tensor):
            out.tensors.setdefault(f"{name}.bias", bias)
        out.tensors.pop(f"{name}.weight", None)
        out.tensors.update({f"{name}.V.weight": v, f"{name}.U.weight": u})
        found = True
    if found:
        for key in list(out.tensors):
            name, _, parameter = key.rpartition(".")
            file = source.folder / name.replace(".", "_") / "state_dict.pt"
            if name not in shapes and file.is_file():
                trained = torch_load(file)
                value = trained.get(parameter) if isinstance(trained, dict) else None
                if not isinstance(value, torch.Tensor) or value.shape != out.tensors[key].shape:
                    raise CheckpointError(f"{file} has no {parameter} of the shape of {key}.")
                out.tensors[key] = value


def _plain(
    folder: pathlib.Path, parts: Mapping[str, Any], m: int, n: int
) -> tuple[torch.Tensor, torch.Tensor]:
    u, v, s = (parts.get(part) for part in "UVS")
    shapes = [tuple(t.shape) if isinstance(t, torch.Tensor) else None for t in (u, v)]
    rank = shapes[0][-1] if shapes[0] else 0
    if shapes != [(m, rank), (n, rank)] or s is not None:
        given = ", ".join(f"{part}.pt {shape}" for part, shape in zip("UV", shapes, strict=True))
        raise CheckpointError(
            f"{folder} has {given}{' and S.pt' * (s is not None)}; a module [{m}, {n}] takes U.pt [{m}, r] and "
            f"V.pt [{n}, r], or both as codes (UK_q.pt and its like)."
        )
    return u, v.T


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
