"""Low-rank chains: U(V x) becomes one shrink and one expand; siblings that share an input become one pair."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Graph, Node

from fsvd_compile.passes.graph import (
    Memory,
    emit,
    is_plain,
    is_static,
    reaches_output,
    read_ahead,
    same_shape,
    shape,
    storage,
    val,
)
from fsvd_compile.passes.ops import Expand, Shrink, emit_op, read
from fsvd_compile.passes.pattern import Call, Match, Var
from fsvd_compile.passes.rewrite import Context, Rewrite
from fsvd_compile.passes.vocabulary import arguments, kind_of

_CHAIN = Call(
    "linear",
    input=Call("linear", input=Var("x"), weight=Var("v"), bias=Var("vb")),
    weight=Var("u"),
    bias=Var("ub"),
)


def chain_guard(match: Match, context: Context) -> str | None:
    """Bytes per token: r·(in + out) for the pair against in·out for the product.

    Below break-even the pair is what was meant, and both ends can take on what surrounds them. Two linears
    above it are two layers (or factors better multiplied out) and are left as they are.
    """
    v, u = match["v"], match["u"]
    for weight, bias in ((v, match["vb"]), (u, match["ub"])):
        if len(shape(weight)) != 2 or not is_static(weight):
            return f"{weight} is no matrix of static shape"
        if not is_bias(bias, weight):
            return f"bias of shape {shape(bias)} is broadcast along rows"
    dtypes = {val(n).dtype for n in (match["x"], v, u)}
    if len(dtypes) != 1 or not next(iter(dtypes)).is_floating_point:
        return "dtypes differ: " + ", ".join(sorted(str(d) for d in dtypes))
    rank, in_features = shape(v)
    out_features = shape(u)[0]
    if rank * (in_features + out_features) >= in_features * out_features:
        return f"rank {rank} is not below break-even for {in_features} -> {out_features}"
    if context.device == "cuda":
        return read_ahead(match.memory, v, u, match["vb"], match["ub"])
    return None


def is_bias(bias: Node | None, weight: Node) -> bool:
    """Whether a linear adds one number of its weight's dtype per feature; `F.linear` also takes what broadcasts."""
    if bias is None:
        return True
    return same_shape(shape(bias), shape(weight)[:1]) and val(bias).dtype == val(weight).dtype


def _replace_chain(match: Match, graph: Graph) -> Node:
    root = match.root
    z = emit_op(graph, root, root, Shrink(match["x"], [match["v"]], [match["vb"]]))
    return emit_op(graph, root, root, Expand(z, [match["u"]], [match["ub"]], [0]))


@dataclasses.dataclass(frozen=True)
class _Sibling:
    """One linear of a group: `first` reads the input, `last` is its result (the same node when dense)."""

    first: Node
    last: Node
    v: Node
    v_bias: Node | None
    u: Node | None = None
    u_bias: Node | None = None

    @property
    def operands(self) -> list[Node]:
        return [n for n in (self.v, self.v_bias, self.u, self.u_bias) if n is not None]

    @property
    def features(self) -> int:
        return shape(self.last)[-1]


def _find_siblings(graph: Graph) -> Iterator[Match]:
    for group, x in _groups(graph):
        factorized = [m for m in group if m.u is not None]
        if factorized:
            ordered = factorized + [m for m in group if m.u is None]
            yield Match(group[0].first, {"x": x, "members": ordered})


def dense_siblings(graph: Graph) -> Iterator[Match]:
    """Groups without a factorized member."""
    for group, x in _groups(graph):
        if all(m.u is None for m in group):
            yield Match(group[0].first, {"x": x, "members": group})


def _groups(graph: Graph) -> Iterator[tuple[list[_Sibling], Node]]:
    memory = Memory(graph)
    for x in list(graph.nodes):
        members = [m for user in x.users if (m := _sibling(user, x)) is not None]
        members.sort(key=lambda m: m.first)
        for group in _unwritten_between(x, members, memory):
            if len(group) > 1:
                yield group, x


def _unwritten_between(
    x: Node, members: list[_Sibling], memory: Memory
) -> Iterator[list[_Sibling]]:
    """Runs of members that see the same x; after a write in place it is another value."""
    group: list[_Sibling] = []
    for member in members:
        if group and memory.between(x, group[0].first, member.last):
            yield group
            group = []
        group.append(member)
    yield group


def _sibling(user: Node, x: Node) -> _Sibling | None:
    shrink = read(user, Shrink)
    if shrink is not None and shrink.x is x:
        expand = read(next(iter(user.users)), Expand) if len(user.users) == 1 else None
        if expand is None or len(expand.weights) != 1 or len(shrink.weights) != 1:
            return None
        if shrink.norm != "none" or expand.activation != "none" or expand.residual is not None:
            return None
        last = next(iter(user.users))
        return _Sibling(
            user, last, shrink.weights[0], shrink.biases[0], expand.weights[0], expand.biases[0]
        )
    given = arguments(user) if kind_of(user) == "linear" else None
    if given is not None and given["input"] is x and given["weight"] is not x:
        return _Sibling(user, user, given["weight"], given["bias"])
    return None


def siblings_guard(match: Match, context: Context) -> str | None:
    """One launch reads all first factors and one all second factors: the bytes stay, two kernels per
    further sibling go. Costs nothing where ops are lowered to ATen: there the group falls apart again."""
    x, members, memory = match["x"], match["members"], match.memory
    first = match.root
    end = max(m.last for m in members)
    for node in (x, *(o for m in members for o in m.operands)):
        writer = memory.between(node, first, end)
        if writer is not None:
            return f"{node.name} is written in place by {writer.name}"
    for member in members:
        for operand in member.operands:
            if not (operand < first):
                return f"{operand.name} is computed after the first sibling"
            if not is_plain(operand) or not is_static(operand):
                return f"{operand.name} is no plain tensor of static shape"
        if len(shape(member.v)) != 2 or val(member.v).dtype != val(x).dtype:
            return f"{member.first.name} has another dtype"
        if not is_bias(member.v_bias, member.v):
            return f"bias of shape {shape(member.v_bias)} is broadcast along rows"
        writer = memory.any(member.last)
        if writer is not None:
            return f"{member.last.name} is written in place by {writer.name}"
        if context.device == "cuda" and (reason := read_ahead(memory, *member.operands)):
            return reason
    return None


def replace_siblings(match: Match, graph: Graph) -> None:
    x, members, first = match["x"], match["members"], match.root
    weights: list[Node] = []
    biases: list[Node | None] = []
    starts: dict[Any, int] = {}
    width = 0
    for member in members:
        key = (member.v, member.v_bias)
        if key not in starts:  # a shared V is read once
            starts[key] = width
            weights.append(member.v)
            biases.append(member.v_bias)
            width += shape(member.v)[0]
    z = emit_op(graph, first, first, Shrink(x, weights, biases))
    pairs = [m for m in members if m.u is not None]
    if pairs:
        offsets = [starts[m.v, m.v_bias] for m in pairs]
        expand = Expand(z, [m.u for m in pairs], [m.u_bias for m in pairs], offsets)
        y = emit_op(graph, first, first, expand)
    values = []
    start = 0
    for member in pairs:
        whole = len(pairs) == 1
        values.append(y if whole else _slice(graph, first, member, y, start))
        start += member.features
    for member in members[len(pairs) :]:
        values.append(_slice(graph, first, member, z, starts[member.v, member.v_bias]))
    for member, value in zip(members, values, strict=True):
        member.last.replace_all_uses_with(value)
        graph.erase_node(member.last)
        if member.first is not member.last:
            graph.erase_node(member.first)


def _slice(graph: Graph, before: Node, member: _Sibling, packed: Node, start: int) -> Node:
    value = emit(graph, before, member.last, torch.narrow, packed, -1, start, member.features)
    if _wants_own_memory(member.last):
        value = emit(graph, before, member.last, own_memory, value)
    return value


def own_memory(value: torch.Tensor) -> torch.Tensor:
    return value.clone(memory_format=torch.contiguous_format)


# Operations that care for values only, not for how their operand lies in memory.
_ANY_LAYOUT = {
    "reshape", "t", "transpose", "permute", "expand", "getitem", "narrow", "add", "mul", "neg", "pow", "square",
    "mean", "silu", "gelu", "relu", "sigmoid", "tanh", "cast", "contiguous", "linear", "matmul", "cat", "sdpa",
    "index_copy_", "layer_norm", "rms_norm", "rsqrt",
}  # fmt: skip


def _wants_own_memory(node: Node) -> bool:
    """A slice of the packed result would alias its siblings: fine inside the graph, not for what leaves it
    (it would keep the whole buffer alive) nor for an operation that may read the layout."""
    if reaches_output(node):
        return True
    for user in node.users:
        if kind_of(user) not in _ANY_LAYOUT and read(user, Shrink) is None:
            return True
        if user.target in ("view", "view_as"):  # not written as `reshape`: it asserts a layout
            return True
        if storage(user) == storage(node) and _wants_own_memory(user):
            return True
    return False


LOWRANK: tuple[Rewrite, ...] = (
    Rewrite(
        "lowrank_chain",
        "linear(linear(x, V), U, b) -> shrink + expand",
        _CHAIN,
        _replace_chain,
        chain_guard,
    ),
    Rewrite(
        "siblings",
        "linears of one input, factorized ones among them -> one shrink and one block-diagonal expand",
        _find_siblings,
        replace_siblings,
        siblings_guard,
        repeat=True,
    ),
)
