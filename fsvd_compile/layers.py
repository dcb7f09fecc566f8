"""Cutting a graph at layer borders, so that layers of the same shape are compiled once and reused.

A layer is a run of operations whose place in the model (Dynamo's `nn_module_stack`) goes through the same entry of a
list of modules; what lies between runs is glue (embedding, masks, final norm, head). Two runs are the same layer when
they do the same operations on inputs of the same layout; which weights and caches they read is an argument.

A decode step whose KV cache grows (transformers' `DynamicCache`) is cut elsewhere: only attention sees a size that
changes, and what lies between two layers' attentions, linears and norms, can be replayed from a CUDA graph.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.fx.node import map_arg
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fsvd_compile.passes import vmap
from fsvd_compile.passes.graph import has_fixed_size, is_input, val
from fsvd_compile.passes.ops import name_of
from fsvd_compile.passes.rewrite import AS_STRIDED
from fsvd_compile.passes.vocabulary import kind_of
from fsvd_compile.pieces import Piece, is_size, named_symbols, piece_of

# Shorter runs are not worth a call of their own: the call costs about 20 us of Python on the host.
MIN_NODES = 6

_ENTRY = re.compile(r"^(.*?)(?:\.|\[')(\d+)(?=\.|'\]|\[|$)")


def cut(graph: Graph, by_size: bool = False) -> list[Piece]:
    """The graph as pieces in order; a single piece when no layer repeats.

    A graph of symbolic shapes stays whole if one of its pieces would not see a symbol that it needs.

    Args:
        by_size: Cut where symbolic sizes begin and end, if what is of fixed sizes in between reads most weights.
    """
    calls = [n for n in graph.nodes if n.op in ("call_function", "call_method")]
    # A sub-graph (of a control-flow or attention operator) is a constant that a piece cannot take as an input.
    bodies = any(
        n.op == "call_module" or (n.op == "get_attr" and val(n) is None) for n in graph.nodes
    )
    # What a tensor holds (a float of the model, with dynamic=True) is known to the whole graph's inputs only.
    read = any(n.target in ("item", torch.ops.aten.item.default) for n in calls)
    if bodies or read or any(map(_is_unbacked, calls)):
        return [piece_of(calls)]
    _bring_views_home(graph)
    _take_every_result(graph)
    _compute_sizes_at_home(graph)
    calls = [n for n in graph.nodes if n.op in ("call_function", "call_method")]
    if by_size:
        pieces = _by_size(calls)
        if pieces and all(map(_can_stand_alone, pieces)):
            _hand_out_as_twins_do([unit for piece in pieces for unit in piece.units])
            return pieces
    pieces = [piece_of(run) for run in _runs(calls)]
    _hand_out_as_twins_do(pieces)
    if not _repeat(pieces) or not all(map(_can_stand_alone, pieces)):
        return [piece_of(calls)]
    return pieces


def _can_stand_alone(piece: Piece) -> bool:
    return piece.binds_its_symbols() and not any(
        unit.writes_what_inputs_share()
        or any(_shows_all_of(n) in unit.inputs for n in unit.nodes)
        or any(map(_is_more_than_it_lies, unit.inputs))
        for unit in piece.units
    )


def _is_more_than_it_lies(node: Node) -> bool:
    """Whether a value is not what its memory holds, as its size and stride show it: a piece would take it for that."""
    value = val(node)
    return value is not None and (
        value.is_neg() or value.is_conj() or is_traceable_wrapper_subclass(value)
    )


def _shows_all_of(node: Node) -> Node | None:
    """The tensor of whose whole memory `as_strided` shows something; handed to a piece, it may be part of another."""
    given = node.args[0] if node.args else node.kwargs.get("input")
    return given if node.target in AS_STRIDED and isinstance(given, Node) else None


def _is_unbacked(node: Node) -> bool:
    """Whether a size is known only when the graph has run so far, as that of `nonzero`."""
    value = node.meta.get("example_value")
    if isinstance(value, torch.Tensor):
        return not has_fixed_size(value) and bool(free_unbacked_symbols(value))
    return isinstance(value, torch.SymInt) and bool(free_unbacked_symbols(value))


def _by_size(calls: list[Node]) -> list[Piece]:
    """Runs of fixed sizes that read weights and what lies between them; none where most weights meet symbolic sizes.

    There, in a prompt of any length, layers are what repeats, and a head of fixed size at the end is not worth them.
    """
    readers = [n for n in calls if _reads_weights(n)]
    if 2 * sum(map(_is_fixed, readers)) <= len(readers):
        return []
    runs = [(fixed, list(run)) for fixed, run in itertools.groupby(calls, _is_fixed)]
    worth = [(fixed and any(map(_reads_weights, run)), run) for fixed, run in runs]
    pieces = []
    for fixed, several in itertools.groupby(worth, operator.itemgetter(0)):
        piece = piece_of([node for _, run in several for node in run])
        piece.fixed = fixed
        if fixed:
            parts = [piece_of(run) for run in _runs(piece.nodes)]
            piece.parts = parts if _repeat(parts) else []
        pieces.append(piece)
    return pieces


def _repeat(pieces: list[Piece]) -> bool:
    """Whether there are layers among them."""
    repeated = Counter(p.signature() for p in pieces if len(p.nodes) >= MIN_NODES)
    return any(count > 1 for count in repeated.values())


def _is_fixed(node: Node) -> bool:
    """Whether a node neither is nor reads a number, a symbolic size, or what a transform works on."""
    values = (n.meta.get("example_value") for n in (node, *node.all_input_nodes))
    numbers = (torch.SymInt, torch.SymFloat, torch.SymBool, int, float)
    return vmap.stretch_of(node) is None and not any(
        isinstance(part, numbers) or (isinstance(part, torch.Tensor) and not has_fixed_size(part))
        for value in values
        for part in (value if isinstance(value, (tuple, list)) else (value,))
    )


def _reads_weights(node: Node) -> bool:
    return bool(name_of(node)) or kind_of(node) in ("linear", "addmm", "matmul")


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


def _compute_sizes_at_home(graph: Graph) -> None:
    """Sizes are computed from the graph's inputs by each operation that reads them, so that no piece is handed one.

    Those that the graph returns are computed before all else, where they part nothing.
    """
    named = named_symbols(graph)
    for node in reversed(list(graph.nodes)):
        if not is_size(node) or vmap.stretch_of(node) is not None:
            continue
        symbol = named.get(node.meta["example_value"].node.expr)
        if symbol is node or (symbol is None and not _computed_from_sizes(node)):
            continue
        for user in [n for n in node.users if n.op != "output" and vmap.stretch_of(n) is None]:
            own = symbol
            if own is None:
                with graph.inserting_before(user):
                    own = graph.node_copy(node)
                own.meta = {**user.meta, "example_value": node.meta["example_value"]}
            user.replace_input_with(node, own)
        if not node.users and node.op != "placeholder":
            graph.erase_node(node)
    first = next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))
    for node in next(n for n in graph.nodes if n.op == "output").all_input_nodes:
        _move_size(node, first)


def _computed_from_sizes(node: Node) -> bool:
    return node.op == "call_function" and is_size(node) and all(map(is_size, node.all_input_nodes))


def _move_size(node: Node, before: Node) -> None:
    if node.op != "placeholder" and node is not before and _computed_from_inputs(node):
        for source in node.all_input_nodes:
            _move_size(source, before)
        before.prepend(node)


def _computed_from_inputs(node: Node) -> bool:
    """Whether a size needs nothing but sizes that are inputs: that of a value is not there before the value."""
    return node.op == "placeholder" or (
        _computed_from_sizes(node) and all(map(_computed_from_inputs, node.all_input_nodes))
    )


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


class Program:
    """Compiled pieces called in order.

    Args:
        inputs: What a call gives.
        results: What it returns: nodes in a tuple, or whatever a graph's output holds.
        pieces, functions: In order.

    Attributes:
        steps: Per call: the function, which values it reads, and which values its results become; values are
            numbered, the inputs first.
    """

    def __init__(
        self,
        inputs: Sequence[Node],
        results: Any,
        pieces: Sequence[Piece],
        functions: Sequence[Callable],
    ):
        slots = {n: i for i, n in enumerate(inputs)}
        self._inputs = len(slots)
        for piece in pieces:
            for node in (*piece.inputs, *piece.outputs):
                slots.setdefault(node, len(slots))
        kept: set[int] = set()

        def keep(node: Node) -> _Slot:
            kept.add(slots[node])
            return _Slot(slots[node])

        self._result = map_arg(results, keep)
        self._constants = [
            (slot, operator.attrgetter(n.target)(n.graph.owning_module))
            for n, slot in slots.items()
            if n.op == "get_attr" and slot >= self._inputs
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
