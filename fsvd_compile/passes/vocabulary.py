"""One name per idea: the operations a Dynamo graph can spell in several ways, and how to read their arguments.

`torch.add(x, y)`, `x + y`, `x.add(y)` are all kind "add" with arguments `input` and `other`. Patterns are written
against kinds, so a spelling is added here once and every pattern understands it.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

REQUIRED = object()


@dataclasses.dataclass(frozen=True)
class Kind:
    """An operation: its parameters in order with defaults, and every target that spells it."""

    name: str
    parameters: tuple[tuple[str, Any], ...]
    functions: tuple[Callable, ...] = ()
    methods: tuple[str, ...] = ()


def _kind(name: str, parameters: str, functions: tuple = (), methods: tuple = (), **defaults: Any):
    names = parameters.split()
    return Kind(name, tuple((n, defaults.get(n, REQUIRED)) for n in names), functions, methods)


_KINDS = (
    _kind("linear", "input weight bias", (F.linear,), bias=None),
    _kind("addmm", "input mat1 mat2 beta alpha", (torch.addmm,), ("addmm",), beta=1, alpha=1),
    _kind(
        "matmul",
        "input other",
        (torch.matmul, torch.mm, operator.matmul),
        ("matmul", "mm", "__matmul__"),
    ),
    _kind("add", "input other alpha", (operator.add, torch.add), ("add", "__add__"), alpha=1),
    _kind("mul", "input other", (operator.mul, torch.mul), ("mul", "__mul__", "multiply")),
    _kind("neg", "input", (operator.neg, torch.neg), ("neg", "__neg__")),
    _kind("pow", "input exponent", (operator.pow, torch.pow), ("pow", "__pow__")),
    _kind("square", "input", (torch.square,), ("square",)),
    _kind("mean", "input dim keepdim dtype", (torch.mean,), ("mean",), keepdim=False, dtype=None),
    _kind("rsqrt", "input", (torch.rsqrt,), ("rsqrt",)),
    _kind("tanh", "input", (torch.tanh, F.tanh), ("tanh",)),
    _kind("sigmoid", "input", (torch.sigmoid, F.sigmoid), ("sigmoid",)),
    _kind("silu", "input inplace", (F.silu, torch._C._nn.silu), (), inplace=False),
    _kind("gelu", "input approximate", (F.gelu,), (), approximate="none"),
    _kind("relu", "input inplace", (F.relu, torch.relu), ("relu",), inplace=False),
    _kind(
        "dropout",
        "input p training inplace",
        (F.dropout, torch.dropout),
        (),
        p=0.5,
        training=True,
        inplace=False,
    ),
    _kind(
        "layer_norm",
        "input normalized_shape weight bias eps",
        (F.layer_norm,),
        (),
        weight=None,
        bias=None,
        eps=1e-5,
    ),
    _kind(
        "rms_norm",
        "input normalized_shape weight eps",
        (F.rms_norm, torch.rms_norm),
        (),
        weight=None,
        eps=None,
    ),
    _kind(
        "sdpa",
        "query key value attn_mask dropout_p is_causal scale enable_gqa",
        (F.scaled_dot_product_attention,),
        (),
        attn_mask=None,
        dropout_p=0.0,
        is_causal=False,
        scale=None,
        enable_gqa=False,
    ),
    _kind("getitem", "input index", (operator.getitem,), ("__getitem__",)),
    _kind("narrow", "input dim start length", (torch.narrow,), ("narrow",)),
    _kind("cat", "tensors dim", (torch.cat, torch.concat, torch.concatenate), (), dim=0),
    _kind(
        "transpose",
        "input dim0 dim1",
        (torch.transpose, torch.swapaxes),
        ("transpose", "swapaxes"),
    ),
    # `w.T` and `w.mT` since torch 2.14.
    _kind("t", "input", (torch.t, torch.ops.aten.numpy_T, torch.ops.aten.mT), ("t",)),
    _kind("contiguous", "input", (), ("contiguous",)),
    _kind("index_copy_", "input dim index source", (torch.Tensor.index_copy_,), ("index_copy_",)),
    # These take shapes, dtypes or devices in many forms; what they do is read off their result.
    _kind(
        "reshape",
        "input",
        (torch.reshape, torch.flatten, torch.unsqueeze, torch.squeeze, torch.unflatten),
        ("view", "reshape", "flatten", "unsqueeze", "squeeze", "view_as", "unflatten"),
    ),
    _kind("expand", "input", (), ("expand", "expand_as")),
    _kind("permute", "input", (torch.permute,), ("permute",)),
    _kind(
        "cast",
        "input",
        (),
        ("to", "float", "half", "bfloat16", "double", "type_as", "type"),
    ),
)

_BY_FUNCTION = {f: kind for kind in _KINDS for f in kind.functions}
_BY_METHOD = {m: kind for kind in _KINDS for m in kind.methods}
# What is read off the result instead of the arguments.
_BY_RESULT = ("reshape", "expand", "permute", "cast")
# Up to torch 2.13 `w.T` reaches the graph as `getattr(w, "T")`.
_BY_ATTRIBUTE = {name: kind for kind in _KINDS if kind.name == "t" for name in ("T", "mT")}

# The in-place form of an operation on a tensor that nobody else reads means the out-of-place one.
IN_PLACE: dict[Any, Callable] = {
    operator.iadd: torch.add,
    "add_": torch.add,
    operator.imul: torch.mul,
    "mul_": torch.mul,
    "relu_": torch.relu,
    torch.relu_: torch.relu,
}


def kind_of(node: Any) -> str | None:
    """The kind of a node, or None for anything outside the vocabulary."""
    kind = _lookup(node)
    return kind.name if kind else None


def _lookup(node: Any) -> Kind | None:
    if not isinstance(node, Node) or "opaque" in node.meta:
        return None
    if node.op == "call_function":
        if node.target is getattr and len(node.args) == 2:
            return _BY_ATTRIBUTE.get(node.args[1])
        try:
            return _BY_FUNCTION.get(node.target)
        except TypeError:  # an unhashable target
            return None
    if node.op == "call_method":
        return _BY_METHOD.get(node.target)
    return None


def arguments(node: Node) -> dict[str, Any] | None:
    """The arguments of a node of a known kind by name, defaults filled in; None if they do not fit."""
    kind = _lookup(node)
    if kind is None:
        return None
    if kind.name in _BY_RESULT or node.target is getattr:
        source = node.args[0] if node.args else node.kwargs.get("input")
        return {"input": source}
    names = [name for name, _ in kind.parameters]
    given = dict(zip(names, node.args, strict=False))
    if len(node.args) > len(names) or set(node.kwargs) - set(names):
        return None
    given.update(node.kwargs)
    for name, default in kind.parameters:
        if name not in given:
            if default is REQUIRED:
                return None
            given[name] = default
    return given
