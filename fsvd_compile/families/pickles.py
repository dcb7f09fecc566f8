"""Checkpoints written with `torch.save` by other repositories, read without running or importing any of their code."""

from __future__ import annotations

import dataclasses
import os
import stat
from typing import Any

import torch

from fsvd_compile.errors import CheckpointError
from fsvd_compile.families.unpickle import RESAVE, Global, Inert, brief, unpickled

_MODEL_KEYS = ("model", "state_dict", "module")
_OMIT = object()


@dataclasses.dataclass(frozen=True)
class Harvest:
    """What a checkpoint holds.

    Attributes:
        tensors: On the CPU and without gradients. From a module: parameters and buffers (also
            those that are not persistent) by the names `state_dict()` gives them. From a state
            dict: its entries that are tensors. Tensors that share a storage in the file share
            memory; the file is mapped, so it has to stay as it is for as long as they are used.
            Writing to them does not change the file.
        config: The model's `config` attribute: None, bool, int, float, str, lists, and dicts with
            str keys; dtypes as "float16", classes and functions as "module.Name", other objects as
            the dict of their attributes. Values that are none of these are left out. {} if the
            model has no `config`.
        config_class: "module.Name" of the config, None if there is none or it is a plain dict.
        model_class: "module.Name" of the model, None for a state dict.
        classes: "module.Name" of every sub-module by its dotted name; the model itself is not in it.
        beside: What else a saved dict holds under str keys, beside the model: tensors, None, bool, int, float,
            str, and dicts and lists of them. Objects are left out.
    """

    tensors: dict[str, torch.Tensor]
    config: dict[str, Any]
    config_class: str | None
    model_class: str | None
    classes: dict[str, str]
    beside: dict[str, Any] = dataclasses.field(default_factory=dict)


def harvest(path: str | os.PathLike) -> Harvest:
    """Read a file of `torch.save(model)`, `torch.save(state_dict)` or `torch.save({"model": ...})`.

    No code named in the file is imported, looked up or called, so its classes need not be
    installed and a hostile file cannot run anything. A file made to take very much time or memory
    is not guarded against, and the bytes of tensors are not checked against their checksums.

    Args:
        path: A file in the zip format torch.save writes since 1.6. The model is the saved object
            itself, or what a saved dict has under "model", "state_dict" or "module" (in this
            order), or else the only module anywhere in it.

    Raises:
        CheckpointError: there is no such file; it is not a zip of torch.save, or is damaged,
            compressed, big-endian or a TorchScript archive; a storage is missing, too short or of
            an unknown type; a tensor lies outside its storage or is of a kind that is not read
            (sparse, quantized, meta, conjugated); there is no model in it, or more than one.
    """
    where = os.fsdecode(path)
    try:
        if os.path.isdir(where):
            raise CheckpointError(
                f"harvest: {where} is a directory; give the file that torch.save wrote."
            )
        # Opening a pipe would wait for a writer.
        if not stat.S_ISREG(os.stat(where).st_mode):
            raise CheckpointError(f"harvest: {where} is not a regular file; give a file on disk.")
        with open(where, "rb") as file:
            return _harvest(unpickled(where, file), where)
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(
            f"harvest: there is no such file: {where}; check the path."
        ) from error
    # Whatever a damaged file makes Python raise, the caller gets one type.
    except Exception as error:
        raise CheckpointError(
            f"harvest: {where} is damaged or cannot be read ({brief(error)}); copy or download it "
            "again."
        ) from error


def _attributes(value: Any) -> dict:
    """The attributes an `Inert` would have had, {} if its state does not tell."""
    if not isinstance(value, Inert):
        return {}
    state = value.state
    if type(state) is dict:
        return state
    # Objects with __slots__ are given (the __dict__ or None, the slots).
    if type(state) is tuple and len(state) == 2 and type(state[1]) is dict:
        plain, slots = state
        if plain is None or type(plain) is dict:
            return (plain or {}) | slots
    return {}


def _is_module(value: Any) -> bool:
    parts = _attributes(value)
    return all(type(parts.get(part)) is dict for part in ("_parameters", "_buffers", "_modules"))


def _harvest(saved: Any, where: str) -> Harvest:
    model = _find_model(saved, set())
    if model is None:
        model = _only_module(saved, where)
    beside = {}
    if type(saved) is dict and saved is not model:
        others = {key: value for key, value in saved.items() if key not in _MODEL_KEYS}
        beside = _plain_dict(others, {id(saved)}, tensors=True)
    if type(model) is dict:
        tensors = {}
        for name, value in model.items():
            if isinstance(value, torch.Tensor) or _is_unread_tensor(value):
                tensors[_name(name, where)] = _tensor(name, value, where)
        return Harvest(tensors, {}, None, None, {}, beside)
    tensors, classes = {}, {}
    _walk(model, "", set(), tensors, classes, where)
    config = _attributes(model).get("config")
    plain = _plain(config, set())
    return Harvest(
        tensors=tensors,
        config=plain if type(plain) is dict else {},
        config_class=config.path if isinstance(config, Inert) else None,
        model_class=model.path,
        classes=classes,
        beside=beside,
    )


def _find_model(saved: Any, seen: set[int]) -> Any:
    """The module or state dict where it is expected, None if it is not there."""
    if _is_module(saved):
        return saved
    if type(saved) is not dict or id(saved) in seen:
        return None
    seen.add(id(saved))
    for key in _MODEL_KEYS:
        found = _find_model(saved.get(key), seen)
        if found is not None:
            return found
    values = saved.values()
    has_tensors = any(isinstance(v, torch.Tensor) or _is_unread_tensor(v) for v in values)
    return saved if has_tensors else None


def _only_module(saved: Any, where: str) -> Inert:
    """The only module that lies in no other module, wherever it is."""
    found: list[Inert] = []
    seen: set[int] = set()
    left = [saved]
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if _is_module(value):
            found.append(value)
        elif type(value) is dict:
            left.extend(value.values())
        elif type(value) in (list, tuple):
            left.extend(value)
        elif isinstance(value, Inert):
            left.extend((value.args, value.state, value.items))
    if not found:
        raise CheckpointError(
            f"harvest: {where} has no module and no tensors where they are looked for; the saved "
            "object has to be a module, a state dict, or a dict with one of them under "
            f"{', '.join(map(repr, _MODEL_KEYS))}."
        )
    if len(found) > 1:
        names = ", ".join(sorted(module.path for module in found)[:8])
        raise CheckpointError(
            f"harvest: {where} has {len(found)} modules ({names}) and none under "
            f"{', '.join(map(repr, _MODEL_KEYS))}; save the one that is meant in a file of its own."
        )
    return found[0]


def _walk(
    module: Inert,
    prefix: str,
    above: set[int],
    tensors: dict[str, torch.Tensor],
    classes: dict[str, str],
    where: str,
) -> None:
    parts = _attributes(module)
    for kind in ("_parameters", "_buffers"):
        for name, value in parts[kind].items():
            if value is not None:
                name = prefix + _name(name, where)
                tensors[name] = _tensor(name, value, where)
    above.add(id(module))
    for name, child in parts["_modules"].items():
        name = prefix + _name(name, where)
        # A module inside itself has no end of names.
        if child is None or id(child) in above:
            continue
        if not _is_module(child):
            raise CheckpointError(
                f"harvest: {where}: sub-module {name} ({_kind(child)}) has no parameters, buffers "
                f"and modules as torch.nn.Module saves them, so it cannot be read; {RESAVE}."
            )
        classes[name] = child.path
        _walk(child, f"{name}.", above, tensors, classes, where)
    above.discard(id(module))


def _name(name: Any, where: str) -> str:
    if type(name) is not str:
        raise CheckpointError(
            f"harvest: {where} is damaged: a parameter or module has a {type(name).__name__} for "
            "a name where a str is needed; copy or download it again."
        )
    return name


def _is_unread_tensor(value: Any) -> bool:
    made_by = value.path if isinstance(value, Inert) else ""
    return made_by.startswith(("torch._utils._rebuild_", "torch._tensor._rebuild_"))


def _tensor(name: str, value: Any, where: str) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    raise CheckpointError(
        f"harvest: {where}: tensor {name} ({_kind(value)}) is of a kind that is not read; dense "
        f"tensors are (not sparse, quantized, meta or conjugated ones). To use it, {RESAVE}."
    )


def _kind(value: Any) -> str:
    return value.path if isinstance(value, Inert) else type(value).__name__


def _plain(value: Any, above: set[int], tensors: bool = False) -> Any:
    """`value` in JSON's types, `_OMIT` for what has no place there; with `tensors`, data alone and those too."""
    if tensors and isinstance(value, torch.Tensor):
        return value
    if tensors and isinstance(value, Inert | Global):
        return _OMIT
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Global):
        return value.path
    if id(value) in above:
        return _OMIT
    above.add(id(value))
    plain: Any = _OMIT
    if type(value) is dict:
        plain = _plain_dict(value, above, tensors)
    elif type(value) in (list, tuple, set, frozenset):
        items = (_plain(item, above, tensors) for item in value)
        plain = [item for item in items if item is not _OMIT]
    elif isinstance(value, Inert):
        pairs = [item for item in value.items if type(item) is tuple and len(item) == 2]
        if type(value.state) in (dict, tuple):
            plain = _plain_dict(_attributes(value), above)
        elif pairs and all(type(key) is str for key, _ in pairs):
            plain = _plain_dict(dict(pairs), above)
        # A member of an enum is its class called with its value.
        elif len(value.args) == 1 and type(value.args[0]) in (int, float, str):
            plain = value.args[0]
    above.discard(id(value))
    return plain


def _plain_dict(value: dict, above: set[int], tensors: bool = False) -> dict[str, Any]:
    out = {}
    for key, item in value.items():
        if key is not None and type(key) not in (bool, int, float, str):
            continue
        plain = _plain(item, above, tensors)
        if plain is not _OMIT:
            out[str(key)] = plain
    return out
