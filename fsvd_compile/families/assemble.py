"""A foreign checkpoint becomes a transformers model with `LowRankLinear` inside."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from fsvd_compile.errors import CheckpointError
from fsvd_compile.factorized import is_conv1d
from fsvd_compile.families.adapters import (
    DENSE,
    FAMILIES,
    Factors,
    Family,
    find,
    is_swapped,
    nearest,
    oriented,
)
from fsvd_compile.families.conversions import Conversions
from fsvd_compile.families.disguise import Disguised, undisguised
from fsvd_compile.families.lora import Adapted, Adapter, Delta, joined, merge, rekeyed
from fsvd_compile.families.native import BRANCH, METHOD, config_dict, linear_shape, ties_of
from fsvd_compile.families.source import Source, memory
from fsvd_compile.families.storage import unpacked

# Entries of a config that describe a family's own storage, or code that is not run.
_FOREIGN = (
    "auto_map", "quantization_config", "low_rank_modules", "low_rank_schema", "low_rank_format_version",
    "low_rank_method", "low_rank_config", "truncation_ranks", "dobi_target_modules", "rank_dict",
    "svd_ranks", "head_wise_ranks", "palu_attn_linear_only", "original_model_name_or_path",
    "transformers_version",
    # How a model runs is the caller's to say; a name of a Hub kernel would be fetched and imported.
    "attn_implementation", "experts_implementation", "return_dict", "output_attentions",
    "output_hidden_states",
)  # fmt: skip
# Tensors that are computed, not learned, or stand a second time under another name.
_IDLE = re.compile(
    r"(.*\.)?(rotary_emb\.(inv_freq|cos_cached|sin_cached)|attn\.(masked_)?bias|position_ids)"
    r"|(.*\.)?[a-z]+_basis\.\d+\.weight"
)
# What wraps a model in some repositories' checkpoints.
_WRAPPERS = ("_orig_mod.", "wrapped_model.", "module.")


@dataclasses.dataclass(frozen=True)
class Module:
    """One factorized module of a checkpoint: `u [m, r]`, `v [r, n]`, `bias [m]` or None, as stored but
    oriented; `owner` names the module whose `v` this one shares."""

    u: torch.Tensor
    v: torch.Tensor
    bias: torch.Tensor | None
    owner: str | None = None


@dataclasses.dataclass(frozen=True)
class Assembly:
    """What a model is built from.

    Attributes:
        family: The family's row.
        config: The transformers config of the plain model.
        model_class: Its class.
        modules: The factorized modules by the plain model's names; `<name>.branch` is a pair that lies beside
            the dense weight of `<name>`.
        rest: All other parameters and buffers by the plain model's names.
        dense: Linear modules that are dense in the checkpoint: their weights as `[out, in]`, None for one that
            is tied to another's.
        multiplied: The ranks of those of `dense` that were factorized in the checkpoint, see `storage`.
        adapted: What became of a LoRA adapter.
        recovered: Those of `modules` that are dense in the checkpoint, with what was found in their weights.
    """

    family: Family
    config: Any
    model_class: type
    modules: dict[str, Module]
    rest: dict[str, torch.Tensor]
    dense: dict[str, torch.Tensor | None]
    multiplied: Mapping[str, int] = dataclasses.field(default_factory=dict)
    adapted: Adapted | None = None
    recovered: Mapping[str, Disguised] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def branches(self) -> dict[str, Module]:
        """Those of `modules` that lie beside a dense weight, by the name of the dense module."""
        beside = {name: self.modules.get(f"{name}{BRANCH}") for name in self.dense}
        return {name: module for name, module in beside.items() if module is not None}

    @functools.cached_property
    def state(self) -> dict[str, torch.Tensor]:
        """The state dict of the factorized model; a shared `v` stands once."""
        state = dict(self.rest)
        for name in self.branches:
            for part in ("weight", "bias"):
                if f"{name}.{part}" in state:
                    state[f"{name}.base.{part}"] = state.pop(f"{name}.{part}")
        for name, module in self.modules.items():
            state[f"{name}.u.weight"] = module.u.contiguous()
            if module.owner is None:
                state[f"{name}.v.weight"] = module.v.contiguous()
            if module.bias is not None:
                state[f"{name}.u.bias"] = module.bias
        return state

    def refactored(self, found: Mapping[str, Disguised]) -> Assembly:
        """The same with factors in the place of dense weights, see `disguises`; a branch that lay beside such a
        weight becomes further ranks of them."""
        rest = dict(self.rest)
        modules = dict(self.modules)
        for name, factors in found.items():
            del rest[f"{name}.weight"]
            u, v = factors.u, factors.v
            if (branch := modules.pop(f"{name}{BRANCH}", None)) is not None:
                u, v = joined(u, v, Delta(branch.v, branch.u, 1))
            modules[name] = Module(u, v, rest.pop(f"{name}.bias", None))
        dense = {name: weight for name, weight in self.dense.items() if name not in found}
        return dataclasses.replace(
            self,
            modules=_with_owners(modules, self.family),
            rest=rest,
            dense=dense,
            adapted=None if self.adapted is None else self.adapted.refactored(found),
            recovered=found,
        )

    def described(self) -> dict[str, Any]:
        """The `quantization_config` of the factorized model."""
        return config_dict(
            {
                name: {"rank": module.v.shape[0], "bias": module.bias is not None}
                | ({} if module.owner is None else {"v": module.owner})
                for name, module in self.modules.items()
            }
        )


def assemble(source: Source, adapter: Adapter | None = None, merging: bool = True) -> Assembly:
    """Finds config, family, factors and everything else of a checkpoint, and adds a LoRA adapter to it.

    One of a plain dense model has no factors; its family is `DENSE`. Of an adapter, what is meant for a dense weight
    is merged into it, or without `merging` becomes a branch beside it.

    Raises:
        CheckpointError: the model type is unknown, neither factors nor dense weights are found, factors do
            not fit the model, values are not finite, tensors are missing or left over, or the adapter
            belongs to another model. Nothing was built.
    """
    config, model_class = plain_model(source)
    skeleton = _skeleton(source, config, model_class)
    shapes = dict(_linears(skeleton))
    conversions = Conversions(skeleton)
    plain = _renamed(source.tensors, skeleton, shapes, conversions)
    if is_common(source):
        plain = _completed(source, plain)
    plain, branches = _unbranched(plain, shapes)
    stored = unpacked(source, plain, shapes)
    tensors = stored.tensors
    family, pairs = find(source, tensors, shapes)
    ties = ties_of(skeleton)
    if family is None:
        weights = [f"{name}.weight" for name in shapes]
        there = sum(key in tensors or key in ties for key in weights)
        if there < len(weights):
            raise CheckpointError(
                f"{source.path}: of the {len(shapes)} linear modules of {model_class.__name__} no factor pair is "
                f"found, and dense weights of {there}. Of its {len(source.tensors)} tensors the nearest "
                f"family is {nearest(source.tensors) or 'none: no name is that of a factor'}. Known layouts: "
                f"{', '.join(dict.fromkeys(f.name for f in FAMILIES))}."
            )
        keys = (*stored.keys, *(f"{name}.v" for name in branches))
        family = next((f for f in FAMILIES if any(map(f.roles, keys))), DENSE)
    adapted, deltas = None, {}
    if adapter is not None:
        transposed = {
            name
            for name, module in skeleton.named_modules()
            if is_conv1d(module) or isinstance(module, nn.Embedding)
        }
        names = _names((*adapter.deltas, *adapter.saved), skeleton, shapes, conversions)
        adapter = rekeyed(adapter, names)
        pair_shapes = {name: shapes[name] for name in pairs}
        apart = {
            n for n in shapes if n not in pairs and f"{n}.weight" not in {*ties, *ties.values()}
        }
        adapted, deltas = merge(
            adapter, tensors, ties, transposed, pair_shapes, None if merging else apart
        )
    swap = is_swapped(pairs, tensors, shapes)
    modules = {
        name: _module(name, pairs[name], tensors, shapes[name], swap)
        for name in shapes
        if name in pairs
    } | branches
    for name, delta in deltas.items():
        key = name if name in pairs else f"{name}{BRANCH}"
        if (old := modules.get(key)) is not None:
            modules[key] = Module(*joined(old.u, old.v, delta), old.bias)
        else:
            modules[key] = Module(*delta.factors(tensors[f"{name}.weight"].dtype), None)
    _check_finite(source, modules)
    modules = _with_owners(modules, family)
    untied = [key for key in ties if key in tensors and not _equal(tensors, key, ties[key])]
    if untied or any(f"{name}.weight" in ties for name in modules):
        # A head that was factorized or changed is no longer the embedding, whatever the config says.
        config.tie_word_embeddings = False
        skeleton = _skeleton(source, config, model_class)
    swapped = {name: module for name, module in modules.items() if name in shapes}
    used = {key for factors in pairs.values() for key in factors.keys}
    left = {key: tensor for key, tensor in tensors.items() if key not in used}
    rest = _rest(source, skeleton, shapes, swapped, left, conversions)
    ties = ties_of(skeleton)
    of_others = {*ties, *ties.values()}
    dense = {
        name: None if key in of_others else out_in(skeleton.get_submodule(name), rest[key])
        for name in shapes
        if name not in modules and (key := f"{name}.weight")
    }
    return Assembly(family, config, model_class, modules, rest, dense, stored.multiplied, adapted)


def out_in(module: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """The weight of a linear module as `[out, in]`; transformers' Conv1D has it transposed."""
    return weight.T if is_conv1d(module) else weight


def disguises(assembly: Assembly) -> dict[str, Disguised]:
    """The dense weights of a checkpoint that are of low rank, taken apart, which takes a while.

    Raises:
        CheckpointError: see `disguise.undisguised`.
    """
    weights = {name: weight for name, weight in assembly.dense.items() if weight is not None}
    found = {}
    # Only a terminal gets a bar.
    for name, weight in tqdm(weights.items(), "spectra", disable=None, unit="module"):
        factors = undisguised(name, weight)
        if factors is not None:
            found[name] = factors
    return found


def _skeleton(source: Source, config: Any, model_class: type) -> Any:
    try:
        with torch.device("meta"):
            return model_class(config)
    except Exception as error:  # models check their configs in many ways
        raise CheckpointError(
            f"{source.path}: {model_class.__name__} cannot be built from the config: "
            f"{type(error).__name__}: {error}"
        ) from error


def plain_model(source: Source) -> tuple[Any, type]:
    """(config, class) of the transformers model that a checkpoint factorizes.

    Families rename both (`ShareLlamaForCausalLM`, `svdllm-llama`); the known name inside is meant.

    Raises:
        CheckpointError: there is no config, or none that this version of transformers knows.
    """
    import transformers

    if not source.config:
        raise CheckpointError(
            f"{source.path}: there is no config.json, and no model whose config could be read. Put the "
            "base model's config.json beside the weights."
        )
    told = str(source.config.get("model_type", ""))
    architecture = source.architecture or ""
    known = transformers.CONFIG_MAPPING.keys()
    named = [told] if told in known else [k for k in known if k in told.replace("-", "_").lower()]
    named = named or [k for k in known if k.replace("_", "") in architecture.lower()]
    settings = {
        key: value
        for key, value in source.config.items()
        if key not in _FOREIGN and key != "model_type" and not key.startswith("_")
    }
    config = model_class = None
    if named:
        try:
            config = transformers.AutoConfig.for_model(max(named, key=len), **settings)
        except Exception as error:  # configs check themselves in many ways
            raise CheckpointError(
                f"{source.path}: the config is not valid: {type(error).__name__}: {error}"
            ) from error
        model_class = _model_class(transformers, architecture, config)
    if model_class is None:
        raise CheckpointError(
            f"{source.path}: model_type={told!r} and architectures={architecture!r} name no model that "
            f"transformers {transformers.__version__} knows. Set both in config.json to the base "
            "model's, such as 'llama' and ['LlamaForCausalLM']."
        )
    config.architectures = [model_class.__name__]
    return config, model_class


def _model_class(transformers: Any, architecture: str, config: Any) -> type | None:
    """The class whose name ends the architecture's, else that of the config for the same task."""
    found = re.search(r"(Model|For[A-Z]\w+)$", architecture)
    if found is None:
        return None
    same = [name for name in dir(transformers) if architecture.endswith(name) and name != found[0]]
    if same:
        return getattr(transformers, max(same, key=len))
    auto = getattr(transformers, f"AutoModel{found[0].removeprefix('Model')}", None)
    return None if auto is None else auto._model_mapping.get(type(config), None)


def _linears(model: nn.Module) -> Iterator[tuple[str, tuple[int, int]]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or is_conv1d(module):
            yield name, linear_shape(module, name)


def _renamed(
    tensors: Mapping[str, torch.Tensor],
    skeleton: Any,
    shapes: Mapping[str, Any],
    conversions: Conversions,
) -> dict[str, torch.Tensor]:
    """The tensors under the plain model's names: without wrappers, with the prefix of its base."""
    for wrapper in _WRAPPERS:
        if all(name.startswith(wrapper) for name in tensors):
            tensors = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
    names = _names(tensors, skeleton, shapes, conversions)
    return {names[name]: tensor for name, tensor in tensors.items()}


def _names(
    names: Iterable[str], skeleton: Any, shapes: Mapping[str, Any], conversions: Conversions
) -> dict[str, str]:
    """The plain model's name of each: with or without the prefix of its base, whichever fits more, and where that is
    none of the model's, as transformers renames it on loading."""
    names = list(names)
    prefix = f"{skeleton.base_model_prefix}." if skeleton.base_model_prefix else ""
    expected = {*skeleton.state_dict(), *(f"{name}." for name in shapes)}
    renamings = (
        lambda name: name,
        lambda name: prefix + name,
        lambda name: name.removeprefix(prefix),
    )

    def known(name: str) -> bool:
        return any(part in expected for part in _parts(name))

    rename = max(renamings, key=lambda rename: sum(known(rename(name)) for name in names))

    def found(name: str) -> str:
        for new in (rename(name), name):
            if known(new):
                return new
        for new in (conversions.renamed(name), conversions.renamed(rename(name))):
            if known(new) or conversions.target(new) in expected:
                return new
        return rename(name)

    taken: dict[str, str] = {}
    for name in names:
        other = taken.setdefault(new := found(name), name)
        if other != name:
            raise CheckpointError(
                f"{other} and {name} are both {new} of a {type(skeleton).__name__}; remove one of them."
            )
    return {name: new for new, name in taken.items()}


def _unbranched(
    tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, int]]
) -> tuple[dict[str, torch.Tensor], dict[str, Module]]:
    """The tensors with each `BranchedLinear`'s dense part under the plain model's names, and the branches.

    Raises:
        CheckpointError: a part of one is missing, or the branch does not fit the weight that it lies beside.
    """
    tensors = dict(tensors)
    branches = {}
    for name, shape in shapes.items():
        keys = [f"{name}.{part}.weight" for part in ("branch.u", "branch.v", "base")]
        missing = [key for key in keys if key not in tensors]
        if len(missing) == len(keys):
            continue
        if missing:
            raise CheckpointError(
                f"{name} is held as a dense weight with a branch beside it; {', '.join(missing)} is missing."
            )
        u, v = tensors.pop(keys[0]), tensors.pop(keys[1])
        plain = u.dim() == v.dim() == 2 and u.is_floating_point() and v.is_floating_point()
        if not plain or u.shape[1] != v.shape[0] or (u.shape[0], v.shape[1]) != shape:
            raise CheckpointError(
                f"{keys[0]} {list(u.shape)} and {keys[1]} {list(v.shape)} lie beside a {list(shape)}; they "
                "take [out, rank] and [rank, in]."
            )
        branches[f"{name}{BRANCH}"] = Module(u, v, None)
        for part in ("weight", "bias"):
            if f"{name}.base.{part}" in tensors:
                tensors[f"{name}.{part}"] = tensors.pop(f"{name}.base.{part}")
    return tensors, branches


def _parts(name: str) -> Iterator[str]:
    """The name itself, and as a module and the modules it lies in, each with its dot."""
    yield name
    yield f"{name}."
    while "." in name:
        name = name.rpartition(".")[0]
        yield f"{name}."


def _module(
    name: str,
    factors: Factors,
    tensors: Mapping[str, torch.Tensor],
    shape: tuple[int, int],
    swap: bool,
) -> Module:
    a, b = tensors[factors.first], tensors[factors.second]
    for key, tensor in ((factors.first, a), (factors.second, b)):
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"{key} is {tensor.dtype}, quantized without the scales that Dobi-SVD, ZS-SVD and AA-SVD "
                "write beside; export the checkpoint without quantization."
            )
    u, v, first_is_v = oriented(name, a, b, *shape, swap)
    v_key = factors.first if first_is_v else factors.second
    bias = None
    for key in factors.biases:
        value = tensors[key]
        if key == f"{v_key.removesuffix('.weight')}.bias" and value.shape == v.shape[:1]:
            value = (u.double() @ value.double()).to(value.dtype)  # y = U (V x + b)
        elif value.shape != u.shape[:1]:
            raise CheckpointError(
                f"{key} has shape {list(value.shape)}; {name} [{shape[0]}, {shape[1]}] of rank "
                f"{v.shape[0]} takes a bias of [{shape[0]}] after U or of [{v.shape[0]}] after V."
            )
        bias = value if bias is None else bias + value
    return Module(u, v, bias)


def _equal(tensors: Mapping[str, torch.Tensor], a: str, b: str) -> bool:
    return b not in tensors or torch.equal(tensors[a], tensors[b])


def _check_finite(source: Source, modules: Mapping[str, Module]) -> None:
    for name, module in modules.items():
        for part in ("u", "v", "bias"):
            value = getattr(module, part)
            if value is not None and not value.isfinite().all():
                raise CheckpointError(f"{source.path}: {part} of {name} holds NaN or inf.")


def _with_owners(modules: Mapping[str, Module], family: Family) -> dict[str, Module]:
    """Modules that share a first factor, by memory; Basis Sharing's also by value, as safetensors
    stores every name by itself."""
    owners: list[str] = []
    out: dict[str, Module] = {}
    for name, module in modules.items():
        alike = (
            o for o in owners if _shared(modules[o].v, module.v, family.name == "Basis Sharing")
        )
        owner = next(alike, None)
        if owner is None:
            owners.append(name)
        out[name] = dataclasses.replace(module, owner=owner)
    return out


def _shared(a: torch.Tensor, b: torch.Tensor, by_value: bool) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return memory(a) == memory(b) or (by_value and torch.equal(a, b))


def _rest(
    source: Source,
    skeleton: Any,
    shapes: Mapping[str, Any],
    modules: Mapping[str, Module],
    tensors: dict[str, torch.Tensor],
    conversions: Conversions,
) -> dict[str, torch.Tensor]:
    replaced = {f"{name}.{part}" for name in modules for part in ("weight", "bias")}
    expected = {k: t for k, t in skeleton.state_dict().items() if k not in replaced}
    computed = {
        f"{name}.{buffer}".removeprefix(".")
        for name, module in skeleton.named_modules()
        for buffer in module._non_persistent_buffers_set
    }
    ties = ties_of(skeleton)
    tied = {key for key in ties if key in expected}
    for key in tied:  # stored under its second name alone
        if key in tensors and ties[key] not in tensors:
            tensors = tensors | {ties[key]: tensors[key]}
    pieces = {key: conversions.target(key) for key in tensors if key not in expected}
    # The weights of linear modules are looked at by name, so none of them may come in pieces.
    linear = {f"{name}.weight" for name in shapes}
    pieces = {key: to for key, to in pieces.items() if to in expected and to not in linear}
    rest = {
        key: tensor
        for key, tensor in tensors.items()
        if (key in expected and key not in tied) or key in pieces
    }
    over = [
        key
        for key, tensor in tensors.items()
        if key not in expected
        and key not in pieces
        and key not in computed
        and not _IDLE.fullmatch(key)
        and not (key in replaced and tensor.numel() == 1)  # a placeholder that LEMS registers
    ]
    there = {*rest, *tied, *pieces.values()}
    missing = [key for key in expected if key not in there and not _is_made(skeleton, key)]
    missing += [
        f"{name}.bias"
        for name, module in modules.items()
        if module.bias is None and skeleton.get_submodule(name).bias is not None
    ]
    wrong = [
        key
        for key, tensor in rest.items()
        if key not in pieces and tensor.shape != expected[key].shape
    ]
    problems = [
        f"{len(keys)} {what}: {', '.join(keys[:4])}{' ...' if len(keys) > 4 else ''}"
        for what, keys in (
            ("tensors belong to no module", over), ("are missing", missing), ("have another shape", wrong)
        )
        if keys
    ]  # fmt: skip
    if problems:
        raise CheckpointError(
            f"{source.path} does not describe a {type(skeleton).__name__}: {'; '.join(problems)}."
        )
    return rest


def _is_made(model: Any, key: str) -> bool:
    """Whether a parameter is computed by the model and left out of its files, as sinusoids are."""
    patterns = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    unsaved = getattr(model, "_keys_to_ignore_on_save", None) or ()
    return key in unsaved or any(re.search(pattern, key) for pattern in patterns)


def dtype_of(source: Source, assembly: Assembly) -> torch.dtype:
    """The dtype that a checkpoint's config names, else that of most of its parameters."""
    told = source.config.get("dtype") or source.config.get("torch_dtype")
    told = getattr(torch, told.removeprefix("torch."), None) if isinstance(told, str) else None
    if isinstance(told, torch.dtype):
        return told
    sizes: Counter[torch.dtype] = Counter()
    for tensor in assembly.state.values():
        if tensor.is_floating_point():
            sizes[tensor.dtype] += tensor.numel()
    return sizes.most_common(1)[0][0]


def _completed(source: Source, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint in the common format with every shared first factor under each of its names.

    Raises:
        CheckpointError: the config's entry is malformed, or a factor it names is not there.
    """
    entries = source.config["quantization_config"].get("modules")
    if not isinstance(entries, dict) or not all(isinstance(e, dict) for e in entries.values()):
        raise CheckpointError(f"{source.path}: the config's modules are no dict of dicts.")
    tensors = dict(tensors)
    for name, entry in entries.items():
        if "v" in entry and f"{entry['v']}.v.weight" in tensors:
            tensors.setdefault(f"{name}.v.weight", tensors[f"{entry['v']}.v.weight"])
        u, v = (tensors.get(f"{name}.{part}.weight") for part in "uv")
        ranks = {entry.get("rank")} | {t.shape[d] for t, d in ((u, -1), (v, 0)) if t is not None}
        if u is None or v is None or len(ranks) != 1:
            raise CheckpointError(
                f"{source.path}: the config gives {name!r} rank {entry.get('rank')!r}; its factors are "
                f"u {None if u is None else list(u.shape)} and v {None if v is None else list(v.shape)}."
            )
    return tensors


def is_common(source: Source) -> bool:
    """Whether a checkpoint is in the common format already."""
    described = source.config.get("quantization_config")
    return isinstance(described, dict) and described.get("quant_method") == METHOD
