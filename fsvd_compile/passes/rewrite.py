"""A rewrite is a value: a name, what it looks for, when it pays, and what it puts there; one runner for all.

The runner keeps what every rewrite needs and none should repeat: that no operation which disappears is read by
someone else, that no operand is written between where it was read and where the replacement reads it, how often
each rewrite matched, and why each near miss was left alone.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from fsvd_compile.passes.graph import Memory, drop_dead_code, is_plain, refresh_values, val
from fsvd_compile.passes.pattern import Match, Pattern
from fsvd_compile.passes.vocabulary import kind_of

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Context:
    """What a guard may know beside the graph: where it will run and how ops are chosen."""

    device: str = "cpu"
    kernels: str = "auto"


Find = Callable[[Graph], Iterable[Match]]
Guard = Callable[[Match, Context], "str | None"]
Replace = Callable[[Match, Graph], "Node | None"]


def always(match: Match, context: Context) -> None:
    """The guard of a rewrite that can only gain."""


@dataclasses.dataclass(frozen=True)
class Rewrite:
    """One named rewrite.

    Attributes:
        name: Unique in the pipeline; what `explain` prints and `options={"disable": [...]}` takes.
        what: One line: what it looks for and what that becomes.
        find: A pattern anchored at its last operation, or a function that yields matches of a graph.
        guard: Says why not, or None; its docstring is the cost model.
        replace: Builds the replacement before the root and returns the value that takes the root's place;
            None when it has already redirected every reader itself.
        repeat: Whether a replacement can make room for another match of the same rewrite.
        quiet: Whether a refusal says nothing a user would want to know (a cast that does cast).
    """

    name: str
    what: str
    find: Pattern | Find
    replace: Replace
    guard: Guard = always
    repeat: bool = False
    quiet: bool = False

    def matches(self, graph: Graph) -> Iterator[Match]:
        if not isinstance(self.find, Pattern):
            yield from self.find(graph)
            return
        for node in list(graph.nodes):
            if not node._erased and (found := self.find(node)) is not None:
                yield found


@dataclasses.dataclass
class Outcome:
    """What one rewrite did to one graph."""

    name: str
    matches: int = 0
    misses: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0


def run(rewrites: Iterable[Rewrite], graph: Graph, context: Context) -> list[Outcome]:
    """Apply rewrites in order; returns one `Outcome` each. The graph stays valid after every rewrite."""
    outcomes = []
    memory, shown = Memory(graph), shown_as_they_lie(graph)
    for rewrite in rewrites:
        started = time.perf_counter()
        outcome = Outcome(rewrite.name)
        while _apply(rewrite, graph, context, memory, shown, outcome) and rewrite.repeat:
            pass
        outcome.seconds = time.perf_counter() - started
        outcomes.append(outcome)
        if outcome.matches:
            log.debug("%s: %d matches", rewrite.name, outcome.matches)
    graph.lint()
    return outcomes


def _apply(
    rewrite: Rewrite,
    graph: Graph,
    context: Context,
    memory: Memory,
    shown: set[Node],
    outcome: Outcome,
) -> int:
    count = 0
    outcome.misses.clear()
    moved: set[Node] = set()  # read another value than before, perhaps one with other memory
    for match in rewrite.matches(graph):
        if match.root._erased or any(n._erased for n in match.interior):
            continue
        match.memory = memory
        reason = no_plain_tensor(match) or second_reader(match) or moved_past_write(match, memory)
        reason = reason or laid_out_anew(match, shown) or rewrite.guard(match, context)
        if reason is not None:
            if not rewrite.quiet:
                outcome.misses.append((match.root.name, reason))
            continue
        value = rewrite.replace(match, graph)
        written = any(memory.any(node) for node in (match.root, *match.also, value))
        if value is not None:
            others = set(value.users)  # to which the replacement itself has handed it
            readers = [user for user in match.root.users if user is not value]
            match.root.replace_all_uses_with(value, lambda user, v=value: user is not v)
            if others or not memory.stands_in(value, match.root):
                moved.update(readers)
        _erase(graph, match)
        count += 1
        if written:  # the next match must find those writes under the memory of the new values
            refresh_values(memory, moved)
            moved.clear()
    if count:
        drop_dead_code(graph)  # what nobody reads any more would pass for a second reader
        refresh_values(memory, moved)
    outcome.matches += count
    return count


# Views cost nothing: one that others read as well simply stays for them.
_VIEWS = ("reshape", "t", "transpose", "permute", "narrow", "getitem", "expand")


def second_reader(match: Match) -> str | None:
    """An operation that would disappear must be read by the match alone, also through views of its result."""
    inside = {*match.interior, *match.also, match.root}
    for node in match.interior:
        if kind_of(node) in _VIEWS and not _shows(node, inside):
            continue
        for user in node.users:
            if user not in inside:
                return f"{node.name} is also read by {user.name}"
    return None


def _shows(view: Node, inside: set[Node]) -> bool:
    """Whether a view shows the result of an operation that would disappear."""
    sources = [n for n in view.all_input_nodes if n in inside]
    return any(kind_of(n) not in _VIEWS or _shows(n, inside) for n in sources)


def no_plain_tensor(match: Match) -> str | None:
    """Fused operations read memory: quantized, sharded, nested and sparse tensors keep their own operations."""
    for node in (match.root, *match.interior):
        for value in (node, *node.all_input_nodes):
            if val(value) is not None and not is_plain(value):
                return f"{value.name} is a {type(val(value)).__name__}, no plain tensor"
    return None


AS_STRIDED = ("as_strided", torch.as_strided, torch.Tensor.as_strided)
# Their results lie in order, fused or not.
_LINEAR = ("linear", "addmm", "matmul")


def shown_as_they_lie(graph: Graph) -> set[Node]:
    """Values whose layout an `as_strided` shows: what it reads, and what that has its layout from.

    A fused operation may lay its result out otherwise.
    """
    pending = [n for s in graph.nodes if s.target in AS_STRIDED for n in s.all_input_nodes[:1]]
    found: set[Node] = set()
    while pending:
        node = pending.pop()
        if node not in found and kind_of(node) not in _LINEAR:
            found.add(node)
            pending += node.all_input_nodes
    return found


def laid_out_anew(match: Match, shown: set[Node]) -> str | None:
    """What `shown_as_they_lie` holds is not replaced."""
    return "as_strided shows how its result lies in memory" if match.root in shown else None


def moved_past_write(match: Match, memory: Memory) -> str | None:
    """An operand read at an interior operation is read at the root instead: no write may lie between."""
    replaced = (*match.interior, *match.also)
    for node in replaced:
        for operand in node.all_input_nodes:
            writer = memory.between(operand, node, match.root, but=replaced)
            if writer is not None:
                return f"{operand.name} is written in place by {writer.name} before it is read"
    return None


def _erase(graph: Graph, match: Match) -> None:
    for node in sorted({match.root, *match.interior, *match.also}, reverse=True):
        if not node.users and not node._erased:
            graph.erase_node(node)


def replace_argument(node: Node, old: Node, new: Any) -> None:
    """Make a node read `new` where it read `old`."""
    node.args = map_arg(node.args, lambda n: new if n is old else n)
    node.kwargs = map_arg(node.kwargs, lambda n: new if n is old else n)
