"""What transformers stores under other names than the model's, or in other pieces: experts one by one, say."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class Conversions:
    """transformers' own table for a model, as far as it says where a tensor of a checkpoint goes.

    Saving and loading go through it (`transformers.conversion_mapping`, from 5.0 on; before there is none): a key is
    renamed by every renaming that matches, then taken by one converter at most, which makes a parameter of several
    tensors. `from_pretrained` does that with a state dict as with files, so that nothing is converted here.
    """

    def __init__(self, model: Any) -> None:
        self._renamings, self._converters = [], []
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter
        except ModuleNotFoundError:
            return
        for entry in get_model_conversion_mapping(model):
            converts = isinstance(entry, WeightConverter)
            (self._converters if converts else self._renamings).append(entry)

    def renamed(self, key: str) -> str:
        """The key as converters and the model know it."""
        for renaming in self._renamings:
            key, _ = renaming.rename_source_key(key)
        return key

    def target(self, key: str) -> str | None:
        """The parameter that a renamed key is a piece of; None for one that stands for itself, or for several."""
        for converter in self._converters:
            target, pattern = converter.rename_source_key(key)
            if pattern is not None:
                return target if len(converter.target_patterns) == 1 else None
        return None


def leave_alone(model: Any, keys: Iterable[str]) -> None:
    """From now on a model's `save_pretrained` joins none of these tensors with others, nor splits them.

    It takes the table backwards: q, k and v become one weight where they were one in published files (NomicBert), and
    factors are named like them, but have ranks of their own. What a converter left out here would have made stands
    under the model's names, which every version reads.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange, WeightConverter
    except (
        ImportError
    ):  # before 5.0 nothing is joined, and before 5.9 no converter takes factors along
        return
    table = getattr(model, "_weight_conversions", None)
    if table is None:
        # As `save_pretrained` would have it for a model that was not loaded.
        table = get_model_conversion_mapping(model, add_legacy=False)
        table = [entry for entry in table if not isinstance(entry, PrefixChange)]
    keys = list(keys)

    def joins(entry: Any) -> bool:
        backwards = entry.reverse_transform()
        return any(backwards.rename_source_key(key)[1] is not None for key in keys)

    model._weight_conversions = [
        entry for entry in table if not isinstance(entry, WeightConverter) or not joins(entry)
    ]
