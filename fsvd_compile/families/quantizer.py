"""The common format as transformers sees it: `LowRankLinear` is swapped in before the weights are loaded.

Imports transformers; `hub` registers it.
"""

from __future__ import annotations

import weakref
from typing import Any

from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

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

    def __getstate__(self) -> dict[str, Any]:
        """For pickles and copies, which belong to another model: what is in this one now."""
        return vars(self) | {"modules": self.to_dict()["modules"], "_model": None}

    def to_dict(self) -> dict[str, Any]:
        model = None if self._model is None else self._model()
        return config_dict(self.modules if model is None else modules_of(model))


def _was_loaded(module: Any) -> bool:
    """Whether a factor came from a file, or may have: what others have put elsewhere bears no mark."""
    weights = (factor.weight for factor in (module.u, module.v))
    return any(
        getattr(weight, "_is_hf_initialized", False)
        or weight.device.type == "meta"
        or hasattr(weight, "ds_id")
        for weight in weights
    )


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
        modules = self.quantization_config.modules
        if not any(_was_loaded(model.get_submodule(name)) for name in modules):
            raise CheckpointError(
                f"from_pretrained: config.json says that {len(modules)} modules are factorized, "
                f"{next(iter(modules))!r} and others, and the files hold factors of none of them. A dense model that "
                "was built from the config of a factorized one is saved like this: delete quantization_config from "
                "its config.json."
            )
        self.quantization_config.follow(model)
        self.attend(model)
        # transformers would refuse `.half()` and the like; here they are right.
        model.is_quantized = False
        return model

    def attend(self, model: Any) -> None:
        """From now on it is asked when the model is saved, or a part of it that has the model's config."""
        for part in model.modules():
            if hasattr(part, "save_pretrained") and part.config is model.config:
                part.hf_quantizer = self

    def get_state_dict_and_metadata(
        self, model: Any, *args: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, str]]:
        # The model may be a copy of the one that was described, or a part of it. Its config is written after this.
        entry = getattr(model.config, "quantization_config", None)
        if isinstance(entry, FlashSVDConfig):
            if modules_of(model):
                entry.follow(model)
            else:
                del model.config.quantization_config
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
