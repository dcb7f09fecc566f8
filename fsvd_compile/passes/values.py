"""Fake values of calls: what they return for fake tensors, computed once for calls that look alike."""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx import Node
from torch.fx.node import map_arg

# By mode, which lives as long as a compilation: size, stride, dtype and device of what a call returned, or a list of
# those where it returned a tuple.
_returned: weakref.WeakKeyDictionary[FakeTensorMode, dict[tuple, tuple | list[tuple]]] = (
    weakref.WeakKeyDictionary()
)


def set_value(node: Node, writes: bool) -> None:
    """Compute a call's fake value from the fake values of its arguments.

    The layers of a model call the same functions with values that look the same, and to run one on fake tensors takes
    up to milliseconds. So a call that writes nothing and returned a tensor in memory of its own, or a tuple of such, is
    not run again for arguments that differ in nothing but their memory; others like them are made instead.

    Args:
        node: A `call_function` or `call_method`.
        writes: Whether it may write one of its arguments.
    """
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["example_value"])
    fakes: list[FakeTensor] = []
    key: tuple | None = node.op, node.target, _look((args, kwargs), fakes)
    mode = fakes[0].fake_mode if fakes else None
    if writes or mode is None or not _hashable(key):
        key = None
    made = _returned.setdefault(mode, {}) if key is not None else {}
    known = made.get(key)
    if known is not None:
        several = isinstance(known, list)
        node.meta["example_value"] = (
            tuple(_another(mode, *one) for one in known) if several else _another(mode, *known)
        )
        return
    with torch.no_grad(), mode or contextlib.nullcontext(), _decompositions(fakes):
        if node.op == "call_function":
            value = node.target(*args, **kwargs)
        else:
            value = getattr(args[0], node.target)(*args[1:], **kwargs)
    several = type(value) is tuple
    parts = value if several else (value,)
    if key is not None and parts and _in_memory_of_their_own(parts, fakes):
        looks = [(tuple(v.shape), v.stride(), v.dtype, v.device) for v in parts]
        made[key] = looks if several else looks[0]
    node.meta["example_value"] = value


def _another(mode: FakeTensorMode, size, stride, dtype: torch.dtype, device: torch.device):
    """What `torch.empty_strided` returns in this mode; there, looking the call up takes seven times as long."""
    with torch.no_grad(), unset_fake_temporarily():
        memory = torch.empty_strided(size, stride, dtype=dtype, device="meta")
        return FakeTensor(mode, memory, device)


class _Unlike:
    """Stands for what no other value looks like."""

    __hash__ = None


def _look(value: Any, fakes: list[FakeTensor]) -> Any:
    """What a function may see of a value but its memory; adds the fake tensors in it to `fakes`."""
    if isinstance(value, torch.Tensor):
        if isinstance(value, FakeTensor):
            fakes.append(value)
        if not _simple(value) or value.constant is not None:
            return _Unlike()
        return torch.Tensor, tuple(value.shape), value.stride(), value.dtype, value.device
    if isinstance(value, (tuple, list)):
        return type(value), *(_look(v, fakes) for v in value)
    if isinstance(value, dict):
        return dict, *((k, _look(v, fakes)) for k, v in value.items())
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return _Unlike()  # its hash would ask for its number, and so fix it
    if isinstance(value, slice):
        return slice, *(_look(v, fakes) for v in (value.start, value.stop, value.step))
    # By its text a float differs from the one that equals it: 0.0 and -0.0.
    return type(value), repr(value) if isinstance(value, float) else value


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _simple(value: Any) -> bool:
    """Whether a value is a fake tensor that its size, stride, dtype and device describe."""
    return (
        type(value) is FakeTensor
        and value.layout == torch.strided
        and value.storage_offset() == 0
        and not (value.is_conj() or value.is_neg())
        and all(type(n) is int for n in (*value.shape, *value.stride()))
    )


def _in_memory_of_their_own(values: tuple, fakes: list[FakeTensor]) -> bool:
    if not all(_simple(value) and value._base is None for value in values):
        return False
    memory = [t.untyped_storage()._cdata for t in (*values, *fakes)]
    own = memory[: len(values)]
    return len(set(own)) == len(own) and not set(own) & set(memory[len(values) :])


def _decompositions(tensors: list[FakeTensor]) -> contextlib.AbstractContextManager:
    """Python's where a size is symbolic, as Dynamo has it: of torch 2.11's in C++ one asks CUDA tensors for numbers
    and so fixes the symbols. Not for other values: some of Python's copy what eager only views."""
    symbolic = any(not isinstance(s, int) for t in tensors for s in (*t.shape, *t.stride()))
    return enable_python_dispatcher() if symbolic else contextlib.nullcontext()
