"""Launches again: what a kernel was told once, for other tensors that lie as those did.

Which kernel a product takes, its tile, its sizes and its tensor maps follow from how the tensors lie in memory, and
from nothing that is in them. To find all of it out takes Python three times as long as Triton takes to launch; a graph
that is not captured in a CUDA graph does so for every launch of every call.
"""

from __future__ import annotations

import contextlib
import copy
import operator
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fsvd_compile.kernels import _triton, _tuning

# Kinds of launches held at most, of up to 15 KB; the one that was told longest ago goes first. A model has some ten for
# each number of tokens, or as many for each layer whose ranks are its own.
MOST = 4096

# None where it cannot be told again.
_known: OrderedDict[tuple, _Told | None] = OrderedDict()
_answers: dict[tuple, Any] = {}

# From the tensors of a call to an argument of its launch.
Fill = Callable[[Sequence[Tensor | None]], Any]


class _Told(NamedTuple):
    """One launch: the arguments that are as they were, and how to make the others. It holds no tensor."""

    kernel: Any
    grid: tuple[int, ...]
    device: torch.device
    pdl: bool
    fixed: dict[str, Any]
    fills: dict[str, Fill]

    def again(self, tensors: Sequence[Tensor | None]) -> None:
        made = {name: fill(tensors) for name, fill in self.fills.items()}
        _triton.launch(self.kernel, self.grid, self.device, self.pdl, **self.fixed, **made)


def launch(key: Hashable, tensors: Sequence[Tensor | None], anew: Callable[[], None]) -> None:
    """Calls `anew`, or launches what it launched when it was called with this key and tensors that lay alike.

    Args:
        key: All that the launch depends on beside how the tensors lie and what `_tuning` says.
        tensors: All that it reads and writes, or what these are views of. A launch with one of them twice is not kept.
        anew: Works out one launch and makes it.
    """
    if _triton.is_compiling_only() or not _tuning.settled():
        anew()
        return
    generation = _tuning.generation
    whole = (key, generation, *map(_lies, tensors))
    if (told := _known.get(whole)) is not None:
        with contextlib.suppress(KeyError):  # another thread may have made room
            _known.move_to_end(whole)
        told.again(tensors)
        return
    with _triton.recording() as launches:
        anew()
    # Another thread may try tiles, or have read a table, since.
    if whole not in _known and _tuning.settled() and generation == _tuning.generation:
        # Nothing is noted down where something stands in for `_triton.launch`.
        _known[whole] = _told(*launches, tensors) if launches else None
        while len(_known) > MOST:
            _known.popitem(last=False)


def answer(key: Hashable, tensors: Sequence[Tensor | None], find: Callable[[], Any]) -> Any:
    """What `find` returned when it was asked with this key about tensors that lay alike.

    Args:
        key: All that the answer depends on beside how the tensors lie and which GPU they are on.
    """
    if _triton.is_compiling_only():
        return find()
    whole = (key, *map(_lies, tensors))
    found = _answers.get(whole)
    if found is None:
        if len(_answers) >= MOST:
            _answers.clear()
        found = _answers[whole] = find()
    return found


def forget() -> None:
    _known.clear()
    _answers.clear()


def _lies(tensor: Tensor | None) -> tuple | None:
    if tensor is None:
        return None
    return (
        tensor.shape,
        tensor.stride(),
        tensor.dtype,
        tensor.device,
        tensor.data_ptr() % 16,
    )


def _told(launch: tuple, tensors: Sequence[Tensor | None]) -> _Told | None:
    """What can be said again of a launch; None if a tensor of it is none of these, or its place is not clear."""
    there = [id(t) for t in tensors if t is not None]
    if len(set(there)) < len(there):
        return None
    kernel, grid, device, pdl, arguments = launch
    try:
        found = {name: _fill(value, tensors) for name, value in arguments.items()}
    except LookupError:
        return None
    fixed = {name: arguments[name] for name, fill in found.items() if fill is None}
    fills = {name: fill for name, fill in found.items() if fill is not None}
    return _Told(kernel, grid, device, pdl, fixed, fills)


def _fill(value: Any, tensors: Sequence[Tensor | None]) -> Fill | None:
    """How to make an argument; None for one that stays as it is. Raises LookupError for a foreign tensor."""
    if isinstance(value, Tensor):
        return _find(value, tensors)
    if isinstance(getattr(value, "base", None), Tensor):  # a tensor map
        base = _find(value.base, tensors)
        bare = copy.copy(value)
        bare.base = None

        def on_another(given: Sequence[Tensor | None]) -> Any:
            made = copy.copy(bare)
            made.base = base(given)
            return made

        return on_another
    if isinstance(value, (tuple, list)):
        fills = [_fill(item, tensors) for item in value]
        if any(fill is not None for fill in fills):
            kind = type(value)
            fixed = [v if fill is None else None for v, fill in zip(value, fills, strict=True)]
            items = list(zip(fixed, fills, strict=True))
            return lambda given: kind(v if fill is None else fill(given) for v, fill in items)
    return None


def _find(tensor: Tensor, tensors: Sequence[Tensor | None]) -> Fill:
    for i, one in enumerate(tensors):
        if one is tensor:
            return operator.itemgetter(i)
    memory = tensor.untyped_storage().data_ptr()
    around = [
        (i, one)
        for i, one in enumerate(tensors)
        if one is not None and one.untyped_storage().data_ptr() == memory
    ]
    if len(around) != 1 or around[0][1].dtype is not tensor.dtype:
        raise LookupError("not one of the tensors, nor a view of one alone")
    i, one = around[0]
    size, stride = tensor.shape, tensor.stride()
    shift = tensor.storage_offset() - one.storage_offset()
    return lambda given: given[i].as_strided(size, stride, given[i].storage_offset() + shift)
