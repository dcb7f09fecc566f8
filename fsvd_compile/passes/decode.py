"""Attention of one token a sequence and the append before it, joined."""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Graph, Node

from fsvd_compile.passes.graph import shape, storage, written_by
from fsvd_compile.passes.ops import Attention, DecodeAttention, RopeAppend, emit_op, read
from fsvd_compile.passes.pattern import Match
from fsvd_compile.passes.rewrite import Context, Rewrite


def _find_decode_attention(graph: Graph) -> Iterator[Match]:
    for node in list(graph.nodes):
        attention = read(node, Attention)
        append = read(attention.q, RopeAppend) if attention is not None else None
        if append is not None and (attention.k, attention.v) == (append.k_cache, append.v_cache):
            yield Match(node, {"attention": attention, "append": append}, [attention.q])


def _decode_attention_guard(match: Match, context: Context) -> str | None:
    """Saves two kernels that wait for one another, and requests the cache while the projection runs.

    On a GPU the cache is read before the kernel in front has finished, so nothing else may write it.
    """
    attention, append = match["attention"], match["append"]
    if shape(append.q)[2] != 1:
        return f"{shape(append.q)[2]} tokens a sequence"
    first = attention.q
    for cache in (append.k_cache, append.v_cache):
        for node in match.memory.readers(cache):
            if first < node < match.root:
                return f"{node.name} reads the cache between append and attention"
            if node is not first and any(storage(w) == storage(cache) for w in written_by(node)):
                return f"{node.name} writes the cache as well"
    return None


def _replace_decode_attention(match: Match, graph: Graph) -> Node:
    op = DecodeAttention(*match["append"], match["attention"].mask, match["attention"].scale)
    return emit_op(graph, match.root, match.root, op)


DECODE: tuple[Rewrite, ...] = (
    Rewrite(
        "decode_attention",
        "rope_append + attention of one token a sequence -> decode_attention",
        _find_decode_attention,
        _replace_decode_attention,
        _decode_attention_guard,
    ),
)
