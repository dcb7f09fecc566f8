"""Linears that are left dense, in decode: there a weight is read faster by our kernels than by a library.

On an H200 in bf16 a row times [32000, 4096] takes the library 67.2 us and `fsvd::shrink` 60.8 (58.9 at the read
limit), and the library's kernel also ends the chain of dependent launches and lets nothing be fused into it. 8 rows
take 65.3 and 64.1, 16 67.4 and 64.8, 32 68.6 and 69.8; of smaller weights more is gained (bench/NOTES.md), but for
16 rows times [22016, 4096], 48.2 and 49.2.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.fx import Graph, Node

from fsvd_compile.kernels import _triton
from fsvd_compile.kernels._linear import kernel_of
from fsvd_compile.kernels._triton import TRITON_DTYPES
from fsvd_compile.passes.epilogue import activation_of
from fsvd_compile.passes.graph import is_plain, is_static, read_ahead, shape, tokens, val
from fsvd_compile.passes.lowrank import dense_siblings, is_bias, replace_siblings, siblings_guard
from fsvd_compile.passes.ops import Expand, Shrink, as_launched, emit_op
from fsvd_compile.passes.pattern import Match
from fsvd_compile.passes.rewrite import Context, Rewrite
from fsvd_compile.passes.vocabulary import arguments, kind_of
from fsvd_compile.phase import Phase, phase_of

_ALIGNED = 16  # bytes: a load of the kernels
_MOST_TOKENS = 16  # for more a library is as fast, see above


def _find_linears(graph: Graph) -> Iterator[Match]:
    for node in list(graph.nodes):
        given = arguments(node) if kind_of(node) == "linear" else None
        if given is not None and given["weight"] is not given["input"]:
            yield Match(
                node, {"x": given["input"], "weight": given["weight"], "bias": given["bias"]}
            )


def _linear_guard(match: Match, context: Context) -> str | None:
    """Reads the same bytes at a higher rate, and takes on the norm before or the residual behind."""
    x, weight, bias = match["x"], match["weight"], match["bias"]
    if context.device != "cuda" or context.kernels == "aten":
        return f"on {context.device} with kernels={context.kernels!r} a library does it"
    rows = tokens(x)
    if rows is None or rows > _MOST_TOKENS:
        return f"{rows} tokens are no decode: a library does it"
    if len(shape(weight)) != 2 or not is_static(weight) or not is_plain(weight):
        return f"{weight} is no plain matrix of static shape"
    if not is_bias(bias, weight):
        return f"bias of shape {shape(bias)} is broadcast along rows"
    value = val(weight)
    if value.dtype != val(x).dtype or value.dtype not in TRITON_DTYPES:
        return f"{value.dtype} times {val(x).dtype}"
    if value.stride(1) != 1 or any(
        size * value.element_size() % _ALIGNED for size in (value.shape[1], value.stride(0))
    ):
        return (
            f"the rows of {weight.name} are no multiples of {_ALIGNED} bytes one behind the other"
        )
    if phase_of(rows) is not Phase.DECODE and not _streams(x, value):
        return f"{rows} tokens, and {weight.name} is not streamed for them: a library does it"
    return read_ahead(match.memory, weight, bias)


def _streams(x: Node, weight: Tensor) -> bool:
    """Whether a shrink of a few tokens would be `_stream_few`'s; the weight is fake.

    Asked for an expand as well, which takes all of these and some smaller ones: only shrinks were measured.
    """
    launched = as_launched(x)
    if launched is None:
        return False
    with _triton.compiling_only():  # fake tensors have no addresses
        return kernel_of("shrink", launched, [weight], [0], Phase.FEW) == "few"


def _replace_linear(match: Match, graph: Graph) -> Node:
    """An expand where an epilogue may follow, else a shrink, which takes a norm in front."""
    root, weights, biases = match.root, [match["weight"]], [match["bias"]]
    if len(root.users) == 1:
        reader = next(iter(root.users))
        if kind_of(reader) == "add" or activation_of(reader) is not None:
            return emit_op(graph, root, root, Expand(match["x"], weights, biases, [0]))
    return emit_op(graph, root, root, Shrink(match["x"], weights, biases))


def _siblings_guard(match: Match, context: Context) -> str | None:
    """One launch instead of one for each: two dependent launches less where q, k and v are dense."""
    for member in match["members"]:
        alone = Match(member.first, {"x": match["x"], "weight": member.v, "bias": member.v_bias})
        alone.memory = match.memory
        if (reason := _linear_guard(alone, context)) is not None:
            return reason
    return siblings_guard(match, context)


DENSE: tuple[Rewrite, ...] = (
    Rewrite(
        "dense_siblings",
        "dense linears of one input, in decode on a GPU -> one shrink",
        dense_siblings,
        replace_siblings,
        _siblings_guard,
        repeat=True,
        quiet=True,
    ),
    Rewrite(
        "dense_linear",
        "a dense linear, in decode on a GPU -> shrink, or expand where an epilogue may follow",
        _find_linears,
        _replace_linear,
        _linear_guard,
        quiet=True,
    ),
)
