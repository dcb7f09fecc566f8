"""RMSNorm between an expand and a shrink of a few tokens, carried by the two.

It crosses the border of two layers, so that a first layer reads less than the others and a last one leaves less: both
are made like them, for layers that are alike are compiled once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

from torch.fx import Graph, Node

from fsvd_compile.kernels import _triton, rms_operands
from fsvd_compile.kernels._linear import carries
from fsvd_compile.passes import vmap
from fsvd_compile.passes.graph import emit, is_input, val
from fsvd_compile.passes.ops import (
    Expand,
    ExpandRms,
    Shrink,
    ShrinkRms,
    as_launched,
    emit_op,
    name_of,
    read,
)
from fsvd_compile.passes.pattern import Match
from fsvd_compile.passes.rewrite import Context, Rewrite
from fsvd_compile.passes.vocabulary import kind_of


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
    if (reason := _why_not_here(context)) is not None:
        return reason
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


def _why_not_here(context: Context) -> str | None:
    if context.device != "cuda" or context.kernels == "aten":
        return f"on {context.device} with kernels={context.kernels!r} the norm is fused otherwise"
    return None


def _carries(op: str, x: Node, weights: list[Node], offsets: list[int]) -> bool:
    launched = as_launched(x)
    if launched is None:
        return False
    with _triton.compiling_only():  # fake tensors have no addresses
        return carries(op, launched, [val(w) for w in weights], offsets)


def _replace_carried(match: Match, graph: Graph) -> Node:
    shrink, y = match["shrink"], match["shrink"].x
    norm = shrink.norm_weight, shrink.norm_offset
    same, scaled, squares = _carrying(graph, y, match["expand"], *norm)
    y.replace_all_uses_with(same)
    graph.erase_node(y)
    carried = ShrinkRms(scaled, squares, shrink.weights, shrink.biases, shrink.norm_eps)
    return emit_op(graph, match.root, match.root, carried)


def _find_first(graph: Graph) -> Iterator[Match]:
    products = (n for n in graph.nodes if name_of(n) or kind_of(n) == "linear")
    first = next(products, None)
    shrink = read(first, Shrink) if first is not None else None
    if shrink is None or shrink.norm != "rms":
        return
    if (twin := _twin(graph, ShrinkRms, _shrinks_like, shrink)) is not None:
        yield Match(first, {"shrink": shrink, "twin": twin}, [])


def _twin(graph: Graph, kind: type, looks: Callable, op: Shrink | Expand) -> Any:
    """The first of the ops that carry a norm which looks like one that does not."""
    carrying = (read(node, kind) for node in graph.nodes)
    return next((t for t in carrying if t is not None and looks(t) == looks(op)), None)


def _shrinks_like(op: Shrink | ShrinkRms) -> tuple:
    weights = [(val(w).shape, val(w).device) for w in op.weights]
    return weights, [b is None for b in op.biases], op.norm_eps


def _first_guard(match: Match, context: Context) -> str | None:
    """Makes the first layer one like the others, which is not compiled by itself then.

    What an expand leaves elsewhere comes from torch ops beside the embedding.
    """
    shrink, x, weight = match["shrink"], match["shrink"].x, match["shrink"].norm_weight
    if (reason := _why_not_here(context)) is not None:
        return reason
    if not _carries("shrink", x, shrink.weights, [0] * len(shrink.weights)):
        return f"the shrink of {x.name} has no kernel that carries a norm"
    if val(x).stride() != val(match["twin"].scaled).stride():
        return (
            f"{x.name} lies in memory as no expand returns it, so that its layer is like no other"
        )
    if weight is not None and not weight < _behind(x):
        return f"{weight.name}, the norm's weight, is made behind {x.name}"
    for value in (x,) if weight is None else (x, weight):
        if (writer := match.memory.between(value, x, match.root)) is not None:
            return f"{value.name} is written in place by {writer.name} before {match.root.name}"
    return None


def _behind(x: Node) -> Node:
    """Where what is computed from x can stand first."""
    node, stretch = x.next, vmap.stretch_of(x)
    while node.op == "placeholder" or (stretch is not None and vmap.stretch_of(node) == stretch):
        node = node.next
    return node


def _replace_first(match: Match, graph: Graph) -> Node:
    shrink = match["shrink"]
    x, before = shrink.x, _behind(shrink.x)
    # An input's place in the model is where it is read first; what is made of it belongs to no layer.
    like = graph.output_node() if is_input(x) else x
    made = emit(graph, before, like, rms_operands, x, shrink.norm_weight, shrink.norm_offset)
    scaled, squares = (emit(graph, before, like, operator.getitem, made, i) for i in range(2))
    carried = ShrinkRms(scaled, squares, shrink.weights, shrink.biases, shrink.norm_eps)
    return emit_op(graph, match.root, match.root, carried)


def _carrying(
    graph: Graph, y: Node, expand: Expand, weight: Node | None, offset: float
) -> tuple[Node, Node, Node]:
    """The results of an expand that carries a norm, in front of the one that does not, y."""
    op = ExpandRms(
        expand.z,
        expand.weights[0],
        expand.biases[0],
        expand.offsets[0],
        expand.residual,
        weight,
        offset,
    )
    left = emit_op(graph, y, y, op)
    same, scaled, squares = (emit(graph, y, y, operator.getitem, left, i) for i in range(3))
    # In the memory of the expand's own result, so that nothing changes for who reads it.
    same.meta["example_value"] = val(y)
    left.meta["example_value"] = val(y), val(scaled), val(squares)
    return same, scaled, squares


def _find_last(graph: Graph) -> Iterator[Match]:
    expands = (n for n in reversed(graph.nodes) if read(n, Expand) or read(n, ExpandRms))
    last = next(expands, None)
    expand = read(last, Expand) if last is not None else None
    if expand is None or len(expand.weights) > 1:
        return
    if (twin := _twin(graph, ExpandRms, _expands_like, expand)) is not None:
        yield Match(last, {"expand": expand, "twin": twin}, [])


def _expands_like(op: Expand | ExpandRms) -> tuple:
    expand = isinstance(op, Expand)
    weight, bias, offset = (
        (op.weights[0], op.biases[0], op.offsets[0]) if expand else (op.weight, op.bias, op.offset)
    )
    return val(weight).shape, val(weight).device, bias is None, offset, op.residual is None


def _last_guard(match: Match, context: Context) -> str | None:
    """Makes the last layer one like the others where no kernel carries the norm behind it; nobody reads what it leaves.

    The layer is not compiled by itself then.
    """
    expand, weight = match["expand"], match["twin"].norm_weight
    if (reason := _why_not_here(context)) is not None:
        return reason
    if expand.activation != "none":
        return f"the expand ends in {expand.activation}"
    if not _carries("expand", expand.z, expand.weights, expand.offsets):
        return f"the expand of {expand.z.name} has no kernel that carries a norm"
    if weight is not None and not is_input(weight):
        return f"{weight.name}, a norm's weight, is computed"
    return None


def _replace_last(match: Match, graph: Graph) -> Node:
    twin = match["twin"]
    norm = twin.norm_weight, twin.norm_offset
    return _carrying(graph, match.root, match["expand"], *norm)[0]


CARRIED: tuple[Rewrite, ...] = (
    Rewrite(
        "carried_norm",
        "shrink(RMSNorm(expand)) of a few tokens -> an expand that leaves sums of squares, a shrink that scales",
        _find_carried,
        _replace_carried,
        _carried_guard,
        quiet=True,
    ),
    Rewrite(
        "carried_first",
        "the norm in front of the first layer -> what the others get from the layer before, of torch ops",
        _find_first,
        _replace_first,
        _first_guard,
        quiet=True,
    ),
    Rewrite(
        "carried_last",
        "the expand of the last layer, which carries no norm -> one that leaves what the others do, for nobody",
        _find_last,
        _replace_last,
        _last_guard,
        quiet=True,
    ),
)
