"""What `torch.vmap` leaves in a graph: calls that enter and leave it, and between them tensors that stand for many.

transformers before 5.0 makes its attention masks so. Nobody may look into such a stretch, cut it, or run a part of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch.fx import Graph, Node

from fsvd_compile.passes.graph import written_by
from fsvd_compile.passes.vocabulary import kind_of

_PRODUCTS = ("linear", "addmm", "matmul", "sdpa")


def inside(graph: Graph) -> list[Node]:
    """The operations from the beginning to the end of every `torch.vmap`, both included."""
    found, depth = [], 0
    for node in graph.nodes:
        name = getattr(node.target, "__name__", None) if node.op == "call_function" else None
        depth += name == "_vmap_increment_nesting"
        if depth:
            found.append(node)
        depth -= name == "_vmap_decrement_nesting"
    return found


def stands_for_others(node: Node) -> bool:
    """Whether a value is a tensor of a transform of `torch.func`."""
    value = node.meta.get("example_value")
    return isinstance(value, torch.Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(
        value
    )


def can_be_hidden(graph: Graph) -> bool:
    """Whether all such tensors are inside `torch.vmap`, and nothing there is written or what this package is for.

    A write to a tensor that stands for others is one to memory that nobody can name.
    """
    hidden = set(inside(graph))
    return not any(
        kind_of(node) in _PRODUCTS or written_by(node)
        if node in hidden
        else stands_for_others(node)
        for node in graph.nodes
    )


def hide(graph: Graph) -> None:
    """Takes what is inside out of the vocabulary: no rewrite knows these operations, nor how tensors look there."""
    for node in inside(graph):
        if stands_for_others(node):
            del node.meta["example_value"]
        node.meta["opaque"] = True


def is_hidden(node: Node) -> bool:
    return node.meta.get("opaque", False)


def is_split(runs: Sequence[Sequence[Node]]) -> bool:
    """Whether one of these runs of operations may end inside `torch.vmap`."""
    return any(is_hidden(a[-1]) and is_hidden(b[0]) for a, b in itertools.pairwise(runs))
