"""What `torch.vmap` leaves in a graph: calls that enter and leave it, and between them tensors that stand for many.

transformers before 5.0 makes its attention masks so. Nobody may look into such a stretch, cut it, or run a part of it.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from fsvd_compile.passes.graph import storage, written_by


def stretches(graph: Graph) -> list[list[Node]]:
    """The operations from the beginning to the end of every outermost `torch.vmap`, both included."""
    found: list[list[Node]] = []
    depth = 0
    for node in graph.nodes:
        name = getattr(node.target, "__name__", None) if node.op == "call_function" else None
        if name == "_vmap_increment_nesting":
            found += [] if depth else [[]]
            depth += 1
        if depth:
            found[-1].append(node)
        depth -= name == "_vmap_decrement_nesting"
    return found


def can_be_hidden(graph: Graph) -> bool:
    """Whether all tensors of a transform are inside `torch.vmap`, and what is there stays right whatever is rewritten.

    That is so where nothing floating comes in, whose layout a rewrite may change; where nothing is written, as nobody
    could say to which memory; and where no memory of outside comes out again.
    """
    hidden: set[Node] = set()
    for stretch in stretches(graph):
        inside = set(stretch)
        given = {n for node in stretch for n in node.all_input_nodes} - inside
        results = [n for n in stretch if any(user not in inside for user in n.users)]
        if any(map(_may_change, given)) or any(map(written_by, stretch)):
            return False
        if any(map(_stands_for_others, results)):
            return False
        before = (n for n in graph.nodes if n < stretch[0] and not _stands_for_others(n))
        if not {storage(n) for n in results}.isdisjoint(map(storage, before)):
            return False
        hidden |= inside
    return not any(_stands_for_others(n) for n in graph.nodes if n not in hidden)


def hide(graph: Graph) -> None:
    """Takes what is inside out of the vocabulary: no rewrite knows these operations, nor how tensors look there."""
    for i, stretch in enumerate(stretches(graph)):
        for node in stretch:
            if _stands_for_others(node):
                del node.meta["example_value"]
            node.meta["opaque"] = i


def stretch_of(node: Node) -> int | None:
    """Which stretch a hidden operation belongs to."""
    return node.meta.get("opaque")


def _may_change(node: Node) -> bool:
    """Whether a rewrite may lay a value out otherwise; those of integers and truth values leave that as it is."""
    value = node.meta.get("example_value")
    if isinstance(value, torch.Tensor):
        return value.is_floating_point() or value.is_complex()
    return not isinstance(value, (int, torch.SymInt))


def _stands_for_others(node: Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, torch.Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(
        value
    )
