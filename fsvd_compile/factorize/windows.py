"""Text to calibration batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from fsvd_compile.errors import FactorizeError
from fsvd_compile.factorize.select import class_of


def calibration_windows(
    texts: str | Iterable[str | Mapping[str, Any]],
    tokenizer: Any,
    length: int = 512,
    count: int = 64,
    column: str = "text",
) -> list[torch.Tensor]:
    """Batches for `factorize(calibration=...)`, one window of tokens each.

    Texts are tokenized one by one, with the special tokens the tokenizer gives each, and strung together; no more
    are read than the windows take, so that a streamed data set of any size will do.

    Args:
        texts: A text, or texts: strings, or rows of a `datasets.Dataset` or `IterableDataset` (mappings).
        tokenizer: Called with a string, gives an object with `input_ids`; one of transformers' is told not to warn
            of long texts, which are cut.
        length: Tokens of a window.
        count: Windows at the most.
        column: Of rows: which of their values is the text.

    Returns:
        int64 `[1, length]` each, from the beginning of the texts on; a rest shorter than a window is left.

    Raises:
        FactorizeError: a number is below 1, an item is no text, or all texts together are shorter than a window.
    """
    for name, value in (("length", length), ("count", count)):
        if value < 1:
            raise FactorizeError(f"{name}={value}; it has to be at least 1.")
    texts = [texts] if isinstance(texts, str) else texts
    stream = itertools.chain.from_iterable(_tokens(texts, tokenizer, column))
    windows = []
    while len(windows) < count:
        ids = list(itertools.islice(stream, length))
        if len(ids) < length:
            break
        windows.append(torch.tensor([ids]))
    if not windows:
        raise FactorizeError(
            f"The calibration text has {len(ids)} tokens, fewer than one window of {length}. Give a "
            "longer text or a shorter window."
        )
    return windows


def _tokens(texts: Iterable, tokenizer: Any, column: str) -> Iterator[list[int]]:
    # A text longer than the model's positions is what windows are for.
    own = class_of("transformers.tokenization_utils_base", "PreTrainedTokenizerBase")
    quiet = {"verbose": False} if isinstance(tokenizer, own) else {}
    for i, item in enumerate(texts):
        if isinstance(item, Mapping):
            if column not in item:
                raise FactorizeError(
                    f"row {i} has no {column!r}; it has {', '.join(map(repr, item))}. Name one with column=."
                )
            item = item[column]
        if not isinstance(item, str):
            raise FactorizeError(
                f"text {i} is a {type(item).__name__}; it has to be a string, or a mapping that holds "
                f"one as {column!r}. Tokens need no windows: give them as batches [B, T]."
            )
        yield tokenizer(item, **quiet).input_ids
