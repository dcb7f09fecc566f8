"""The fused operations as they stand in a graph: their arguments by name."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

import fsvd_compile.kernels  # noqa: F401  (registers torch.ops.fsvd)
from fsvd_compile.passes.graph import emit, tokens, val


class Shrink(NamedTuple):
    """Arguments of `fsvd::shrink`: several linears of one input, with a norm before them."""

    x: Node
    weights: list[Node]
    biases: list[Node | None]
    norm: str = "none"
    norm_weight: Node | None = None
    norm_bias: Node | None = None
    norm_eps: float = 0.0
    norm_offset: float = 0.0


class Expand(NamedTuple):
    """Arguments of `fsvd::expand`: a block-diagonal linear with activation and residual after it."""

    z: Node
    weights: list[Node]
    biases: list[Node | None]
    offsets: list[int]
    residual: Node | None = None
    activation: str = "none"


class ExpandRms(NamedTuple):
    """Arguments of `fsvd::expand_rms`: an expand of one weight that leaves what the RMSNorm behind it needs."""

    z: Node
    weight: Node
    bias: Node | None
    offset: int
    residual: Node | None
    norm_weight: Node | None
    norm_offset: float


class ShrinkRms(NamedTuple):
    """Arguments of `fsvd::shrink_rms`: a shrink whose norm an expand carries."""

    scaled: Node
    squares: Node
    weights: list[Node]
    biases: list[Node | None]
    norm_eps: float


class RopeAppend(NamedTuple):
    """Arguments of `fsvd::rope_append`."""

    q: Node
    k: Node
    v: Node
    cos: Node
    sin: Node
    k_cache: Node
    v_cache: Node
    position: Node


class Attention(NamedTuple):
    """Arguments of `fsvd::attention`."""

    q: Node
    k: Node
    v: Node
    mask: Node | None
    scale: float


class DecodeAttention(NamedTuple):
    """Arguments of `fsvd::decode_attention`: those of the two above, one token a sequence."""

    q: Node
    k: Node
    v: Node
    cos: Node
    sin: Node
    k_cache: Node
    v_cache: Node
    position: Node
    mask: Node | None
    scale: float
    reach: Node | None = None


_TARGETS = {
    Shrink: torch.ops.fsvd.shrink.default,
    Expand: torch.ops.fsvd.expand.default,
    ExpandRms: torch.ops.fsvd.expand_rms.default,
    ShrinkRms: torch.ops.fsvd.shrink_rms.default,
    RopeAppend: torch.ops.fsvd.rope_append.default,
    Attention: torch.ops.fsvd.attention.default,
    DecodeAttention: torch.ops.fsvd.decode_attention.default,
}


def read(node: Any, op: type) -> Any:
    """The arguments of a node if it is that fused operation, else None."""
    if isinstance(node, Node) and node.op == "call_function" and node.target is _TARGETS[op]:
        return op(*node.args)
    return None


def as_launched(x: Node) -> torch.Tensor | None:
    """A fake `[..., K]` as launchers take it, `[M, K]`; None where it does not lie at sizes known now."""
    value = val(x)
    if not all(isinstance(n, int) for n in (*value.shape, *value.stride(), value.storage_offset())):
        return None
    return value if value.dim() == 2 else value.reshape(tokens(x), value.shape[-1])


def emit_op(graph: Graph, before: Node, like: Node, arguments: NamedTuple) -> Node:
    """Insert a fused operation."""
    return emit(graph, before, like, _TARGETS[type(arguments)], *arguments)


def name_of(node: Node) -> str | None:
    """ "shrink", "expand", … for a fused operation, else None."""
    for op, target in _TARGETS.items():
        if node.op == "call_function" and node.target is target:
            return op.__name__
    return None
