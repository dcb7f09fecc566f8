"""Cutting a graph at layer borders, so that layers of the same shape are compiled once and reused.

A layer is a run of operations whose place in the model (Dynamo's `nn_module_stack`) goes through the same entry of a
list of modules; what lies between runs is glue (embedding, masks, final norm, head). Two runs are the same layer when
they do the same operations on inputs of the same layout; which weights and caches they read is an argument.
"""

from __future__ import annotations

import dataclasses
import operator
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.node import map_arg

from fsvd_compile.passes import vmap
from fsvd_compile.passes.graph import is_input, is_static, set_value, storage, val
from fsvd_compile.passes.ops import name_of
from fsvd_compile.passes.vocabulary import kind_of

# Shorter runs are not worth a call of their own: the call costs about 20 us of Python on the host.
MIN_NODES = 6

_ENTRY = re.compile(r"^(.*?)(?:\.|\[')(\d+)(?=\.|'\]|\[|$)")


@dataclasses.dataclass
class Piece:
    """A run of operations with the values it reads from and hands to the rest of the graph."""

    nodes: list[Node]
    inputs: list[Node]
    outputs: list[Node]

    def signature(self) -> tuple:
        """What makes two pieces the same function: operations, constants, and how inputs lie in memory."""
        local = {n: f"%{i}" for i, n in enumerate((*self.inputs, *self.nodes))}
        body = tuple(
            (node.op, _target_name(node), repr(map_arg(node.args, lambda n: _Ref(local[n]))),
             repr(map_arg(node.kwargs, lambda n: _Ref(local[n]))))
            for node in self.nodes
        )  # fmt: skip
        memory: dict[int | None, int] = {}
        layout = tuple(
            # As text: a symbolic size is not to be hashed.
            (f"{tuple(v.shape)} {v.stride()}", v.dtype, v.device, memory.setdefault(storage(n), i))
            if (v := val(n)) is not None
            else n  # a number is a symbol of this graph: shared with nobody
            for i, n in enumerate(self.inputs)
        )
        return body, layout, tuple(local[n] for n in self.outputs)

    @property
    def symbolic(self) -> bool:
        """Whether it reads numbers, or tensors of symbolic sizes."""
        return any(val(n) is None or not is_static(n) for n in self.inputs)

    def binds_its_symbols(self) -> bool:
        """Whether every symbol in a layout is an input itself or the plain size of one, where Inductor finds it."""
        known, used = set(), set()
        for node in self.inputs:
            value = val(node)
            sizes = [node.meta["example_value"]] if value is None else value.shape
            if not all(isinstance(size, (int, torch.SymInt)) for size in sizes):
                return False  # a computed float: Inductor would fix what it is computed from
            known |= {_expression(s) for s in sizes}
            for size in sizes if value is None else (*sizes, *value.stride()):
                used |= getattr(_expression(size), "free_symbols", set())
        return used <= known

    def module(self) -> GraphModule:
        """The run as a graph of its own, inputs in order of first use."""
        graph = Graph()
        copies: dict[Node, Node] = {}
        for i, source in enumerate(self.inputs):
            copies[source] = graph.placeholder(f"x{i}")
            copies[source].meta = dict(source.meta)
        for node in self.nodes:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(tuple(copies[n] for n in self.outputs))
        return GraphModule({}, graph)


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


class _Ref(str):
    def __repr__(self) -> str:
        return str(self)


def _target_name(node: Node) -> str:
    if isinstance(node.target, str):
        return node.target
    return f"{getattr(node.target, '__module__', '')}.{getattr(node.target, '__qualname__', node.target)}"


def cut(graph: Graph) -> list[Piece]:
    """The graph as pieces in order; a single piece when no layer repeats.

    A graph of symbolic shapes stays whole if one of its pieces would not see a symbol that it needs.
    """
    calls = [n for n in graph.nodes if n.op in ("call_function", "call_method")]
    # A sub-graph (of a control-flow or attention operator) is a constant that a piece cannot take as an input.
    bodies = any(
        n.op == "call_module" or (n.op == "get_attr" and val(n) is None) for n in graph.nodes
    )
    # What a tensor holds (a float of the model, with dynamic=True) is known to the whole graph's inputs only.
    if bodies or any(n.target in ("item", torch.ops.aten.item.default) for n in calls):
        return [_piece(calls)]
    _bring_views_home(graph)
    _take_every_result(graph)
    calls = [n for n in graph.nodes if n.op in ("call_function", "call_method")]
    runs = _runs(calls)
    pieces = [_piece(run) for run in runs]
    _hand_out_as_twins_do(pieces)
    repeated = Counter(p.signature() for p in pieces if len(p.nodes) >= MIN_NODES)
    repeats = any(count > 1 for count in repeated.values())
    if not repeats or not all(p.binds_its_symbols() for p in pieces):
        return [_piece(calls)]
    return pieces


def _runs(calls: list[Node]) -> list[list[Node]]:
    prefix = _layer_list(calls)
    runs: list[list[Node]] = []
    last: object = object()
    for node in calls:
        key = _entry(node, prefix)
        stretch = vmap.stretch_of(node)
        if stretch is not None and runs and vmap.stretch_of(runs[-1][-1]) == stretch:
            key = last  # whatever module it names: nothing may end inside
        if key != last:
            runs.append([])
            last = key
        runs[-1].append(node)
    return runs


def _layer_list(calls: list[Node]) -> str | None:
    """The list of modules that holds the most operations."""
    prefixes = Counter(m.group(1) for n in calls if (m := _ENTRY.match(_path(n))))
    return prefixes.most_common(1)[0][0] if prefixes else None


def _path(node: Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


def _entry(node: Node, prefix: str | None) -> int | None:
    found = _ENTRY.match(_path(node))
    return int(found.group(2)) if found and found.group(1) == prefix else None


def _bring_views_home(graph: Graph) -> None:
    """Views of inputs that rewrites hoisted to the top belong to the layer that reads them."""
    for node in list(graph.nodes):
        if kind_of(node) in ("t", "transpose", "reshape") and is_input(node.args[0]) and node.users:
            first = min(node.users)
            if vmap.stretch_of(first) is None:
                first.prepend(node)


def _take_every_result(graph: Graph) -> None:
    """Also the results of our ops that nobody reads, as of a last layer, so that it looks like the others."""
    for node in list(graph.nodes):
        results = node.meta.get("example_value")
        if not name_of(node) or not isinstance(results, tuple):
            continue
        taken = {n.args[1]: n for n in node.users if n.target is operator.getitem}
        last = node
        for i, value in enumerate(results):
            if i not in taken:
                with graph.inserting_after(last):
                    taken[i] = graph.call_function(operator.getitem, (node, i))
                taken[i].meta = {**node.meta, "example_value": value}
            last = taken[i]


def _hand_out_as_twins_do(pieces: list[Piece]) -> None:
    """A piece that differs from others only in handing out less hands out what they do.

    What nobody reads is written to memory then and freed behind the piece; compiling another piece takes a second.
    """
    alike: dict[tuple, list[tuple[Piece, tuple]]] = {}
    for piece in pieces:
        body, layout, outputs = piece.signature()
        alike.setdefault((body, layout), []).append((piece, outputs))
    for twins in alike.values():
        most = max((outputs for _, outputs in twins), key=len)
        for piece, outputs in twins:
            if set(outputs) < set(most):
                place = {f"%{i}": n for i, n in enumerate((*piece.inputs, *piece.nodes))}
                piece.outputs = [place[name] for name in most]


def _piece(nodes: list[Node]) -> Piece:
    inside = set(nodes)
    inputs = list(dict.fromkeys(s for n in nodes for s in n.all_input_nodes if s not in inside))
    outputs = [n for n in nodes if any(user not in inside for user in n.users)]
    return Piece(nodes, inputs, outputs)


Compile = Callable[[GraphModule, list[Any]], Callable]


def compile_piece(piece: Piece, compile_fn: Compile) -> Callable:
    """Compile a piece by itself.

    A piece of plain tensors gets a tracing context of its own, so that nothing of the whole graph's leaks in; with a
    shape environment and a value at every node, without which the caches of Inductor and AOTAutograd stand aside. One
    that reads symbols (a cache length kept as an int, a prompt of any length) needs the symbols' own context, Dynamo's,
    and where not every node has a value, as inside `torch.vmap`, none of them is needed.
    """
    if piece.symbolic or any(vmap.stretch_of(n) is not None for n in piece.nodes):
        with TracingContext.get().fake_mode:
            inputs = [_fake_input(n) for n in piece.inputs]
        module = piece.module()
        for node in module.graph.nodes:
            node.meta.pop("example_value", None)  # of the whole graph's tensors, not of these
        return compile_fn(module, inputs)
    mode = FakeTensorMode(shape_env=ShapeEnv())
    module = piece.module()
    with mode:
        inputs = [_fake_input(n) for n in piece.inputs]
        _set_values(module.graph, inputs)
    with tracing(TracingContext(mode)):
        return compile_fn(module, inputs)


def _set_values(graph: Graph, inputs: list[Any]) -> None:
    """Every node's value in the mode of the inputs; those of the mode that traced the whole graph would clash."""
    given = iter(inputs)
    for node in graph.nodes:
        if node.op == "placeholder":
            node.meta["example_value"] = next(given)
        elif node.op != "output":
            set_value(node)


def _fake_input(node: Node) -> Any:
    value = val(node)
    if value is None:
        return node.meta["example_value"]
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


class Program:
    """Compiled pieces called in order.

    Attributes:
        steps: Per call: the function, which values it reads, and which values its results become; values are
            numbered, the graph's inputs first.
    """

    def __init__(self, graph: Graph, pieces: Sequence[Piece], functions: Sequence[Callable]):
        slots = {n: i for i, n in enumerate(n for n in graph.nodes if n.op == "placeholder")}
        for piece in pieces:
            for node in (*piece.inputs, *piece.outputs):
                slots.setdefault(node, len(slots))
        output = next(n for n in graph.nodes if n.op == "output")
        self._result = map_arg(output.args[0], lambda n: _Slot(slots[n]))
        kept = {slots[n] for n in output.all_input_nodes}
        self._inputs = sum(1 for n in graph.nodes if n.op == "placeholder")
        self._constants = [
            (slots[n], operator.attrgetter(n.target)(graph.owning_module))
            for n in slots
            if n.op == "get_attr"
        ]
        self._size = len(slots)
        self.steps: list[tuple[Callable, list[int], list[int], list[int]]] = []
        last_read = {slots[n]: i for i, p in enumerate(pieces) for n in (*p.outputs, *p.inputs)}
        for i, (piece, function) in enumerate(zip(pieces, functions, strict=True)):
            reads = [slots[n] for n in piece.inputs]
            writes = [slots[n] for n in piece.outputs]
            done = [
                s
                for s in {*reads, *writes}
                if last_read[s] == i and s not in kept and s >= self._inputs
            ]
            self.steps.append((function, reads, writes, done))

    def __call__(self, *args: Any) -> Any:
        values: list[Any] = [*args, *([None] * (self._size - len(args)))]
        for slot, constant in self._constants:
            values[slot] = constant
        for function, reads, writes, done in self.steps:
            results = function(*[values[i] for i in reads])
            for slot, result in zip(writes, results, strict=True):
                values[slot] = result
            for slot in done:  # an intermediate lives as long as it is read
                values[slot] = None
        return tuple(_fill(leaf, values) for leaf in self._result)


@dataclasses.dataclass(frozen=True)
class _Slot:
    index: int


def _fill(leaf: Any, values: list[Any]) -> Any:
    return values[leaf.index] if isinstance(leaf, _Slot) else leaf
