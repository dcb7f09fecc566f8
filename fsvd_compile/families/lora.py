"""PEFT's LoRA adapters on top of a checkpoint: joined to factors as further ranks, and merged into dense weights or
kept beside them.

On factors it is exact and stays one pair: U V + s B A = [U, s B] [V; A]. Beside a dense weight it is exact as a
branch, a pair of its own, and costs its bytes; merged it costs none, and is rounded to the weight's dtype.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch

from fsvd_compile.errors import CheckpointError
from fsvd_compile.families.source import memory, read, read_json

CONFIG = "adapter_config.json"
_WRAPPER = "base_model.model."
_PAIR = re.compile(r"(.+)\.lora_(?:(A|B)\.(?:[^.]+\.)?weight|embedding_(A|B)(?:\.[^.]+)?)")
# The weight itself of an adapted head or embedding, which PEFT stores with the adapter.
_BASE = re.compile(r"(.+)\.base_layer\.(weight|bias)")
# Other ways to start change the base's weights as well (PiSSA, OLoRA, CorDA, LoftQ), so that the adapter does not
# belong to the base as it is stored.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
# Settings that leave the function what it is, or are looked at here. Any other that is set may make another function of
# A and B (DoRA, aLoRA, KaSA) or another base: there are more with each version of PEFT.
_KNOWN = frozenset({
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_config",
    "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Delta:
    """What is added to one weight: `scale` times `b [out, r]` times `a [r, in]`."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]

    def factors(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """(`s b`, `a`) in the wider of that dtype and their own."""
        dtype = torch.promote_types(dtype, self.b.dtype)
        return (self.scale * self.b.float()).to(dtype), self.a.to(dtype)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter directory as read.

    Attributes:
        path: The directory.
        deltas: By the adapted module's name in the base model.
        saved: Whole tensors that the adapter brings (`modules_to_save`, and the weights beneath an adapted head or
            embedding), by theirs.
        tied: Whether what is tied to one of these goes along (`ensure_weight_tying`); else it stays what it was.
    """

    path: pathlib.Path
    deltas: dict[str, Delta]
    saved: dict[str, torch.Tensor]
    tied: bool = False


@dataclasses.dataclass(frozen=True)
class Adapted:
    """What became of an adapter.

    Attributes:
        path: Its directory.
        merged: Names of weights that it was added to, rounded to their dtype.
        joined: The ranks that it adds to factorized modules.
        kept: The ranks of its branches beside dense weights, by the module.
        replaced: Names of tensors that it brought whole.
    """

    path: pathlib.Path
    merged: tuple[str, ...]
    joined: dict[str, int]
    kept: dict[str, int]
    replaced: tuple[str, ...]

    def refactored(self, names: Collection[str]) -> Adapted:
        """The same after dense modules of these names became pairs of factors: what lay beside them is joined."""
        kept = {name: rank for name, rank in self.kept.items() if name not in names}
        joined = {name: rank for name, rank in self.kept.items() if name in names}
        return dataclasses.replace(self, joined=self.joined | joined, kept=kept)

    def __str__(self) -> str:
        return (
            f"adapter {self.path}: joined to the factors of {len(self.joined)} modules, kept beside "
            f"{len(self.kept)} dense weights, merged into {len(self.merged)} weights, "
            f"{len(self.replaced)} tensors replaced"
        )


def read_adapter(path: str | os.PathLike) -> Adapter:
    """Reads a directory that PEFT's `save_pretrained` wrote: `adapter_config.json`, and safetensors or `.bin`.

    Per module `base_model.model.<name>.lora_A.weight` `[r, in]` and `lora_B.weight` `[out, r]`, with the scale
    alpha / r, or alpha / sqrt(r) for `use_rslora`; `alpha_pattern` and `rank_pattern` name modules with others. Of an
    embedding `lora_embedding_A` `[r, rows]` and `lora_embedding_B` `[dim, r]` (huggingface/peft, `tuners/lora`).

    Raises:
        CheckpointError: it is no LoRA adapter, of a kind that is not a sum (DoRA and others named in the
            message), or incomplete, its shapes disagree with each other or the config, or it holds NaN.
    """
    path = pathlib.Path(path)
    config = read_json(path / CONFIG)
    if not config:
        raise CheckpointError(
            f"{path}: there is no {CONFIG}; name the directory that PEFT's save_pretrained wrote."
        )
    kind, start = config.get("peft_type"), config.get("init_lora_weights", True)
    others = [name for name in sorted(config) if config[name] and name not in _KNOWN]
    if kind != "LORA" or others or config.get("bias", "none") != "none" or start not in _STARTS:
        raise CheckpointError(
            f"{path}: peft_type={kind!r}, bias={config.get('bias')!r}, init_lora_weights={start!r}"
            f"{''.join(f', {name}={str(config[name])[:40]}' for name in others)}: only plain LoRA without biases, on "
            "unchanged base weights, is read; merge it with PEFT (merge_and_unload) first."
        )
    halves: dict[str, dict[str, torch.Tensor]] = {}
    saved, bases = {}, {}
    for key, tensor in read(path).tensors.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise CheckpointError(f"{path}: {key} holds NaN, inf or {tensor.dtype}.")
        name = key.removeprefix(_WRAPPER)
        found, base = _PAIR.fullmatch(name), _BASE.fullmatch(name)
        side = found and (found[2] or found[3])
        if base is not None:
            bases[f"{base[1]}.{base[2]}"] = tensor
        elif found is None:
            saved[name] = tensor
        elif side in halves.setdefault(found[1], {}):
            raise CheckpointError(
                f"{path} holds more than one adapter; save the one that is meant."
            )
        else:
            halves[found[1]][side] = tensor
    odd = [key for key in saved if "lora_" in key or not config.get("modules_to_save")]
    if odd or not halves:
        raise CheckpointError(
            f"{path}: {', '.join(odd[:4]) or 'no tensor'} is not lora_A or lora_B of a linear module."
        )
    deltas = {n: _delta(path, n, half, config) for n, half in halves.items()}
    return Adapter(path, deltas, saved | bases, bool(config.get("ensure_weight_tying")))


def _delta(
    path: pathlib.Path, name: str, half: Mapping[str, torch.Tensor], config: Mapping[str, Any]
) -> Delta:
    a, b = half.get("A"), half.get("B")
    fits = a is not None and b is not None and a.dim() == b.dim() == 2
    if not fits or a.shape[0] != b.shape[1] or not a.numel():
        given = ", ".join(f"lora_{side} {list(t.shape)}" for side, t in sorted(half.items()))
        raise CheckpointError(f"{path}: {name} has {given}; it takes A [r, in] and B [out, r].")
    rank = _of(config.get("rank_pattern"), name, config.get("r"))
    alpha = _of(config.get("alpha_pattern"), name, config.get("lora_alpha"))
    if rank != a.shape[0] or isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise CheckpointError(
            f"{path}: {CONFIG} gives {name} rank {rank!r} and alpha {alpha!r}; its A is {list(a.shape)}."
        )
    return Delta(a, b, alpha / (rank**0.5 if config.get("use_rslora") else rank))


def _of(patterns: Any, name: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a name from a dot on, as PEFT decides it."""
    for pattern, value in (patterns if isinstance(patterns, dict) else {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", name):
                return value
        except re.error as error:
            raise CheckpointError(f"{CONFIG}: {pattern!r} is no pattern: {error}") from error
    return default


def merge(
    adapter: Adapter,
    tensors: dict[str, torch.Tensor],
    ties: Mapping[str, str],
    transposed: Collection[str],
    factorized: Mapping[str, tuple[int, int]],
    dense: Collection[str] | None = None,
) -> tuple[Adapted, dict[str, Delta]]:
    """Adds to dense weights, in fp32; what is meant for factorized modules, or for dense ones that get a branch, is
    left to `joined` and `Delta.factors`.

    An adapter that was trained on the factors themselves (`q_u_proj` of SVD-LLM) names them, and is added to
    them.

    Args:
        adapter: Under the plain model's names.
        tensors: The checkpoint's, under the plain model's names; changed in place.
        ties: Names of weights that are another's, by what they are tied to. One that is changed is written
            out, and so no longer tied.
        transposed: Names of modules whose weight is stored as `[in, out]`, embeddings among them.
        factorized: (out, in) of the modules that are pairs of factors.
        dense: The linear modules beside whose weight a branch can lie, if nothing is to be merged.

    Returns:
        What was done, and what is left to do by the name of the factorized module or of the dense one.

    Raises:
        CheckpointError: a module is not there, has another shape, shares the weight with another, or would
            have to be merged where nothing is to be.
    """
    joined: dict[str, Delta] = {}
    kept: dict[str, Delta] = {}
    merged = []
    for key, tensor in adapter.saved.items():
        there = tensors.get(key, tensors.get(ties.get(key, "")))
        if there is None or there.shape != tensor.shape:
            raise CheckpointError(
                f"{adapter.path} brings {key} {list(tensor.shape)}; the base has "
                f"{'none' if there is None else list(there.shape)}."
            )
        for other in (other for other, to in ties.items() if to == key and not adapter.tied):
            tensors.setdefault(other, there)
        tensors[key] = tensor
    for name, delta in adapter.deltas.items():
        key = f"{name}.weight"
        weight = tensors.get(key, tensors.get(ties.get(key, "")))
        flip = name in transposed
        shape = None if weight is None else tuple(weight.T.shape if flip else weight.shape)
        of_module = factorized.get(name) == delta.shape
        if of_module and shape != delta.shape:
            joined[name] = delta
            continue
        if shape != delta.shape or of_module:
            raise CheckpointError(
                f"{adapter.path}: {name} is adapted by a {list(delta.shape)}; the base has "
                f"{_described(name, shape, factorized)}."
            )
        if dense is not None:
            if name not in dense:
                raise CheckpointError(
                    f"{adapter.path}: {key} is a factor itself, tied to another weight or of no linear module; "
                    "beside it no branch is kept. Merge the adapter (merge=True)."
                )
            kept[name] = delta
            continue
        if key in tensors and key not in ties and _is_shared(key, tensors):
            raise CheckpointError(
                f"{adapter.path}: {key} is one tensor of several modules of the base, of which the adapter "
                "names one; merge it with PEFT."
            )
        for other in (other for other, to in ties.items() if to == key):
            tensors.setdefault(other, weight)  # it shared the weight, not the adapter
        change = delta.scale * (delta.b.float() @ delta.a.float())
        tensors[key] = (weight.float() + (change.T if flip else change)).to(weight.dtype)
        if not tensors[key].isfinite().all():
            raise CheckpointError(f"{adapter.path}: {key} with the adapter exceeds {weight.dtype}.")
        merged.append(key)
    ranks = [{n: delta.a.shape[0] for n, delta in deltas.items()} for deltas in (joined, kept)]
    return Adapted(adapter.path, tuple(merged), *ranks, tuple(adapter.saved)), joined | kept


def _described(
    name: str, shape: tuple[int, ...] | None, factorized: Mapping[str, tuple[int, int]]
) -> str:
    if name in factorized and shape is not None:
        return f"factors of a {list(factorized[name])}, one of them a {list(shape)} of that name"
    if name in factorized:
        return f"factors of a {list(factorized[name])} there"
    return "no such module" if shape is None else f"a {list(shape)} there"


def _is_shared(key: str, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether the tensor stands under another name too; Basis Sharing's may be equal copies."""
    tensor = tensors[key]
    return any(
        other != key
        and t.shape == tensor.shape
        and (memory(t) == memory(tensor) or ("_basis" in key and torch.equal(t, tensor)))
        for other, t in tensors.items()
    )


def joined(u: torch.Tensor, v: torch.Tensor, delta: Delta) -> tuple[torch.Tensor, torch.Tensor]:
    """(`[u, s b]`, `[v; a]`): factors of the sum, with r more ranks, in the wider of the dtypes."""
    b, a = delta.factors(torch.promote_types(u.dtype, v.dtype))
    return torch.cat((u.to(b.dtype), b), dim=1), torch.cat((v.to(a.dtype), a))


def rekeyed(adapter: Adapter, names: Mapping[str, str]) -> Adapter:
    """The adapter with its names replaced."""
    return dataclasses.replace(
        adapter,
        deltas={names[name]: delta for name, delta in adapter.deltas.items()},
        saved={names[key]: tensor for key, tensor in adapter.saved.items()},
    )
