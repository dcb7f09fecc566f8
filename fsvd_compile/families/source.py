"""What a checkpoint on disk holds: tensors by name and a config, read without running any code of it."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import pickle
import zipfile
from typing import Any

import torch

from fsvd_compile.errors import CheckpointError
from fsvd_compile.families.pickles import harvest

_PICKLES = (".pt", ".pth", ".bin", ".pickle", ".pkl")


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint in memory.

    Attributes:
        path: Where it was read from.
        config: `config.json`, or the plain values of a pickled model's config; empty if there is none.
        tensors: Every tensor by its full name, on the CPU and memory-mapped where the format allows.
            Names that shared memory in the file share it here.
        files: The weight files, in order.
        classes: Class paths of a pickled model's modules by name; empty for other formats.
        beside: What a pickle holds beside the model, as far as it is data; empty for other formats.
    """

    path: pathlib.Path
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    files: tuple[pathlib.Path, ...]
    classes: dict[str, str] = dataclasses.field(default_factory=dict)
    beside: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def architecture(self) -> str | None:
        """The class name of the whole model, as far as the checkpoint tells."""
        named = self.config.get("architectures")
        first = named[0] if isinstance(named, list) and named else None
        return first if isinstance(first, str) else None

    @property
    def folder(self) -> pathlib.Path:
        """The checkpoint's directory; for a single file the one it lies in."""
        return self.path if self.path.is_dir() else self.path.parent


def read(path: str | os.PathLike) -> Source:
    """Reads a directory (Hugging Face layout: `config.json` and safetensors or `.bin` weights, sharded or
    not) or one file (safetensors, or what `torch.save` wrote: a state dict or a whole model).

    safetensors and `.bin` state dicts hold data only (`weights_only`); of a pickled model the tensors
    are harvested and no object is built (`pickles.harvest`). A `config.json` beside a file counts.

    Raises:
        CheckpointError: nothing is there, a shard is missing, or a file is damaged or of another kind.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        config = read_json(path / "config.json")
        files = _weight_files(path)
    elif path.is_file():
        config = read_json(path.parent / "config.json")
        files = (path,)
    else:
        raise CheckpointError(f"{path}: there is no such file or directory.")
    if len(files) == 1 and files[0].suffix in _PICKLES:
        found = harvest(files[0])
        config = config or _with_class(found.config, found.config_class, found.model_class)
        return Source(path, config, found.tensors, files, found.classes, found.beside)
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        for name, tensor in _state_dict(file).items():
            if name in tensors:
                raise CheckpointError(f"{path}: {name} stands in more than one weight file.")
            tensors[name] = tensor
    return Source(path, config, tensors, files)


def _with_class(
    config: dict[str, Any], config_class: str | None, model_class: str | None
) -> dict[str, Any]:
    """A pickled config knows its model type and architecture by its class and its owner's alone."""
    config = dict(config)
    if config_class and not config.get("model_type"):
        parts = config_class.split(".")
        if "models" in parts[:-2]:
            config["model_type"] = parts[parts.index("models") + 1]
    if model_class and not config.get("architectures"):
        config["architectures"] = [model_class.rpartition(".")[2]]
    return config


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file, empty if there is no such file. Numbers that JSON lacks are read as transformers
    writes them, `{"__float__": "Infinity"}`.

    Raises:
        CheckpointError: it cannot be read, or holds something else.
    """
    try:
        config = json.loads(file.read_text(), object_hook=_number)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} holds a {type(config).__name__}, not an object.")
    return config


def _number(value: dict[str, Any]) -> Any:
    return float(value["__float__"]) if value.keys() == {"__float__"} else value


def _weight_files(folder: pathlib.Path) -> tuple[pathlib.Path, ...]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        # In transformers' order: an index beside a whole file is what an earlier, sharded one left.
        if (folder / name).is_file():
            return (folder / name,)
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _shards(index)
    others = sorted(f for f in folder.iterdir() if f.suffix in (".safetensors", *_PICKLES))
    if len(others) == 1:
        return (others[0],)
    listed = ", ".join(f.name for f in others) or "none"
    raise CheckpointError(
        f"{folder} holds no model.safetensors and no pytorch_model.bin (nor an index of shards), and "
        f"of other weight files: {listed}. Name the one file that is meant."
    )


def _shards(index: pathlib.Path) -> tuple[pathlib.Path, ...]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()), key=str)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no index of shards: {error!r}") from error
    if not all(isinstance(name, str) and pathlib.PurePath(name).name == name for name in names):
        raise CheckpointError(f"{index} names files outside its folder, or none.")
    files = tuple(index.parent / name for name in names)
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(
            f"{index.parent} lacks {len(missing)} of {len(files)} weight files that {index.name} "
            f"names: {', '.join(missing[:4])}. Download them again."
        )
    return files


def _state_dict(file: pathlib.Path) -> dict[str, torch.Tensor]:
    if file.suffix == ".safetensors":
        import safetensors
        import safetensors.torch

        try:
            return safetensors.torch.load_file(file)
        except (safetensors.SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is damaged or no safetensors file: {error}") from error
    return _only_tensors(file, torch_load(file))


def torch_load(file: pathlib.Path) -> Any:
    """What `torch.save` wrote to a file that holds data only: tensors, plain values and containers of them.

    Raises:
        CheckpointError: it is damaged, or holds objects.
    """
    if file.is_file() and not zipfile.is_zipfile(file):
        raise CheckpointError(
            f"{file} cannot be read as tensors: it is neither named *.safetensors nor written by torch.save since "
            "torch 1.6 (a zip), or damaged."
        )
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as tensors: {error}") from error


def _only_tensors(file: pathlib.Path, state: object) -> dict[str, torch.Tensor]:
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise CheckpointError(f"{file} holds a {type(state).__name__}, not a dict of tensors.")
    return state


def memory(tensor: torch.Tensor) -> object:
    """Equal for tensors that are one view of one storage, which ties them as much as being one object."""
    if tensor.device.type == "meta" or not tensor.numel():
        return id(tensor)
    return (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
