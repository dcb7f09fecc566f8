"""Patterns: small trees over the vocabulary that a node either fits or does not.

A pattern is matched from its last operation backwards. `Var` binds what stands at a place, `Call` asks for a kind
and for its arguments by name, `Either` takes the first alternative that fits, `Maybe` allows one operation around a
pattern to be there or not. Commutative kinds try both orders.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch.fx import Node

from fsvd_compile.passes.graph import Memory
from fsvd_compile.passes.vocabulary import arguments, kind_of

COMMUTATIVE = ("add", "mul")


@dataclasses.dataclass
class Match:
    """What a pattern found.

    Attributes:
        root: The last operation; the replacement stands in its place.
        bound: Values by name.
        interior: The operations in between, which disappear.
        also: Further operations whose results are replaced; unlike the interior they may have any readers.
        memory: Who holds and writes which memory in the graph; the runner fills it in for the guard.
    """

    root: Node
    bound: dict[str, Any] = dataclasses.field(default_factory=dict)
    interior: list[Node] = dataclasses.field(default_factory=list)
    also: tuple[Node, ...] = ()
    memory: Memory | None = None

    def __getitem__(self, name: str) -> Any:
        return self.bound[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.bound.get(name, default)


class Pattern:
    """Base of all patterns; `match` fills the match and returns whether the value fits."""

    def match(self, value: Any, found: Match) -> bool:
        raise NotImplementedError

    def __call__(self, node: Node) -> Match | None:
        found = Match(node)
        if not self.match(node, found):
            return None
        found.interior = [n for n in dict.fromkeys(found.interior) if n is not node]
        return found


@dataclasses.dataclass(frozen=True)
class Var(Pattern):
    """Binds any value under a name; a second `Var` of that name must meet the same value."""

    name: str
    where: Callable[[Any], bool] | None = None

    def match(self, value: Any, found: Match) -> bool:
        if self.name in found.bound:
            bound = found.bound[self.name]
            return bound is value or (not isinstance(value, Node) and bound == value)
        if self.where is not None and not self.where(value):
            return False
        found.bound[self.name] = value
        return True


@dataclasses.dataclass(frozen=True)
class Is(Pattern):
    """A constant."""

    value: Any

    def match(self, value: Any, found: Match) -> bool:
        return not isinstance(value, Node) and type(value) is not bool and value == self.value


class Call(Pattern):
    """An operation of a kind whose arguments fit; `bind` also binds the operation itself."""

    def __init__(self, kind: str, *, bind: str | None = None, **where: Pattern):
        self.kind, self.bind, self.where = kind, bind, where

    def match(self, value: Any, found: Match) -> bool:
        if kind_of(value) != self.kind:
            return False
        given = arguments(value)
        if given is None:
            return False
        orders = [given]
        if self.kind in COMMUTATIVE:
            if given.get("alpha", 1) != 1:
                return False
            orders.append({**given, "input": given["other"], "other": given["input"]})
        before = dict(found.bound), list(found.interior)
        for order in orders:
            if all(pattern.match(order[name], found) for name, pattern in self.where.items()):
                found.interior.append(value)
                if self.bind:
                    found.bound[self.bind] = value
                return True
            found.bound, found.interior = dict(before[0]), list(before[1])
        return False


class Either(Pattern):
    """The first alternative that fits."""

    def __init__(self, *alternatives: Pattern):
        self.alternatives = alternatives

    def match(self, value: Any, found: Match) -> bool:
        before = dict(found.bound), list(found.interior)
        for alternative in self.alternatives:
            if alternative.match(value, found):
                return True
            found.bound, found.interior = dict(before[0]), list(before[1])
        return False


def Maybe(kind: str, inner: Pattern) -> Pattern:
    """`inner`, or an operation of `kind` whose `input` is `inner`."""
    return Either(Call(kind, input=inner), inner)
