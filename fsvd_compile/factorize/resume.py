"""Finished layers in a directory, so that `factorize` goes on where it was interrupted."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from fsvd_compile.errors import FactorizeError
from fsvd_compile.factorize.report import LayerReport, ModuleReport
from fsvd_compile.factorize.select import Target

_RUN = "run.json"
# Another one where the reports have other fields, or the factors come from another method.
_FORMAT = 1


class Finished:
    """What a run has finished: the ranks of all modules, and factors by layer.

    Every file appears under its name only when it is complete: it is written beside it and renamed.

    Args:
        folder: Made if it is not there.
        run: What the run depends on, by name, see `described`.

    Raises:
        FactorizeError: the folder is of another run or of none, or cannot be written.
    """

    def __init__(self, folder: str | os.PathLike, run: Mapping[str, str]) -> None:
        self.folder = pathlib.Path(folder)
        path = self.folder / _RUN
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            there = [file.name for file in self.folder.iterdir() if file.suffix != ".unfinished"]
            if not there:
                self._write(_RUN, json.dumps(dict(run), indent=1))
            before = json.loads(path.read_text("utf-8")) if path.is_file() else None
        except (OSError, ValueError) as error:
            raise self._unusable(error) from error
        if not isinstance(before, dict):
            raise FactorizeError(
                f"resume: {folder} holds files but no {_RUN} of factorize; name an empty or new directory."
            )
        if other := [name for name in run if before.get(name) != run[name]]:
            raise FactorizeError(
                f"resume: {folder} is of another run, which differs in {', '.join(other)}. Give the "
                "same arguments, or another directory."
            )

    def ranks(self) -> dict[str, int | None] | None:
        """The ranks that were allocated, None for dense; `None` if that is not done."""
        try:
            text = (self.folder / "ranks.json").read_text("utf-8")
            return json.loads(text)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise self._unusable(error) from error

    def save_ranks(self, ranks: Mapping[str, int | None]) -> None:
        try:
            self._write("ranks.json", json.dumps(dict(ranks), indent=1))
        except OSError as error:
            raise self._unusable(error) from error

    def layer(
        self, index: int
    ) -> tuple[dict[str, torch.Tensor], list[ModuleReport], LayerReport | None] | None:
        """Tensors "<module>.u" and "<module>.v" of a layer and its reports; `None` if it is not done."""
        path = self._path(index)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                found = json.loads(file.metadata()["reports"])
            modules = [ModuleReport(**entry) for entry in found["modules"]]
            layer = LayerReport(**found["layer"]) if found["layer"] else None
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise self._unusable(error) from error
        if tensors.keys() != {f"{module.name}.{key}" for module in modules for key in "uv"}:
            raise self._unusable(f"{path.name} does not hold the factors that it reports")
        return tensors, modules, layer

    def save_layer(
        self,
        index: int,
        tensors: Mapping[str, torch.Tensor],
        modules: Sequence[ModuleReport],
        layer: LayerReport | None,
    ) -> None:
        reports = {
            "modules": [dataclasses.asdict(module) for module in modules],
            "layer": None if layer is None else dataclasses.asdict(layer),
        }
        path = self._path(index)
        draft = path.with_suffix(".unfinished")
        try:
            save_file(
                {key: tensor.detach().contiguous() for key, tensor in tensors.items()},
                draft,
                {"reports": json.dumps(reports)},
            )
            draft.replace(path)
        except (OSError, SafetensorError) as error:
            raise self._unusable(error) from error

    def _path(self, index: int) -> pathlib.Path:
        return self.folder / f"layer-{index:04d}.safetensors"

    def _write(self, name: str, text: str) -> None:
        draft = self.folder / f"{name}.unfinished"
        draft.write_text(text, "utf-8")
        draft.replace(self.folder / name)

    def _unusable(self, error: Exception | str) -> FactorizeError:
        return FactorizeError(f"resume: {self.folder} cannot be used: {error}. Name another one.")


def described(
    model: nn.Module, targets: Iterable[Target], calibration: Sequence[Any], **options: Any
) -> dict[str, str]:
    """What a run depends on: the files, checksums of parameters and batches, modules with ranks, options."""
    return {
        "the format of its files": str(_FORMAT),
        "the model": _checksum(dict(model.named_parameters()) | dict(model.named_buffers())),
        "keep= or select=": _checksum([(t.name, t.rank) for t in targets]),
        "calibration=": _checksum(list(calibration)),
        **{f"{name}=": repr(value) for name, value in options.items()},
    }


def _checksum(value: Any) -> str:
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            digest.update(repr(key).encode())
            _feed(digest, item)
    elif isinstance(value, (list, tuple)):
        digest.update(f"[{len(value)}]".encode())
        for item in value:
            _feed(digest, item)
    else:
        digest.update(repr(value).encode())
