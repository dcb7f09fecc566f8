"""`explain`: what was matched in a model, what nearly was and why not, and what one call costs."""

from __future__ import annotations

import dataclasses
import itertools
import re
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

from fsvd_compile.report import GraphReport, collect

_numbers = itertools.count()


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The result of `explain`; `print` it, or read `graphs`.

    Attributes:
        graphs: One report per graph that reached the backend, in order. More than one means graph breaks.
        breaks: Why Dynamo broke the model into several graphs.
    """

    graphs: tuple[GraphReport, ...]
    breaks: tuple[str, ...] = ()

    def matches(self) -> dict[str, int]:
        """Matches per rewrite over all graphs."""
        total: dict[str, int] = {}
        for graph in self.graphs:
            for name, count in graph.matches.items():
                total[name] = total.get(name, 0) + count
        return total

    def __repr__(self) -> str:
        if not self.graphs:
            return "flashsvd: no graph reached the backend (nothing was compiled, or Dynamo fell back to eager)"
        lines = [_graph_text(i, g) for i, g in enumerate(self.graphs)]
        if self.breaks:
            lines.append("graph breaks:\n" + "\n".join(f"  {reason}" for reason in self.breaks))
        return "\n".join(lines)


def explain(model: torch.nn.Module, /, *args: Any, **kwargs: Any) -> Explanation:
    """Compile a model for these inputs and say what the backend did.

    The model is called once under `torch.no_grad()`, so a KV cache among the inputs advances as in any call. What was
    compiled before is left alone, and does not count towards Dynamo's limit of recompilations, nor does this call.

    Args:
        model: An `nn.Module`, or one that was compiled with this backend, by `torch.compile` or in place by its own
            `compile`: then its `options`, `mode` and `dynamic` are taken.
        *args: Inputs of the call.
        **kwargs: Keyword inputs of the call.

    Returns:
        An `Explanation` with a readable `repr`.
    """
    from fsvd_compile.backend import flashsvd

    module = getattr(model, "_orig_mod", model)

    # A backend of its own, so that Dynamo compiles afresh whatever it has cached for ours.
    def explaining(gm: Any, inputs: Any, **options: Any) -> Any:
        return flashsvd(gm, inputs, **options)

    how = _how(model)
    compiled_before = getattr(module, "_compiled_call_impl", None)
    counters = torch._dynamo.utils.counters["graph_break"]
    breaks_before = dict(counters)
    try:
        if compiled_before is not None:
            module._compiled_call_impl = None
        # What graph breaks leave of the model is compiled under its own code, which may be at the limit.
        unlimited = torch._dynamo.config.patch(
            recompile_limit=sys.maxsize, accumulated_recompile_limit=sys.maxsize
        )
        with collect() as reports, torch.no_grad(), unlimited:
            torch.compile(_caller(module), backend=explaining, **how)(*args, **kwargs)
    finally:
        if compiled_before is not None:
            module._compiled_call_impl = compiled_before
    new = [reason for reason, count in counters.items() if count > breaks_before.get(reason, 0)]
    return Explanation(tuple(reports), tuple(reason.splitlines()[0] for reason in new))


def _caller(module: torch.nn.Module) -> Callable:
    """A function of new code that calls the module. Dynamo keeps what it compiles with the code, a few times each."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return module(*args, **kwargs)

    return types.FunctionType(
        # Sizes that changed it keeps by the code's place and name, for all functions of these.
        call.__code__.replace(co_name=f"explained_{next(_numbers)}"),
        call.__globals__,
        closure=call.__closure__,
    )


def _how(model: Any) -> dict[str, Any]:
    """What a model that was compiled with this backend gave `torch.compile`: mode, options, dynamic."""
    from torch._dynamo.eval_frame import innermost_backend

    from fsvd_compile.backend import flashsvd

    context = getattr(model, "dynamo_ctx", None) or _context_of(
        getattr(model, "_compiled_call_impl", None)
    )
    backend = None if context is None else innermost_backend(context.callback)
    if getattr(backend, "compiler_fn", None) is not flashsvd:
        return {}
    return {**backend.kwargs, "dynamic": backend.dynamic}


def _context_of(compiled: Any) -> Any:
    """Dynamo's context of a compiled function, which is in its closure and nowhere else."""
    from torch._dynamo.eval_frame import OptimizeContext

    cells = (cell.cell_contents for cell in getattr(compiled, "__closure__", None) or ())
    return next((value for value in cells if isinstance(value, OptimizeContext)), None)


def _graph_text(index: int, graph: GraphReport) -> str:
    tokens = "symbolic" if graph.tokens is None else str(graph.tokens)
    lines = [f"graph {index}: {graph.phase} (tokens: {tokens}), {graph.seconds:.1f} s to compile"]
    if graph.unfused:
        lines.append(f"  unfused: {graph.unfused}")
        return "\n".join(lines)
    width = max((len(o.name) for o in graph.outcomes), default=0)
    for outcome in graph.outcomes:
        if outcome.matches:
            lines.append(f"  {outcome.name:<{width}}  {outcome.matches:>4}")
    missed = [o for o in graph.outcomes if o.misses]
    if missed:
        lines.append("  left alone:")
    for outcome in missed:
        for reason, where in _grouped(outcome.misses):
            lines.append(
                f"    {outcome.name:<{width}}  {len(where):>4}  {reason} ({where[0]}{', …' if len(where) > 1 else ''})"
            )
    pieces = " + ".join(f"{n} x 1 piece" if n > 1 else "1" for n in graph.layers)
    lines.append(f"  linears left dense: {len(graph.linears)}; compiled pieces: {pieces}")
    for count, kernels in zip(graph.layers, graph.kernels, strict=False):
        if count > 1:
            listed = ", ".join(f"{n} {what}" for what, n in kernels.items() if n)
            lines.append(f"  kernels in a repeated layer: {sum(kernels.values())} ({listed})")
    per_token = (
        f" = {graph.weight_bytes / graph.tokens / 1e6:.2f} MB a token" if graph.tokens else ""
    )
    lines.append(f"  weights read per call: {graph.weight_bytes / 1e6:.2f} MB{per_token}")
    lines.append(f"  CUDA graphs: {graph.graphs}")
    return "\n".join(lines)


def _grouped(misses: list[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """Misses by reason; reasons that differ in the running number of a node alone are one."""
    groups: dict[str, list[str]] = {}
    for where, reason in misses:
        groups.setdefault(re.sub(r"(?<=[a-z])(_\d+)+\b", "", reason), []).append(where)
    return list(groups.items())
