"""The common format: a transformers model directory whose config names the factorized modules.

`config.json` carries `quantization_config = {"quant_method": "flashsvd", "modules": {...}}`: transformers
builds the dense skeleton, `hub` swaps `LowRankLinear` in, and the weights are ordinary safetensors. An entry
`<name>.branch`, where `<name>` is a linear module, stands for a `BranchedLinear` around that.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fsvd_compile.errors import CheckpointError, VersionError
from fsvd_compile.factorized import BranchedLinear, LowRankLinear, is_conv1d
from fsvd_compile.families.conversions import leave_alone
from fsvd_compile.families.source import memory

METHOD = "flashsvd"
VERSION = 1
BRANCH = ".branch"  # ends the name of a pair beside a dense weight
NOTE = "import fsvd_compile before loading: transformers alone leaves the factors random"


def modules_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What a config has to say of every `LowRankLinear`: `{name: {"rank", "bias"[, "v"]}}`.

    "v" names the module of which the first factor is shared. That of a `BranchedLinear` is `<its name>.branch`.
    """
    owners: dict[Any, str] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, LowRankLinear):
            continue
        found[name] = {"rank": module.rank, "bias": module.u.bias is not None}
        owner = owners.setdefault(memory(module.v.weight), name)
        if owner != name:
            found[name]["v"] = owner
    return found


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's `state_dict` in which a shared first factor stands once, under its owner's name."""
    state = model.state_dict()
    for name, entry in modules_of(model).items():
        if "v" in entry:
            del state[f"{name}.v.weight"]
    return state


def keep_factors(model: nn.Module) -> None:
    """Lets transformers write every factor and dense weight of a linear module as it is, see `leave_alone`."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    leave_alone(model, (f"{name}.{part}" for name in names for part in ("weight", "bias")))


def ties_of(model: nn.Module) -> dict[str, str]:
    """transformers' own dict of the names that are tied in a model, by what each is tied to.

    Raises:
        VersionError: the transformers that is installed keeps none.
    """
    if (ties := getattr(model, "all_tied_weights_keys", None)) is None:
        import transformers

        raise VersionError(
            f"transformers {transformers.__version__} does not tell which weights of a {type(model).__name__} are "
            "tied; factorized checkpoints are read with 5.0 or later: pip install -U transformers."
        )
    return ties


def swap_in(model: nn.Module, modules: dict[str, dict[str, Any]]) -> None:
    """Puts a `LowRankLinear` without values in the place of each named linear module, or beside it.

    Raises:
        CheckpointError: a name is missing from the model, is no linear module, an entry is malformed, or a
            weight is tied that has something beside it.
    """
    dense = dict(model.named_modules(remove_duplicate=False))
    tied = getattr(model, "all_tied_weights_keys", {})
    tied = {*tied, *tied.values()}
    for name, entry in modules.items():
        rank = entry.get("rank") if isinstance(entry, dict) else entry
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise CheckpointError(
                f"config: module {name!r} has rank {rank!r}; it takes an int >= 1."
            )
        # A linear module has no children of its own; in others "branch" is a name like any other.
        beside = name not in dense and name.endswith(BRANCH)
        place = name.removesuffix(BRANCH) if beside else name
        old = dense.get(place)
        if old is None:
            raise CheckpointError(
                f"config: {type(model).__name__} has no module {place!r}; the checkpoint was saved from "
                "another class, which its README.md names."
            )
        out_features, in_features = linear_shape(old, name)
        weight, bias = old.weight, bool(entry.get("bias", False))
        made = LowRankLinear(
            in_features, out_features, rank, bias=bias, device=weight.device, dtype=weight.dtype
        )
        if beside and (bias or place in modules or f"{place}.weight" in tied):
            raise CheckpointError(
                f"config: {name!r} has no bias and lies beside a dense weight; the entry has bias={bias}, or "
                f"{place!r} is factorized too, or its weight tied to another."
            )
        parent, _, child = place.rpartition(".")
        setattr(model.get_submodule(parent), child, BranchedLinear(old, made) if beside else made)
    # Not before all are there: a config may name a module before the owner of its first factor.
    for name, entry in modules.items():
        if "v" in entry:
            model.get_submodule(name).v = _owner(model, name, entry["v"]).v


def _owner(model: nn.Module, name: str, owner: str) -> LowRankLinear:
    made, found = model.get_submodule(name), dict(model.named_modules()).get(owner)
    if not isinstance(found, LowRankLinear):
        raise CheckpointError(
            f"config: {name!r} shares the first factor of {owner!r}, which is no factorized module."
        )
    if (found.rank, found.in_features) != (made.rank, made.in_features):
        raise CheckpointError(
            f"config: {name!r} [{made.rank}, {made.in_features}] cannot share the first factor "
            f"[{found.rank}, {found.in_features}] of {owner!r}."
        )
    return found


def linear_shape(module: nn.Module, name: str) -> tuple[int, int]:
    """(out_features, in_features) of an nn.Linear or a transformers Conv1D."""
    weight = getattr(module, "weight", None)
    if is_conv1d(module) and isinstance(weight, torch.Tensor):
        return weight.shape[1], weight.shape[0]
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    raise CheckpointError(
        f"config: {name!r} is a {type(module).__name__}, which no low-rank pair can replace."
    )


# What a model directory holds beside weights and config, as far as it is data.
_BESIDE = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


def save(
    model: nn.Module,
    out: str | os.PathLike,
    *,
    tokenizer: Any = None,
    beside: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a model with `LowRankLinear` inside so that `from_pretrained` reads it back, after
    `import fsvd_compile`.

    The directory appears under its name only when it is complete: it is written beside it and renamed.

    Args:
        model: A transformers model. Its weights, ranks, biases and shared first factors are kept as
            they are; dtypes too.
        out: The directory, which must not exist or be empty unless `overwrite`.
        tokenizer: Written beside it, if given.
        beside: A model directory of which tokenizer and generation settings are copied.
        overwrite: Replace what is there.

    Raises:
        CheckpointError: nothing is factorized, the model is no transformers model, the directory is in
            use, or the disk is full.
    """
    out = pathlib.Path(out).resolve()
    model = getattr(model, "_orig_mod", model)
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        raise CheckpointError(
            f"save: {type(model).__name__} is no transformers model; use torch.save on its state_dict."
        )
    modules = modules_of(model)
    if not modules:
        raise CheckpointError(
            "save: the model has no LowRankLinear; use its save_pretrained, or factorize it first."
        )
    check_free(out, overwrite)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        draft = pathlib.Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise CheckpointError(f"save: {out} could not be written: {error}") from error
    try:
        draft.chmod(0o755)
        with _described(model, modules):
            keep_factors(model)
            model.save_pretrained(draft, state_dict=state_of(model))
        for name in _BESIDE if beside is not None else ():
            if (file := pathlib.Path(beside) / name).is_file():
                shutil.copyfile(file, draft / name)
        if tokenizer is not None:
            tokenizer.save_pretrained(draft)
        (draft / "README.md").write_text(_card(model, modules))
        _put(draft, out)
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"save: {out} could not be written: {error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _put(draft: pathlib.Path, out: pathlib.Path) -> None:
    """The finished draft under its name; what had the name goes only when the draft is there."""
    aside = draft.with_name(f"{draft.name}.replaced")
    there = out.exists()
    if there:
        out.rename(aside)
    try:
        draft.rename(out)
    except BaseException:
        if there:
            aside.rename(out)
        raise
    if there:
        shutil.rmtree(aside, ignore_errors=True) if aside.is_dir() else aside.unlink()


def check_free(out: str | os.PathLike, overwrite: bool) -> None:
    """Raises CheckpointError if `save` would refuse the directory: better known before the work."""
    out = pathlib.Path(out)
    try:
        taken = out.exists() and not overwrite and (not out.is_dir() or any(out.iterdir()))
    except OSError as error:  # a name that no file can have, a directory that may not be read
        raise CheckpointError(f"save: {out} could not be written: {error}") from error
    if taken:
        raise CheckpointError(f"save: {out} exists; name another directory or pass overwrite=True.")


@contextlib.contextmanager
def _described(model: Any, modules: dict[str, dict[str, Any]]) -> Iterator[None]:
    """The model's config with the factorized modules in it, for as long as it is written."""
    before = getattr(model.config, "quantization_config", None)
    model.config.quantization_config = config_dict(modules)
    try:
        yield
    finally:
        if before is None:
            del model.config.quantization_config
        else:
            model.config.quantization_config = before


def config_dict(modules: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The `quantization_config` of a model directory."""
    return {"quant_method": METHOD, "version": VERSION, "note": NOTE, "modules": modules}


def _card(model: Any, modules: dict[str, dict[str, Any]]) -> str:
    parameters = sum(p.numel() for p in model.parameters())
    kinds: dict[str, list[int]] = {}
    for name, entry in modules.items():
        host = model.get_submodule(name.rpartition(".")[0])
        kind = "dense with a branch" if isinstance(host, BranchedLinear) else "held as two factors"
        kinds.setdefault(kind, []).append(entry["rank"])
    held = (
        f"{len(ranks)} linear layers are {kind} of ranks {min(ranks)} to {max(ranks)}"
        for kind, ranks in kinds.items()
    )
    name = type(model).__name__
    return f"""---
library_name: transformers
tags: [fsvd_compile, svd, low-rank]
---
# {name}, factorized

{", ".join(held)};
{parameters:,} parameters in all.

```python
import fsvd_compile  # first: transformers alone does not know the factors and leaves them random
from transformers import {name}

model = {name}.from_pretrained("this directory")
```
"""
