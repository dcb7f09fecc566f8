"""Attention over a cache: RoPE and the cache append in one op, grouped-query attention without `repeat_kv`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Graph, Node

from fsvd_compile.passes.graph import (
    emit,
    is_input,
    is_number,
    is_static,
    number,
    same_shape,
    same_size,
    shape,
    storage,
    val,
)
from fsvd_compile.passes.ops import Attention, RopeAppend, emit_op
from fsvd_compile.passes.pattern import Call, Match, Var
from fsvd_compile.passes.rewrite import Context, Rewrite
from fsvd_compile.passes.vocabulary import arguments, kind_of


def _half(index: Any, first: bool, size: int) -> bool:
    """Whether an index takes the first or second half of the last dimension: `[..., :n]`, `[..., n:]`."""
    if not isinstance(index, tuple) or len(index) != 2 or index[0] is not Ellipsis:
        return False
    part = index[1]
    if not isinstance(part, slice) or part.step not in (None, 1):
        return False
    start, stop = part.start or 0, size if part.stop is None else part.stop
    return (start, stop) == ((0, size // 2) if first else (size // 2, size))


# x·cos + cat(−x₂, x₁)·sin: rotate-half RoPE (Su et al., arXiv 2104.09864 eq. 34, in GPT-NeoX's layout).
_ROPE = Call(
    "add",
    input=Call("mul", input=Var("x"), other=Var("cos")),
    other=Call(
        "mul",
        input=Call("cat", tensors=Var("halves"), bind="rotated"),
        other=Var("sin"),
    ),
)


def _rope_match(node: Node) -> Match | None:
    found = _ROPE(node)
    if found is None or arguments(found["rotated"])["dim"] not in (-1, len(shape(node)) - 1):
        return None
    halves = found["halves"]
    if not isinstance(halves, (tuple, list)) or len(halves) != 2:
        return None
    negated, first = halves
    second = arguments(negated)["input"] if kind_of(negated) == "neg" else None
    # `cos * x` binds the two the other way round.
    if kind_of(first) == "getitem" and first.args[0] is found["cos"]:
        found.bound |= {"x": found["cos"], "cos": found["x"]}
    x = found["x"]
    if not shape(x):
        return None
    size = shape(x)[-1]
    for part, is_first in ((first, True), (second, False)):
        if (
            kind_of(part) != "getitem"
            or part.args[0] is not x
            or not _half(part.args[1], is_first, size)
        ):
            return None
    found.interior = [node, *found.interior, negated, first, second]
    return found


def _find_rope_append(graph: Graph) -> Iterator[Match]:
    """One match per pair of cache writes; `q` is the other rotation by the same cos and sin."""
    nodes = list(graph.nodes)
    ropes = [m for n in nodes if (m := _rope_match(n)) is not None]
    writes = [(n, a) for n in nodes if kind_of(n) == "index_copy_" and (a := arguments(n))]
    used: set[Node] = set()
    for k_write, k in writes:
        k_rope = next((m for m in ropes if m.root is k["source"]), None)
        if k_rope is None:
            continue
        v_write = next(
            (n for n, a in writes if n is not k_write and a["index"] is k["index"] and n > k_write),
            None,
        )
        if v_write is None:
            continue
        # Layers may share one table: the rotation of this layer's q is the nearest before the write.
        table = k_rope["cos"], k_rope["sin"]
        q_rope = max(
            (
                m
                for m in ropes
                if m is not k_rope
                and m.root < v_write
                and m.root not in used
                and (m["cos"], m["sin"]) == table
            ),
            key=lambda m: m.root,
            default=None,
        )
        if q_rope is None:
            continue
        used |= {k_rope.root, q_rope.root}
        v = arguments(v_write)
        bound = {
            "q": q_rope["x"], "k": k_rope["x"], "v": v["source"],
            "cos": k_rope["cos"], "sin": k_rope["sin"],
            "k_cache": k["input"], "v_cache": v["input"], "position": k["index"],
            "q_rope": q_rope.root, "k_write": k_write, "v_write": v_write,
            "dims": (k["dim"], v["dim"]),
        }  # fmt: skip
        yield Match(
            v_write, bound, [*k_rope.interior, *q_rope.interior[1:]], (q_rope.root, k_write)
        )


def _rope_append_guard(match: Match, context: Context) -> str | None:
    """Saves the rotated q, k and the copy of v through memory and three or four kernels a layer."""
    q, k, v = (shape(match[n]) for n in "qkv")
    cos, sin = shape(match["cos"]), shape(match["sin"])
    if not len(q) == len(k) == len(v) == 4 or any(d not in (2, -2) for d in match["dims"]):
        return "q, k and v are not [batch, heads, tokens, head]"
    if not all(is_static(match[n]) for n in ("q", "k", "v", "k_cache", "v_cache", "cos", "sin")):
        return "dynamic shapes"
    batch, _, rows, head = q
    if (k[0], k[2], k[3]) != (batch, rows, head) or (v[0], v[2]) != (batch, rows):
        return f"q {q}, k {k} and v {v} disagree"
    # Broadcast against [batch, heads, tokens, head]: the third dimension from the end would be the head.
    lead = (1,) * (4 - len(cos)) + cos[:-2]
    if cos != sin or len(cos) not in (2, 3, 4) or cos[-2:] != (rows, head) or head % 2:
        return f"cos {cos} covers not the whole head {head} of every token"
    if lead[0] not in (1, batch) or lead[1] != 1:
        return f"cos {cos} differs by head"
    if shape(match["position"]) != (rows,):
        return f"the position has shape {shape(match['position'])}, not one entry a token"
    k_cache, v_cache = match["k_cache"], match["v_cache"]
    if not is_input(k_cache) or not is_input(v_cache) or k_cache is v_cache:
        return "the cache is not an input of the graph"
    if any(val(cache).stride(3) != 1 and shape(cache)[3] > 1 for cache in (k_cache, v_cache)):
        return "the head dimension of a cache is not contiguous"
    if _overlap(k_cache, v_cache):
        return "keys and values share memory"
    if {val(match[n]).dtype for n in ("q", "k", "v", "q_rope")} != {val(k_cache).dtype}:
        return "cache and projections differ in dtype"
    return _moved_reads(match)


def _overlap(a: Node, b: Node) -> bool:
    """Whether the spans of two static values in memory meet."""
    if storage(a) != storage(b):
        return False
    spans = []
    for value in (val(a), val(b)):
        first = value.storage_offset() * value.element_size()
        extent = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True)) + 1
        spans.append((first, first + extent * value.element_size()))
    return spans[0][0] < spans[1][1] and spans[1][0] < spans[0][1]


def _moved_reads(match: Match) -> str | None:
    """Everything happens at the second cache write: nobody may see q or the k cache before it."""
    end, k_write = match["v_write"], match["k_write"]
    for user in match["q_rope"].users:
        if user < end:
            return f"{user.name} reads q before the cache is written"
    # By memory, not by name: an earlier view of a cache shows what is written to it as well.
    caches = {storage(match["k_cache"]), storage(match["v_cache"])}
    for cache in (match["k_cache"], match["v_cache"]):
        for user in match.memory.readers(cache):
            if k_write < user < end and storage(user) not in caches:
                return f"{user.name} reads the cache between its two writes"
    for written in (k_write, end):
        for user in written.users:
            if user.op == "output":
                return f"{written.name} is an output"
    for name in ("position", "v", "cos", "sin"):
        writer = match.memory.between(match[name], k_write, end, but=(k_write, end))
        if writer is not None:
            return f"{match[name].name} is written in place by {writer.name}"
    return None


def _replace_rope_append(match: Match, graph: Graph) -> None:
    root = match.root
    _, _, rows, head = shape(match["q"])

    def table(node: Node) -> Node:
        lead = math.prod(shape(node)[:-1]) // rows
        wanted = (lead, rows, head)
        # Usually `cos.unsqueeze(1)`: the table before it is what the op takes.
        source = node.all_input_nodes[0] if kind_of(node) == "reshape" else node
        source = source if storage(source) == storage(node) else node
        return (
            source
            if shape(source) == wanted
            else emit(graph, root, root, torch.reshape, source, wanted)
        )

    op = RopeAppend(
        match["q"], match["k"], match["v"], table(match["cos"]), table(match["sin"]),
        match["k_cache"], match["v_cache"], match["position"],
    )  # fmt: skip
    rotated = emit_op(graph, root, root, op)
    match["q_rope"].replace_all_uses_with(rotated)
    # The in-place writes return their cache.
    match["k_write"].replace_all_uses_with(match["k_cache"])
    match["v_write"].replace_all_uses_with(match["v_cache"])


def _ungrouped(node: Node) -> tuple[Node, int, list[Node]]:
    """A key or value behind `repeat_kv`: the tensor before it, how often each head was repeated, what did it.

    `repeat_kv` is `x[:, :, None].expand(B, H, n, S, D).reshape(B, H·n, S, D)`.
    """
    if kind_of(node) != "reshape" or kind_of(node.args[0]) != "expand":
        return node, 1, []
    wide = node.args[0]
    lifted = wide.args[0]
    if kind_of(lifted) not in ("getitem", "reshape"):
        return node, 1, []
    source = lifted.args[0]
    if not isinstance(source, Node):
        return node, 1, []
    five, four = shape(wide), shape(source)
    if len(five) != 5 or len(four) != 4 or len(shape(lifted)) != 5 or len(shape(node)) != 4:
        return node, 1, []
    repeated = all(
        same_size(a, b) for a, b in zip((*five[:2], *five[3:]), four, strict=True)
    ) and same_size(shape(lifted)[2], 1)
    times = five[2]
    if not repeated or not isinstance(times, int) or not isinstance(four[1], int):
        return node, 1, []
    if not same_shape(shape(node), (four[0], four[1] * times, *four[2:])):
        return node, 1, []
    if val(node).dtype != val(source).dtype or (
        kind_of(lifted) == "getitem" and not _inserts(lifted.args[1])
    ):
        return node, 1, []
    return source, times, [node, wide, lifted]


def _inserts(index: Any) -> bool:
    """Whether an index only inserts a dimension: `[:, :, None]`. Of an unchanged shape no slice cuts anything."""
    parts = index if isinstance(index, tuple) else (index,)
    whole = [p for p in parts if p is not None]
    return len(whole) + 1 == len(parts) and all(
        p is Ellipsis or (isinstance(p, slice) and p.step in (None, 1)) for p in whole
    )


def _find_attention(graph: Graph) -> Iterator[Match]:
    for node in list(graph.nodes):
        given = arguments(node) if kind_of(node) == "sdpa" else None
        if given is None:
            continue
        k, k_times, k_nodes = _ungrouped(given["key"])
        v, v_times, v_nodes = _ungrouped(given["value"])
        yield Match(
            node,
            {**given, "key": k, "value": v, "repeats": (k_times, v_times)},
            [*k_nodes, *v_nodes],
        )


def _attention_guard(match: Match, context: Context) -> str | None:
    """Reads K and V once per key head instead of once per query head, and never writes them repeated:
    2·n·S·D values a layer and token for n query heads to a key head; and skips what the mask hides."""
    query, key, value = (shape(match[n]) for n in ("query", "key", "value"))
    if not len(query) == len(key) == len(value) == 4:
        return "not [batch, heads, tokens, head]"
    if not isinstance(match["dropout_p"], (int, float)) or match["dropout_p"] != 0:
        return f"dropout_p={match['dropout_p']}"
    if match["is_causal"]:
        return "is_causal: the flash kernels of scaled_dot_product_attention serve it"
    if match["repeats"][0] != match["repeats"][1]:
        return f"keys and values are repeated {match['repeats']} times"
    heads, key_heads = query[1], key[1]
    if not isinstance(heads, int) or not isinstance(key_heads, int) or heads % key_heads:
        return f"{heads} query heads on {key_heads} key heads"
    if heads != key_heads and match["repeats"][0] == 1 and not match["enable_gqa"]:
        return "heads are broadcast without enable_gqa"
    if not (same_shape(key[:3], value[:3]) and same_shape(query[::3], key[::3])):
        return f"query {query}, key {key} and value {value} are broadcast"
    if not isinstance(query[3], int):
        return "the head dimension is symbolic"
    mask = match["attn_mask"]
    if mask is not None and len(shape(mask)) != 4:
        return f"the mask has shape {shape(mask)}, not [batch, heads, tokens, keys]"
    if mask is None and heads == key_heads and context.device != "cuda":
        return "no mask and no grouped heads: scaled_dot_product_attention serves it"
    if match["scale"] is not None and not is_number(match["scale"]):
        return "scale is computed"
    return None


def _replace_attention(match: Match, graph: Graph) -> Node:
    head = shape(match["query"])[-1]
    scale = number(match["scale"]) if match["scale"] is not None else 1.0 / math.sqrt(head)
    op = Attention(match["query"], match["key"], match["value"], match["attn_mask"], scale)
    return emit_op(graph, match.root, match.root, op)


ATTENTION: tuple[Rewrite, ...] = (
    Rewrite(
        "rope_append",
        "RoPE of q and k, and k and v written into a static cache -> rope_append",
        _find_rope_append,
        _replace_rope_append,
        _rope_append_guard,
    ),
    Rewrite(
        "attention",
        "scaled_dot_product_attention with a mask or grouped heads, repeat_kv or not -> attention",
        _find_attention,
        _replace_attention,
        _attention_guard,
    ),
)
