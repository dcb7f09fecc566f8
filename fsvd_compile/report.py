"""What the backend did to one graph, kept for `explain`."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import warnings
from collections.abc import Iterator

from fsvd_compile.passes import Outcome


@dataclasses.dataclass
class GraphReport:
    """One graph that reached the backend.

    Attributes:
        phase: "decode", "few", "prefill", or "any" for a symbolic token count.
        tokens: M, or None when symbolic.
        outcomes: One per rewrite, in pipeline order; empty on the unfused path.
        unfused: Why the whole graph was handed to Inductor as it came, or None.
        layers: Pieces the graph was cut into: how often each distinct one is called.
        kernels: Per distinct piece: calls of our ops, library calls and kernels Inductor generated.
        weight_bytes: Bytes of the inputs every call reads whole (weights; embedding tables are not).
        linears: Dense linears that were left, by name.
        graphs: How the graph is replayed: "step", "layer", how many pieces of it are, or why none is.
        seconds: Wall time of the backend.
    """

    phase: str = "any"
    tokens: int | None = None
    outcomes: list[Outcome] = dataclasses.field(default_factory=list)
    unfused: str | None = None
    layers: list[int] = dataclasses.field(default_factory=list)
    kernels: list[dict[str, int]] = dataclasses.field(default_factory=list)
    weight_bytes: int = 0
    linears: list[str] = dataclasses.field(default_factory=list)
    graphs: str = "off"
    seconds: float = 0.0

    @property
    def matches(self) -> dict[str, int]:
        return {o.name: o.matches for o in self.outcomes if o.matches}

    @property
    def misses(self) -> dict[str, list[tuple[str, str]]]:
        return {o.name: o.misses for o in self.outcomes if o.misses}


_warned: set[str] = set()


def warn_once(message: str) -> None:
    """A `UserWarning`, again only after `forget_warnings`."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=3)


def forget_warnings() -> None:
    _warned.clear()


_listeners: contextvars.ContextVar[tuple[list[GraphReport], ...]] = contextvars.ContextVar(
    "listeners", default=()
)


def publish(report: GraphReport) -> None:
    """Hand a report to everyone who is collecting where it is made."""
    for listener in _listeners.get():
        listener.append(report)


@contextlib.contextmanager
def collect() -> Iterator[list[GraphReport]]:
    """Gather the reports of all graphs that are compiled inside the block, by its thread: Dynamo compiles in the one
    that calls."""
    reports: list[GraphReport] = []
    token = _listeners.set((*_listeners.get(), reports))
    try:
        yield reports
    finally:
        _listeners.reset(token)
