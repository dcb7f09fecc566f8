"""RMSNorm between an expand and a shrink of a few tokens, carried by the two."""

from __future__ import annotations

import operator
from collections.abc import Iterator

from torch.fx import Graph, Node

from fsvd_compile.kernels import _triton
from fsvd_compile.kernels._linear import carries
from fsvd_compile.passes.graph import emit, val
from fsvd_compile.passes.ops import (
    Expand,
    ExpandRms,
    Shrink,
    ShrinkRms,
    as_launched,
    emit_op,
    read,
)
from fsvd_compile.passes.pattern import Match
from fsvd_compile.passes.rewrite import Context, Rewrite


def _find_carried(graph: Graph) -> Iterator[Match]:
    for node in list(graph.nodes):
        shrink = read(node, Shrink)
        expand = read(shrink.x, Expand) if shrink is not None and shrink.norm == "rms" else None
        if expand is not None:
            yield Match(node, {"shrink": shrink, "expand": expand}, [])


def _carried_guard(match: Match, context: Context) -> str | None:
    """Saves the norm's kernel, where it has one, or its share of every program of the shrink.

    The norm's weight is read ahead: `norm_prologue` has seen that it may be.
    """
    shrink, expand = match["shrink"], match["expand"]
    if context.device != "cuda" or context.kernels == "aten":
        return f"on {context.device} with kernels={context.kernels!r} the norm is fused otherwise"
    if expand.activation != "none":
        return f"the expand ends in {expand.activation}"
    for op, x, arguments, offsets in (
        ("expand", expand.z, expand, expand.offsets),
        ("shrink", shrink.x, shrink, [0] * len(shrink.weights)),
    ):
        if not _carries(op, x, arguments.weights, offsets):
            return f"the {op} of {x.name} has no kernel that carries a norm"
    weight = shrink.norm_weight
    if weight is not None and not weight < shrink.x:
        return f"{weight.name}, the norm's weight, is made behind {shrink.x.name}"
    if (writer := match.memory.between(shrink.x, shrink.x, match.root)) is not None:
        return f"{shrink.x.name} is written in place by {writer.name} before it is normalized"
    return None


def _carries(op: str, x: Node, weights: list[Node], offsets: list[int]) -> bool:
    launched = as_launched(x)
    if launched is None:
        return False
    with _triton.compiling_only():  # fake tensors have no addresses
        return carries(op, launched, [val(w) for w in weights], offsets)


def _replace_carried(match: Match, graph: Graph) -> Node:
    shrink, expand = match["shrink"], match["expand"]
    y = shrink.x
    op = ExpandRms(
        expand.z,
        expand.weights[0],
        expand.biases[0],
        expand.offsets[0],
        expand.residual,
        shrink.norm_weight,
        shrink.norm_offset,
    )
    left = emit_op(graph, y, y, op)
    same, scaled, squares = (emit(graph, y, y, operator.getitem, left, i) for i in range(3))
    # In the memory of the expand's own result, so that nothing changes for who reads it.
    same.meta["example_value"] = val(y)
    left.meta["example_value"] = val(y), val(scaled), val(squares)
    y.replace_all_uses_with(same)
    graph.erase_node(y)
    carried = ShrinkRms(scaled, squares, shrink.weights, shrink.biases, shrink.norm_eps)
    return emit_op(graph, match.root, match.root, carried)


CARRIED: tuple[Rewrite, ...] = (
    Rewrite(
        "carried_norm",
        "shrink(RMSNorm(expand)) of a few tokens -> an expand that leaves sums of squares, a shrink that scales",
        _find_carried,
        _replace_carried,
        _carried_guard,
        quiet=True,
    ),
)
