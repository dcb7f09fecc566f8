"""Reading and editing a Dynamo FX graph: fake values, storages, writes, and nodes that carry their meta."""

from __future__ import annotations

import bisect
import functools
import heapq
import inspect
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fsvd_compile.passes import values
from fsvd_compile.passes.vocabulary import arguments, kind_of

_INHERITED_META = ("nn_module_stack", "stack_trace", "source_fn_stack")


def val(node: Any) -> torch.Tensor | None:
    """The fake tensor a node stands for (shape, stride, dtype, device), or None for anything else."""
    if not isinstance(node, Node):
        return None
    value = node.meta.get("example_value")
    return value if isinstance(value, torch.Tensor) else None


def shape(node: Any) -> tuple[int | torch.SymInt, ...]:
    value = val(node)
    return tuple(value.shape) if value is not None else ()


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are the same number or the same symbol; never adds a guard on a symbol."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    node_a, node_b = getattr(a, "node", None), getattr(b, "node", None)
    return node_a is not None and node_b is not None and node_a.expr == node_b.expr


def same_shape(a: Iterable, b: Iterable) -> bool:
    a, b = tuple(a), tuple(b)
    return len(a) == len(b) and all(same_size(x, y) for x, y in zip(a, b, strict=True))


def is_static(node: Any) -> bool:
    value = val(node)
    return value is None or has_fixed_size(value)


def has_fixed_size(value: torch.Tensor) -> bool:
    return all(isinstance(s, int) for s in (*value.shape, *value.stride()))


def tokens(node: Node) -> int | None:
    """M of a value [..., features]: the product of its leading sizes, or None when one is symbolic."""
    rows = 1
    for size in shape(node)[:-1]:
        if not isinstance(size, int):
            return None
        rows *= size
    return rows


def is_number(value: Any) -> bool:
    """Whether `number` takes it: no bool, no size, and no float that is read from a tensor when the graph runs."""
    if isinstance(value, Node):
        value = value.meta.get("example_value")
    if isinstance(value, torch.SymFloat):
        return not free_unbacked_symbols(value)
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def number(value: Any) -> float:
    """A constant of the model as a float.

    With `dynamic=True` Dynamo makes an input of each, such as the epsilon of a norm. Reading it here fixes it:
    Dynamo guards its value and compiles anew for another.
    """
    return float(value.meta["example_value"] if isinstance(value, Node) else value)


def storage(node: Any) -> int | None:
    """An identity for the memory behind a node: views and in-place results share it."""
    value = val(node)
    return None if value is None else _key(value)


def _key(value: torch.Tensor) -> int | None:
    if value.layout != torch.strided or is_traceable_wrapper_subclass(value):
        return None
    return value.untyped_storage()._cdata


def is_plain(node: Any) -> bool:
    """Whether a value is an ordinary strided tensor, which a custom op can read: no quantized or sharded subclass."""
    return storage(node) is not None


# Statements and operators that write their first operand, as functions (`operator.isub`) and methods
# (`__isub__`).
_IN_PLACE_OPERATORS = frozenset({
    "setitem", "delitem", "iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow",
    "iand", "ior", "ixor", "ilshift", "irshift",
})  # fmt: skip
# Names that end in an underscore and write nothing.
_KEYWORDS = (operator.and_, operator.or_, operator.not_, operator.is_)
# These update running statistics, their second and third or fourth and fifth arguments.
_NORMS = ("batch_norm", "instance_norm")


def written_by(node: Node) -> list[Node]:
    """The arguments a node writes in place; all of them where nothing is known about what it does."""
    if node.op == "call_module":
        return list(node.all_input_nodes)
    if node.op == "call_method":
        return _nodes(node.args[:1]) if _name_writes(node.target) else []
    if node.op != "call_function":
        return []
    target, out = node.target, _nodes(node.kwargs.get("out"))
    if isinstance(target, torch._ops.HigherOrderOperator):
        return _written_by_bodies(node)
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return [*_written_by_schema(node), *out]
    # An op that was lowered to a function of torch ops says so itself.
    if isinstance(getattr(target, "writes", None), tuple):
        return [node.args[i] for i in target.writes]
    name = getattr(target, "__name__", "")
    if target not in _KEYWORDS and (_name_writes(name) or _argument(node, "inplace") is True):
        return [*_nodes(node.args[0] if node.args else node.kwargs.get("input")), *out]
    if name in ("embedding", "embedding_bag") and _argument(node, "max_norm") is not None:
        return _nodes(_argument(node, "weight"))
    if name in _NORMS and (*node.args[5:6], node.kwargs.get("training"))[0] is not False:
        running = [v for k, v in node.kwargs.items() if k.startswith("running_")]
        return _nodes([*node.args[1:5], *running])
    return out


def _nodes(value: Any) -> list[Node]:
    values = value if isinstance(value, (tuple, list)) else (value,)
    return [v for v in values if isinstance(v, Node)]


def _name_writes(name: str) -> bool:
    if name.strip("_") in _IN_PLACE_OPERATORS:
        return True
    return name.endswith("_") and not name.endswith("__")


def _argument(node: Node, name: str) -> Any:
    """An argument of a Python function by name, wherever it stands; None if there is none."""
    if name in node.kwargs:
        return node.kwargs[name]
    if not inspect.isfunction(node.target):  # what is built in has no `inplace` and no `max_norm`
        return None
    position = _positions(node.target).get(name)
    return node.args[position] if position is not None and position < len(node.args) else None


@functools.cache
def _positions(target: Callable) -> dict[str, int]:
    return {name: i for i, name in enumerate(inspect.signature(target).parameters)}


def _written_by_schema(node: Node) -> list[Node]:
    packet = isinstance(node.target, torch._ops.OpOverloadPacket)
    names = node.target.overloads() if packet else ()
    overloads = [getattr(node.target, name) for name in names] if packet else [node.target]
    written: list[Node] = []
    for overload in overloads:
        for i, parameter in enumerate(overload._schema.arguments):
            if parameter.alias_info is None or not parameter.alias_info.is_write:
                continue
            positional = not parameter.kwarg_only and i < len(node.args)
            written += _nodes(node.args[i] if positional else node.kwargs.get(parameter.name))
    return list(dict.fromkeys(written))


def _written_by_bodies(node: Node) -> list[Node]:
    """A higher-order operator writes if its bodies do; one without bodies (a Triton kernel) may write anything."""
    owner = node.graph.owning_module
    inputs = node.all_input_nodes
    bodies = [getattr(owner, n.target, None) for n in inputs if n.op == "get_attr"]
    bodies = [b for b in bodies if isinstance(b, GraphModule)]
    if bodies and not any(written_by(n) for body in bodies for n in body.graph.nodes):
        return []
    return [n for n in inputs if val(n) is not None]


class Memory:
    """Which nodes hold and write which memory; answers whether a read may move from one place to another.

    Attributes:
        added: Nodes that came into the graph since values were last refreshed, as far as they were looked for.
    """

    def __init__(self, graph: Graph):
        self.graph = graph
        self.added: set[Node] = set()
        self._key: dict[Node, int | None] = {}
        self._writes: dict[Node, set[int]] = {}
        self._holders: dict[int, set[Node]] = {}
        self._writers: dict[int, list[Node]] = {}
        self.update(graph.nodes)

    def look(self) -> None:
        """Look for nodes that were added to the graph."""
        # Asked after every replacement: a loop of Python's over all nodes was a sixth of all passes' time.
        added = list(itertools.filterfalse(self._key.__contains__, self.graph.nodes))
        self.added.update(added)
        self.update(added)

    def update(self, nodes: Iterable[Node]) -> None:
        """Read anew what these nodes hold and write."""
        for node in nodes:
            if (old := self._key.pop(node, None)) is not None:
                self._holders[old].discard(node)
            for key in self._writes.pop(node, ()):
                self._writers[key].remove(node)
            if node._erased:
                continue
            self._key[node] = key = storage(node)
            if key is not None:
                self._holders.setdefault(key, set()).add(node)
            if written := {storage(target) for target in written_by(node)} - {None}:
                self._writes[node] = written
                for key in written:
                    bisect.insort(self._writers.setdefault(key, []), node)

    def stands_in(self, value: Node, replaced: Node) -> bool:
        """Let a value that was added take the memory of the one whose readers it got, if both have memory of their own.

        Nothing changes for the readers then; returns whether that is so.
        """
        self.look()  # for the value itself
        if value not in self.added or replaced.users or not _same_layout(value, replaced):
            return False
        if _aliases_input(value) or _aliases_input(replaced) or self._held(value) != [value]:
            return False
        value.meta["example_value"] = replaced.meta["example_value"]
        self.added.discard(value)
        self.update([value])
        return True

    def between(self, read: Node, start: Node, end: Node, but: Iterable[Node] = ()) -> Node | None:
        """A node after `start` and before `end` that writes the memory of `read`, or None."""
        ignore = set(but)
        for writer in self._writers_of(read):
            if writer not in ignore and start < writer < end:
                return writer
        return None

    def any(self, read: Node) -> Node | None:
        """A node anywhere that writes the memory of `read`, or None."""
        return next(self._writers_of(read), None)

    def _writers_of(self, read: Node) -> Iterator[Node]:
        return (n for n in self._writers.get(storage(read), ()) if not n._erased)

    def first(self, value: torch.Tensor) -> Node | None:
        """The first node that holds the memory of a value, of those that were looked for."""
        held = self._holders.get(_key(value), ())
        return min((n for n in held if not n._erased), default=None)

    def holders(self, memory: Node) -> list[Node]:
        """Every node whose value lies in the memory of `memory`, in the graph's order."""
        self.look()
        return self._held(memory)

    def _held(self, memory: Node) -> list[Node]:
        """`holders` of those that were looked for."""
        return sorted(n for n in self._holders.get(storage(memory), ()) if not n._erased)

    def readers(self, memory: Node) -> list[Node]:
        """Every node that takes an argument in the memory of `memory`, in the graph's order."""
        return sorted({user for holder in self.holders(memory) for user in holder.users})


def emit(
    graph: Graph, before: Node, like: Node, target: Callable, *args: Any, **kwargs: Any
) -> Node:
    """Insert `target(*args, **kwargs)` before a node, with its fake value, at the place in the model of `like`."""
    with graph.inserting_before(before):
        node = graph.call_function(target, args, kwargs)
    for key in _INHERITED_META:
        if key in like.meta:
            node.meta[key] = like.meta[key]
    set_value(node)
    return node


def set_value(node: Node) -> None:
    """Compute a call's fake value from the fake values of its arguments."""
    values.set_value(node, writes=bool(written_by(node)))


def refresh_values(memory: Memory, stale: Iterable[Node] = ()) -> None:
    """Recompute fake values of `stale` nodes and downstream of added ones, as far as strides or aliasing differ.

    Shapes and dtypes never change by a rewrite. Values that are no tensors (sizes, `.item()` symbols) stay: computing
    them again would make new symbols.
    """
    memory.look()
    added, memory.added = memory.added, set()
    # An added node has the value of what it read when it was added: it waits if that changes, or where it is stale.
    waiting = set().union(*(n.users for n in added)) - added
    waiting.update(n for n in stale if not n._erased)
    order = list(waiting)
    heapq.heapify(order)
    while order:
        node = heapq.heappop(order)
        if not _recomputable(node):
            continue
        before = node.meta["example_value"]
        set_value(node)
        fresh = isinstance(before, torch.Tensor) and not _aliases_input(node)
        if (
            fresh
            and memory.first(before) is node
            and same_shape(before.stride(), val(node).stride())
        ):
            node.meta["example_value"] = before
            continue
        for user in node.users:
            if user not in waiting:
                waiting.add(user)
                heapq.heappush(order, user)
    memory.update(added | waiting)  # what these hold or write may be other memory


def drop_dead_code(graph: Graph) -> None:
    """Erase what nobody reads; what writes memory, or is no tensor and may have an effect, stays."""
    graph.eliminate_dead_code(
        # What has readers stays anyway, and is not asked.
        is_impure_node=lambda n: bool(n.users or written_by(n)) or n.is_impure() or val(n) is None
    )


def _recomputable(node: Node) -> bool:
    if node.op not in ("call_function", "call_method") or node.meta.get("unbacked_bindings"):
        return False
    if isinstance(node.target, torch._ops.HigherOrderOperator):  # makes fresh values by contract
        return False
    value = node.meta.get("example_value")
    values = value if isinstance(value, (tuple, list)) else (value,)
    return bool(values) and all(isinstance(v, torch.Tensor) for v in values)


def _same_layout(a: Node, b: Node) -> bool:
    if storage(a) is None or storage(b) is None:
        return False
    a, b = val(a), val(b)
    return (
        (a.dtype, a.device, type(a)) == (b.dtype, b.device, type(b))
        and same_shape(a.shape, b.shape)
        and same_shape(a.stride(), b.stride())
        and same_size(a.storage_offset(), b.storage_offset())
    )


def _aliases_input(node: Node) -> bool:
    """Whether a value is memory of an argument; what comes out of a tuple always is."""
    return any(
        storage(source) == storage(node) or val(source) is None for source in node.all_input_nodes
    )


def first_call(graph: Graph) -> Node:
    """The first node that is neither an input nor a constant."""
    return next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))


def is_input(node: Any) -> bool:
    return isinstance(node, Node) and node.op in ("placeholder", "get_attr")


def is_stored(node: Any) -> bool:
    """Whether a value is a parameter or buffer of the model (the backend marks them), or a view of one."""
    while isinstance(node, Node) and kind_of(node) in ("t", "transpose", "reshape"):
        node = node.all_input_nodes[0]
    return is_input(node) and (node.op == "get_attr" or node.meta.get("stored", False))


def read_ahead(memory: Memory, *weights: Node | None) -> str | None:
    """Why operands may not be read as weights are on a GPU: before the kernel in front has finished.

    Under programmatic dependent launch our kernels request weights while their predecessor still runs, which is
    right for what no kernel writes; a "weight" that was just computed or updated may still be on its way.
    """
    for weight in weights:
        if weight is None:
            continue
        if not is_stored(weight):
            return f"{weight.name} is no parameter or buffer"
        if (writer := memory.any(weight)) is not None:
            return f"{weight.name} is written in place by {writer.name}"
    return None


def transposed(graph: Graph, weight: Node, before: Node) -> Node:
    """`weight.t()` of a 2-D value; a transpose of a transpose is the original.

    For a graph input the node is hoisted to the top of the graph, so that a later rewrite may use it anywhere.
    """
    while is_transpose(weight):
        weight = weight.all_input_nodes[0]
        if not is_transpose(weight):
            return weight
        weight = weight.all_input_nodes[0]
    if is_input(weight):
        return emit(graph, max(first_call(graph), weight.next), before, torch.t, weight)
    return emit(graph, before, before, torch.t, weight)


def is_transpose(node: Any) -> bool:
    """Whether a value is another matrix with rows and columns swapped."""
    if len(shape(node)) != 2 or kind_of(node) not in ("t", "transpose"):
        return False
    given = arguments(node)
    if kind_of(node) == "t":
        return given is not None
    return given is not None and {d % 2 for d in (given["dim0"], given["dim1"])} == {0, 1}


def reaches_output(node: Node) -> bool:
    """Whether a value or a view of it leaves the graph."""
    key = storage(node)
    returned = node.graph.output_node().all_input_nodes
    return any(n is node or (key is not None and storage(n) == key) for n in returned)
