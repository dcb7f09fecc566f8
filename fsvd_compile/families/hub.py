"""transformers reads the common format: `from_pretrained` of a directory that `save` wrote.

transformers finds a "quantizer" by the name in `config.json`; ours swaps `LowRankLinear` in before the weights
are loaded. transformers itself is not imported for it: the registration waits for the import of its registry.
"""

from __future__ import annotations

import copy
import importlib
import importlib.abc
import importlib.machinery
import sys
import weakref
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from fsvd_compile.errors import CheckpointError
from fsvd_compile.families.native import (
    METHOD,
    NOTE,
    VERSION,
    config_dict,
    keep_factors,
    modules_of,
    state_of,
    swap_in,
    ties_of,
)
from fsvd_compile.families.parallel import split_factors

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
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            plain = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                plain(module)
                _register(module)

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
    own = copy.copy(shared)
    own.quantization_config = entry
    for part in model.modules():
        if part.__dict__.get("config") is shared:
            part.config = own
    model.hf_quantizer = registry.AUTO_QUANTIZER_MAPPING[METHOD](entry, pre_quantized=True)


def _register(registry: ModuleType) -> None:
    if METHOD in registry.AUTO_QUANTIZER_MAPPING:
        return
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class FlashSVDConfig(QuantizationConfigMixin):
        """The entry `quantization_config` of a `config.json`, see `families.native`."""

        def __init__(
            self,
            modules: dict[str, dict[str, Any]] | None = None,
            version: int = VERSION,
            note: str = NOTE,
            quant_method: str = METHOD,
            **unknown: Any,
        ) -> None:
            if version != VERSION or not isinstance(modules, dict) or not modules:
                raise CheckpointError(
                    f"config: quantization_config of {METHOD!r} has version={version!r} and modules="
                    f"{str(modules)[:60]}; this version of fsvd_compile reads version {VERSION} with a "
                    "dict of at least one module."
                )
            self.quant_method = quant_method
            self.version = version
            self.note = note
            self.modules = modules
            self._model: weakref.ref | None = None

        def follow(self, model: Any) -> None:
            """From now on the entry describes what is in the model when it is written."""
            self._model = weakref.ref(model)

        def to_dict(self) -> dict[str, Any]:
            model = None if self._model is None else self._model()
            return config_dict(self.modules if model is None else modules_of(model))

    class FlashSVDQuantizer(HfQuantizer):
        """Swaps the factorized modules in; nothing is quantized."""

        requires_calibration = False

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
            modules = self.quantization_config.modules
            swap_in(model, modules)
            before = model.tp_plan or {}
            if (plan := split_factors(model, before)) != before:
                model.tp_plan = plan
            # Under its second name a shared factor is not missing from the file: it is tied.
            ties = ties_of(model)
            ties |= {
                f"{name}.v.weight": f"{entry['v']}.v.weight"
                for name, entry in modules.items()
                if "v" in entry
            }

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            self.quantization_config.follow(model)
            # transformers would refuse `.half()` and the like; here they are right.
            model.is_quantized = False
            return model

        def get_state_dict_and_metadata(
            self, model: Any, *args: Any, **kwargs: Any
        ) -> tuple[dict[str, Any], dict[str, str]]:
            keep_factors(model)
            return state_of(model), {}

        def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return True

        @property
        def is_compileable(self) -> bool:
            return True

    registry.register_quantization_config(METHOD)(FlashSVDConfig)
    registry.register_quantizer(METHOD)(FlashSVDQuantizer)
