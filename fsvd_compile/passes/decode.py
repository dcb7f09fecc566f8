"""Attention of one token a sequence and the append before it, joined."""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Graph, Node

from fsvd_compile.kernels import mask_reach
from fsvd_compile.passes.graph import emit, same_size, shape, storage, written_by
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
    attention, append = match["attention"], match["append"]
    reach = _reach(match, graph, attention.mask, shape(append.k_cache)[2])
    op = DecodeAttention(*append, attention.mask, attention.scale, reach)
    return emit_op(graph, match.root, match.root, op)


def _reach(match: Match, graph: Graph, mask: Node | None, length: int) -> Node | None:
    """How far a mask reaches, found once for all layers that share it; None for a mask of one layer.

    It stands where the mask comes from, in front of the layers, so that these stay alike.
    """
    if mask is None or match.memory.any(mask) is not None:
        return None
    if any(same_size(n, 0) for n in shape(mask)):
        return None
    for user in mask.users:
        if user.target is mask_reach and user.args[1] == length:
            return user
    if sum(read(user, Attention) is not None for user in mask.users) < 2:
        return None
    before = mask.next
    while before.op in ("placeholder", "get_attr"):
        before = before.next
    return emit(graph, before, mask, mask_reach, mask, length)


DECODE: tuple[Rewrite, ...] = (
    Rewrite(
        "decode_attention",
        "rope_append + attention of one token a sequence -> decode_attention",
        _find_decode_attention,
        _replace_decode_attention,
        _decode_attention_guard,
    ),
)
