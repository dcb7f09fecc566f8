"""transformers reads the common format: `from_pretrained` of a directory that `save` wrote.

transformers finds a "quantizer" by the name in `config.json`, ours is in `quantizer`. transformers itself is not
imported for it: the registration waits for the import of its registry.
"""

from __future__ import annotations

import copy
import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from fsvd_compile.families.native import METHOD, modules_of

_REGISTRY = "transformers.quantizers.auto"


def register() -> None:
    """Makes transformers know the format, now or as soon as its registry of quantizers is imported."""
    registry = sys.modules.get(_REGISTRY)
    # Half-way through its own import it has no functions to register with yet.
    if registry is not None and hasattr(registry, "register_quantizer"):
        _register(registry)
    elif not any(isinstance(finder, _Registration) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Registration())


class _Registration(importlib.abc.MetaPathFinder):
    """Registers right after the registry's own import, and then leaves."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _REGISTRY:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            plain = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                plain(module)
                _register(module)
                # Not earlier: an import that fails or is interrupted is tried again.
                if self in sys.meta_path:
                    sys.meta_path.remove(self)

            spec.loader.exec_module = exec_module
        return spec


def describe(model: Any) -> None:
    """From now on the model's own `save_pretrained` writes what its factors are, as for a model that was loaded.

    Nothing happens to what is no transformers model, or is quantized in another way. The config becomes one
    of the model's own: models that were built from one config object share it, and the others are dense.
    """
    transformers = sys.modules.get("transformers.modeling_utils")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return
    shared = model.config
    modules, before = modules_of(model), getattr(shared, "quantization_config", None)
    if not modules or getattr(before, "quant_method", METHOD if before is None else None) != METHOD:
        return
    _register(importlib.import_module(_REGISTRY))
    registry = sys.modules[_REGISTRY]
    entry = registry.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD](modules)
    entry.follow(model)
    quantizer = registry.AUTO_QUANTIZER_MAPPING[METHOD](entry, pre_quantized=True)
    own = copy.copy(shared)
    own.quantization_config = entry
    # Nothing of the model changes before this line; a quantizer without a config that names it does nothing.
    quantizer.attend(model)
    for part in model.modules():
        if part.__dict__.get("config") is shared:
            part.config = own


def _register(registry: ModuleType) -> None:
    if METHOD in registry.AUTO_QUANTIZER_MAPPING:
        return
    from fsvd_compile.families.quantizer import FlashSVDConfig, FlashSVDQuantizer

    registry.register_quantization_config(METHOD)(FlashSVDConfig)
    registry.register_quantizer(METHOD)(FlashSVDQuantizer)
