"""Counters of a static cache: out of the layers, so that a position is the counter it is computed from."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import Graph, Node

from fsvd_compile.passes.graph import (
    Memory,
    emit,
    is_input,
    is_static,
    reaches_output,
    shape,
    storage,
    val,
)
from fsvd_compile.passes.pattern import Match
from fsvd_compile.passes.rewrite import Context, Rewrite
from fsvd_compile.passes.vocabulary import arguments, kind_of


def _find_counters(graph: Graph) -> Iterator[Match]:
    """One match a step and kind of counter: `counter.add_(n)` of inputs that nobody looks at afterwards."""
    groups: dict[tuple, list[Node]] = {}
    memory = Memory(graph)
    for node in graph.nodes:
        if node.op != "call_method" or node.target != "add_" or node.kwargs or len(node.args) != 2:
            continue
        counter, step = node.args
        if not is_input(counter) or isinstance(step, bool) or not isinstance(step, int):
            continue
        value = val(counter)
        if value is None or value.dtype.is_floating_point or value.numel() != 1:
            continue
        if any(user is not node and user > node for user in memory.readers(counter)):
            continue
        groups.setdefault((step, value.dtype, value.device), []).append(node)
    for (step, *_), nodes in groups.items():
        counters = [n.args[0] for n in nodes]
        yield Match(nodes[-1], {"counters": counters, "step": step}, nodes[:-1])


def _counters_guard(match: Match, context: Context) -> str | None:
    """A layer's counter is a kernel of its own in the middle of the layer; all of them together are one."""
    counters = match["counters"]
    if len({storage(c) for c in counters}) != len(counters):
        return "one counter is advanced twice"
    if not all(is_static(c) for c in counters):
        return "dynamic shapes"
    return None


def _replace_counters(match: Match, graph: Graph) -> None:
    end = graph.output_node()
    # Like the output, so that it belongs to no layer.
    emit(graph, end, end, torch._foreach_add_, match["counters"], match["step"])


def _find_position(graph: Graph) -> Iterator[Match]:
    for node in list(graph.nodes):
        given = arguments(node) if kind_of(node) == "add" else None
        if given is None or given["alpha"] != 1:
            continue
        for zero, other in ((given["input"], given["other"]), (given["other"], given["input"])):
            if isinstance(other, Node) and _is_zero(zero):
                yield Match(node, {"position": other})
                break


def _is_zero(node: object) -> bool:
    """Whether a value is `arange(1)`."""
    return (
        isinstance(node, Node)
        and node.target is torch.arange
        and node.args == (1,)
        and not node.kwargs.keys() - {"device", "dtype"}
    )


def _position_guard(match: Match, context: Context) -> str | None:
    """`arange(tokens) + length` of one token is the length itself: a kernel a layer."""
    node, position = match.root, match["position"]
    mine, other = val(node), val(position)
    if other is None or not is_static(position) or mine.dtype.is_floating_point:
        return f"{position.name} is no integer tensor of static shape"
    if (other.dtype, other.device) != (mine.dtype, mine.device):
        return (
            f"{position.name} is {other.dtype} on {other.device}, not {mine.dtype} on {mine.device}"
        )
    if other.numel() != 1 or other.dim() > 1:
        return f"{position.name} has shape {shape(position)}, not one number"
    if reaches_output(node):
        return f"{node.name} leaves the graph"
    if match.memory.any(node) is not None:
        return f"{node.name} is written in place"
    users = match.memory.readers(node)
    if any(isinstance(user.target, torch._ops.HigherOrderOperator) for user in users):
        return f"{node.name} goes into a higher-order operator, which takes no aliases"
    last = max(users, default=node)
    writer = match.memory.between(position, node, last)
    if writer is not None:
        return f"{position.name} is written in place by {writer.name}"
    return None


def _replace_position(match: Match, graph: Graph) -> Node:
    position = match["position"]
    if shape(position):
        return position
    return emit(graph, match.root, match.root, torch.reshape, position, (1,))


COUNTERS: tuple[Rewrite, ...] = (
    Rewrite(
        "counters",
        "counter.add_(n) in every layer -> one _foreach_add_ at the end",
        _find_counters,
        _replace_counters,
        _counters_guard,
    ),
    Rewrite(
        "position",
        "arange(1) + x -> x",
        _find_position,
        _replace_position,
        _position_guard,
        quiet=True,
    ),
)
