"""A run of operations of a graph as a function of its own: what it reads and hands out, whether another is the same."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import sympy
import torch
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_unbacked_symbols
from torch.fx.node import map_arg

from fsvd_compile.passes import vmap
from fsvd_compile.passes.graph import is_static, set_value, storage, val, written_by


@dataclasses.dataclass
class Piece:
    """A run of operations with the values it reads from and hands to the rest of the graph.

    Attributes:
        fixed: Whether no size in it depends on a symbol, though sizes elsewhere in the graph do.
        parts: The layers it consists of, if it does.
        symbols: Those that inputs' sizes and strides are made of, in order, when the signature was asked for: what is
            compiled later may find some of them equal, or constant.
    """

    nodes: list[Node]
    inputs: list[Node]
    outputs: list[Node]
    fixed: bool = False
    parts: list[Piece] = dataclasses.field(default_factory=list)
    symbols: list[sympy.Symbol] = dataclasses.field(default_factory=list)

    @property
    def units(self) -> list[Piece]:
        """What is compiled by itself."""
        return self.parts or [self]

    def signature(self) -> tuple:
        """What makes two pieces the same function: operations, constants, and how inputs lie in memory.

        Symbolic sizes count by where they come again in the piece, not by which symbols they are, see `serves`.
        """
        local = {n: f"%{i}" for i, n in enumerate((*self.inputs, *self.nodes))}
        body = tuple(
            (node.op, _target(node), repr(map_arg(node.args, lambda n: _Ref(local[n]))),
             repr(map_arg(node.kwargs, lambda n: _Ref(local[n]))))
            for node in self.nodes
        )  # fmt: skip
        self.symbols = self._symbols()
        names = {symbol: sympy.Symbol(f"n{i}") for i, symbol in enumerate(self.symbols)}
        memory: dict[int | None, int] = {}
        layout = tuple(
            n  # what is known when the graph runs only: shared with nobody
            if free_unbacked_symbols(_sizes(n))
            # As text: a symbolic size is not to be hashed.
            else (", ".join(_text(size, names) for size in _sizes(n)), *_kind(n, memory, i))
            for i, n in enumerate(self.inputs)
        )
        return body, layout, tuple(local[n] for n in self.outputs)

    @property
    def symbolic(self) -> bool:
        """Whether it reads numbers, or tensors of symbolic sizes."""
        return any(val(n) is None or not is_static(n) for n in self.inputs)

    def binds_its_symbols(self) -> bool:
        """Whether every symbol is an input itself and every number that is an input is a symbol, or known.

        So Inductor finds them, and its cache on disk, which keeps guards on numbers and on nothing else.
        """
        numbers = [_number(n) for n in self.inputs if val(n) is None]
        # Of a computed float Inductor would fix what it is computed from, and so would its hash.
        if not all(isinstance(number, (int, torch.SymInt)) for number in numbers):
            return False
        known = {_expression(number) for number in numbers}
        plain = all(isinstance(n, (int, sympy.Integer, sympy.Symbol)) for n in known)
        return plain and set(self._symbols()) <= known

    def serves(self, other: Piece) -> bool:
        """Whether what was compiled for this piece serves one of the same signature; its guards are then on both.

        The guards that hold for this piece's symbols, among them those that the compiler relies on, are asked of the
        other's, which makes them guards of the graph. So the two differ in symbols that were not told apart.
        """
        pairs = {a: b for a, b in zip(self.symbols, other.symbols, strict=True) if a != b}
        if not pairs:
            return True
        env = TracingContext.get().fake_mode.shape_env
        mine = set(self.symbols)
        for guard in list(env.guards):
            symbols = guard.expr.free_symbols
            both = symbols <= mine and not symbols.isdisjoint(pairs)
            if both and not env.evaluate_expr(guard.expr.xreplace(pairs)):
                return False
        # What is within a range needs no guard.
        return all(env.bound_sympy(b).issubset(env.bound_sympy(a)) for a, b in pairs.items())

    def writes(self, values: Iterable[Node]) -> bool:
        """Whether it writes memory that one of these values lies in."""
        memory = {storage(n) for n in values} - {None}
        return any(storage(target) in memory for n in self.nodes for target in written_by(n))

    def writes_what_inputs_share(self) -> bool:
        """Whether it writes memory that several of its inputs lie in: compiled, each has memory of its own."""
        held = Counter(storage(n) for n in self.inputs)
        return self.writes(n for n in self.inputs if held[storage(n)] > 1)

    def _symbols(self) -> list[sympy.Symbol]:
        found = {
            symbol: None
            for n in self.inputs
            for size in _sizes(n)
            for symbol in sorted(getattr(_expression(size), "free_symbols", ()), key=str)
        }
        return list(found)

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


def _sizes(node: Node) -> tuple[Any, ...]:
    """Sizes and strides of a tensor, or a number itself."""
    value = val(node)
    return (_number(node),) if value is None else (*value.shape, *value.stride())


def _number(node: Node) -> Any:
    """What a node is that is no tensor; None for a sub-graph, or what a context manager returned."""
    return node.meta.get("example_value")


def _kind(node: Node, memory: dict[int | None, int], i: int) -> tuple:
    """What else a compiled function knows of its input number i; `memory` has the storages seen before."""
    value = val(node)
    if value is None:
        return (type(_number(node)),)
    return value.dtype, value.device, memory.setdefault(storage(node), i)


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _text(size: Any, names: dict[sympy.Symbol, sympy.Symbol]) -> str:
    return str(_expression(size).xreplace(names) if isinstance(size, torch.SymInt) else size)


class _Ref(str):
    def __repr__(self) -> str:
        return str(self)


def _target(node: Node) -> Any:
    """What a node calls, itself: functions that are made by one function (`F.max_pool2d`) have one name."""
    return node.target if isinstance(node.target, Hashable) else id(node.target)


def piece_of(nodes: list[Node]) -> Piece:
    """The piece of these nodes; the graph's inputs that are the symbols it meets are inputs of it, too."""
    inside = set(nodes)
    inputs = list(dict.fromkeys(s for n in nodes for s in n.all_input_nodes if s not in inside))
    outputs = [n for n in nodes if any(user not in inside for user in n.users)]
    piece = Piece(nodes, inputs, outputs)
    if symbols := piece._symbols():
        named = named_symbols(nodes[0].graph)
        found = [named[symbol] for symbol in symbols if symbol in named]
        piece.inputs = list(dict.fromkeys((*inputs, *found)))
    return piece


def named_symbols(graph: Graph) -> dict[sympy.Symbol, Node]:
    """The graph's inputs that are symbols; of several that were found to be equal the first."""
    sizes = [n for n in graph.nodes if n.op == "placeholder" and is_size(n)]
    return {n.meta["example_value"].node.expr: n for n in reversed(sizes)}


def is_size(node: Node) -> bool:
    """Whether a node is a symbolic size that is known when the graph is called."""
    size = node.meta.get("example_value")
    return isinstance(size, torch.SymInt) and not free_unbacked_symbols(size)


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
        return _renamed(node.meta["example_value"])
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def _renamed(number: Any) -> Any:
    """A size by the name that it has now: one found to be another's equal would bring its first one to Inductor."""
    if not isinstance(number, torch.SymInt):
        return number
    node = number.node
    return node.shape_env.create_symintnode(node.expr, hint=node.hint)
