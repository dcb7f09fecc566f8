"""Choosing the implementation: fused ops stay where our kernels run and become ATen where Inductor does better.

On a CPU, and for prefill on a GPU, a packed group gains nothing from staying packed: every member becomes its own
GEMM again, the norm before it one fused loop, and the slices between them disappear. Attention whose keys are of no
fixed length goes to ATen, too: it runs outside of CUDA graphs, where two launches of ours cost a millisecond of host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from fsvd_compile.kernels import (
    attention_aten,
    decode_attention_aten,
    rope_append_aten,
    sdpa_of_any_length,
)
from fsvd_compile.kernels.expand import activated
from fsvd_compile.kernels.shrink import normed
from fsvd_compile.passes.graph import Memory, emit, is_static, refresh_values, shape, tokens, val
from fsvd_compile.passes.lowrank import own_memory
from fsvd_compile.passes.ops import (
    Attention,
    DecodeAttention,
    Expand,
    RopeAppend,
    Shrink,
    read,
)
from fsvd_compile.passes.rewrite import Context
from fsvd_compile.passes.vocabulary import arguments, kind_of
from fsvd_compile.phase import Phase, phase_of


def lower(graph: Graph, context: Context) -> int:
    """Replace every fused op that runs as ATen; returns how many. Ops of symbolic token count stay: they choose
    at run time by the same table."""
    parts: dict[Node, list[tuple[int, Node]]] = {}
    memory = Memory(graph)
    lowered = 0
    for node in list(graph.nodes):
        if node._erased or not runs_as_aten(node, context):
            continue
        lowered += 1
        if (shrink := read(node, Shrink)) is not None:
            parts[node] = _lower_shrink(graph, node, shrink)
        elif (expand := read(node, Expand)) is not None:
            parts[node] = _lower_expand(graph, node, expand, parts)
        else:
            _swap_target(graph, node)
    # What reads these was given a value, when it was added, by what stood there before.
    late = [new for node in reversed(list(parts)) for new in _finish(graph, node, parts[node])]
    for node in list(graph.nodes):
        if kind_of(node) == "sdpa" and context.device == "cuda" and _of_any_length(node):
            # A node of its own: its result may lie otherwise than cuDNN's would.
            late.append(_replace(graph, node, sdpa_of_any_length, *node.args, **node.kwargs))
        elif reads_weight_by_rows(node, context):
            given = arguments(node)
            late.append(_replace(graph, node, gemv, given["input"], given["weight"], given["bias"]))
    refresh_values(memory, {user for node in late for user in node.users})
    graph.lint()
    return lowered


def gemv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`linear` of a single row as a sum per output: `x [..., K]` with one row, `weight [N, K]`, `bias [N]`."""
    y = (weight * x.reshape(-1)).sum(-1)
    return (y if bias is None else y + bias).reshape(*x.shape[:-1], -1)


def reads_weight_by_rows(node: Node, context: Context) -> bool:
    """Whether a linear of one token on a CPU becomes a loop that Inductor vectorises and fuses.

    The BLAS that `linear` calls reads an fp32 weight for one row at about 11 GB/s, such a loop at 25 (two cores of an
    AMD EPYC with AVX-512, torch 2.13, 1536 x 576 and 49152 x 576 out of cache). Half precisions were not measured.
    """
    if kind_of(node) != "linear" or context.device != "cpu" or context.kernels != "auto":
        return False
    weight = val(arguments(node)["weight"])
    return (
        tokens(node) == 1
        and weight.dtype == torch.float32
        and weight.dim() == 2
        and is_static(arguments(node)["weight"])
        and weight.stride(1) == 1
    )


def runs_as_aten(node: Node, context: Context) -> bool:
    """Whether a fused op of this graph is replaced by ATen."""
    arguments = next(
        (a for op in (Shrink, Expand, *_ATEN) if (a := read(node, op)) is not None),
        None,
    )
    if arguments is None or context.kernels == "ops":
        return False
    if context.kernels == "aten" or context.device != "cuda":
        return True
    if isinstance(arguments, Attention) and not is_static(arguments.k):
        return True
    rows = _rows(arguments)
    return rows is not None and phase_of(rows) is Phase.PREFILL


def _of_any_length(attention: Node) -> bool:
    return not all(is_static(n) for n in attention.all_input_nodes)


def _rows(
    arguments: Shrink | Expand | RopeAppend | Attention | DecodeAttention,
) -> int | None:
    """Rows that share what the op reads: all tokens for a weight, one sequence's for a KV cache."""
    if isinstance(arguments, (Attention, DecodeAttention)):
        rows = shape(arguments.q)[2]
        return rows if isinstance(rows, int) else None
    if isinstance(arguments, RopeAppend):
        batch, _, rows, _ = shape(arguments.q)
        return batch * rows if isinstance(batch, int) and isinstance(rows, int) else None
    return tokens(arguments[0])


_ATEN: dict[type, Callable] = {
    RopeAppend: rope_append_aten,
    Attention: attention_aten,
    DecodeAttention: decode_attention_aten,
}


def _swap_target(graph: Graph, node: Node) -> None:
    for op, target in _ATEN.items():
        if read(node, op) is not None:
            _replace(graph, node, target, *node.args)
            return


def _replace(graph: Graph, node: Node, target: Callable, *args: Any, **kwargs: Any) -> Node:
    new = emit(graph, node, node, target, *args, **kwargs)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return new


def _lower_shrink(graph: Graph, node: Node, op: Shrink) -> list[tuple[int, Node]]:
    x = op.x
    if op.norm != "none":
        norm = (op.norm, op.norm_weight, op.norm_bias, op.norm_eps, op.norm_offset)
        x = emit(graph, node, node, _normed, x, *norm)
    return _linears(graph, node, [x] * len(op.weights), op.weights, op.biases)


def _normed(x: torch.Tensor, *norm: Any) -> torch.Tensor:
    # As in the op: statistics of 16-bit values need fp32.
    return normed(x.to(torch.promote_types(x.dtype, torch.float32)), *norm).to(x.dtype)


def _lower_expand(graph: Graph, node: Node, op: Expand, parts: dict) -> list[tuple[int, Node]]:
    latents = [
        _latent(graph, node, op.z, offset, shape(w)[1], parts)
        for offset, w in zip(op.offsets, op.weights, strict=True)
    ]
    blocks = _linears(graph, node, latents, op.weights, op.biases)
    if op.activation == "none" and op.residual is None:
        return blocks
    value = _join(graph, node, blocks) if not op.activation.endswith("_mul") else None
    if op.activation != "none":
        pair = [block for _, block in blocks] if value is None else [value]
        value = emit(graph, node, node, activated, pair, op.activation)
    if op.residual is not None:
        value = emit(graph, node, node, torch.add, op.residual, value)
    return [(0, value)]


def _linears(
    graph: Graph, node: Node, inputs: list, weights: list, biases: list
) -> list[tuple[int, Node]]:
    values, start = [], 0
    for x, weight, bias in zip(inputs, weights, biases, strict=True):
        values.append((start, emit(graph, node, node, F.linear, x, weight, bias)))
        start += shape(weight)[0]
    return values


def _latent(graph: Graph, node: Node, z: Node, offset: int, rank: int, parts: dict) -> Node:
    for start, value in parts.get(z, ()):
        if (start, shape(value)[-1]) == (offset, rank):
            return value
    if shape(z)[-1] == rank:
        return z
    return emit(graph, node, node, torch.narrow, z, -1, offset, rank)


def _join(graph: Graph, node: Node, values: list[tuple[int, Node]]) -> Node:
    if len(values) == 1:
        return values[0][1]
    return emit(graph, node, node, torch.cat, [value for _, value in values], -1)


def _finish(graph: Graph, node: Node, values: list[tuple[int, Node]]) -> list[Node]:
    """Give every slice of a packed value its part; whoever needs the whole gets the parts joined.

    Returns:
        What stands in its place.
    """
    taken: set[Node] = set()
    for user in list(node.users):
        given = arguments(user) if kind_of(user) == "narrow" else None
        if given is None or given["dim"] != -1:
            continue
        slice_ = given["start"], given["length"]
        part = next((v for s, v in values if (s, shape(v)[-1]) == slice_), None)
        if part is None:
            continue
        # A part has memory of its own, unless two slices are the same part.
        copies = [u for u in user.users if u.target is own_memory]
        if copies and part not in taken:
            copies[0].replace_all_uses_with(part)
            graph.erase_node(copies[0])
        taken.add(part)
        user.replace_all_uses_with(part)
        graph.erase_node(user)
    instead = [value for _, value in values]
    if node.users:
        instead.append(_join(graph, node, values))
        node.replace_all_uses_with(instead[-1])
    graph.erase_node(node)
    return instead
