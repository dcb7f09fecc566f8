"""rope_append and attention on functions of a few lines: what they take and what they leave alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from harness import rewrite

B, HQ, HKV, M, D, S = 2, 4, 2, 3, 8, 11


def rotate_half(x):
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def rope(x, cos, sin):
    return x * cos + rotate_half(x) * sin


def step(q, k, v, cos, sin, k_cache, v_cache, position):
    """As Llama does it: rotate, write, attend."""
    q, k = rope(q, cos, sin), rope(k, cos, sin)
    keys = k_cache.index_copy_(2, position, k)
    values = v_cache.index_copy_(2, position, v)
    return q.sin(), keys.sum(1), values.sum(1)


def operands(rows=M, head=D, batch=B, table=None):
    q, k, v = (torch.randn(batch, h, rows, head) for h in (HQ, HKV, HKV))
    cos, sin = (torch.randn(table or (1, 1, rows, head)) for _ in range(2))
    k_cache, v_cache = (torch.randn(batch, HKV, S, head) for _ in range(2))
    return [q, k, v, cos, sin, k_cache, v_cache, torch.arange(rows) + 4]


@pytest.mark.parametrize(
    "table",
    [
        pytest.param((1, 1, M, D), id="[1,1,M,D]"),
        pytest.param((B, 1, M, D), id="[B,1,M,D]"),
        pytest.param((1, M, D), id="[1,M,D]"),
        pytest.param((M, D), id="[M,D]"),
    ],
)
def test_rope_append(table):
    result = rewrite(step, *operands(table=table))
    assert result.only() == {"rope_append": 1}, result.misses
    assert not result.after.keys() & {"index_copy_", "neg", "cat", "mul"}


@pytest.mark.parametrize("rows", [1, 2, M])
def test_rows(rows):
    assert rewrite(step, *operands(rows)).only() == {"rope_append": 1}


def _variant(**changed):
    """`step` with parts of it replaced."""
    rotate, write_k, write_v = (
        changed.get("rope", rope),
        changed.get("write_k", lambda c, p, k: c.index_copy_(2, p, k)),
        changed.get("write_v", lambda c, p, v: c.index_copy_(2, p, v)),
    )
    between, before = (
        changed.get("between", lambda *a: None),
        changed.get("before", lambda *a: None),
    )

    def fn(q, k, v, cos, sin, k_cache, v_cache, position):
        q2, k2 = rotate(q, cos, sin), rotate(k, cos, sin)
        early = before(q2, k2, v, k_cache, v_cache, position)
        write_k(k_cache, position, k2)
        seen = between(q2, k2, v, k_cache, v_cache, position)
        write_v(v_cache, position, v)
        return q2.sin(), k_cache.sum(1), v_cache.sum(1), early, seen

    return fn


SPELLINGS = {
    "sin-first": {"rope": lambda x, c, s: rotate_half(x) * s + c * x},
    "cat-dim-3": {
        "rope": lambda x, c, s: x * c + torch.cat((-x[..., D // 2 :], x[..., : D // 2]), 3) * s
    },
    "slices-with-bounds": {
        "rope": lambda x, c, s: x * c + torch.cat((-x[..., D // 2 : D], x[..., 0 : D // 2]), -1) * s
    },
    "dim--2": {
        "write_k": lambda c, p, k: c.index_copy_(-2, p, k),
        "write_v": lambda c, p, v: c.index_copy_(-2, p, v),
    },
    "v-read-between": {"between": lambda q, k, v, kc, vc, p: v.sum()},
    "caches-read-before": {"before": lambda q, k, v, kc, vc, p: kc.sum() + vc.sum()},
    "a-view-of-the-cache-made-between": {"between": lambda q, k, v, kc, vc, p: kc.view(-1)[:3]},
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name):
    result = rewrite(_variant(**SPELLINGS[name]), *operands())
    assert result.only() == {"rope_append": 1}, result.misses


def _interleaved(x, c, s):
    return x * c + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * s


def _partial(x, c, s):
    r, rest = x[..., : D // 2], x[..., D // 2 :]
    c, s = c[..., : D // 2], s[..., : D // 2]
    return torch.cat((rope(r, c, s), rest), -1)


REFUSALS = {
    "interleaved": ({"rope": _interleaved}, None),
    "partial": ({"rope": _partial}, None),
    "not-negated": (
        {"rope": lambda x, c, s: x * c + torch.cat((x[..., D // 2 :], x[..., : D // 2]), -1) * s},
        None,
    ),
    "first-half-negated": (
        {"rope": lambda x, c, s: x * c + torch.cat((x[..., D // 2 :], -x[..., : D // 2]), -1) * s},
        None,
    ),
    "uneven-parts": (
        {"rope": lambda x, c, s: x * c + torch.cat((-x[..., 3:], x[..., :3]), -1) * s},
        None,
    ),
    "minus": ({"rope": lambda x, c, s: x * c - rotate_half(x) * s}, None),
    "other-halves": (
        {
            "rope": lambda x, c, s: (
                x * c + torch.cat((-(x + 1)[..., D // 2 :], x[..., : D // 2]), -1) * s
            )
        },
        None,
    ),
    "cat-along-tokens": (
        {
            "rope": lambda x, c, s: (
                x * c + torch.cat((-x[..., D // 2 :], x[..., : D // 2]), -2).reshape(x.shape) * s
            )
        },
        None,
    ),
    "q-read-between": (
        {"between": lambda q, k, v, kc, vc, p: q.sum()},
        "reads q before the cache is written",
    ),
    "q-read-before": (
        {"before": lambda q, k, v, kc, vc, p: q.sum()},
        "reads q before the cache is written",
    ),
    "rotated-k-read": ({"before": lambda q, k, v, kc, vc, p: k.sum()}, "k2 is also read by"),
    "k-cache-read-between": (
        {"between": lambda q, k, v, kc, vc, p: kc.sum()},
        "reads the cache between its two writes",
    ),
    "k-cache-copied-between": (
        {"between": lambda q, k, v, kc, vc, p: kc.clone()},
        "reads the cache between its two writes",
    ),
    "v-cache-read-between": (
        {"between": lambda q, k, v, kc, vc, p: vc[0].sum()},
        "reads the cache between its two writes",
    ),
    "k-cache-read-through-a-view-between": (
        {"between": lambda q, k, v, kc, vc, p: kc.view(-1)[:9].sum()},
        "reads the cache between its two writes",
    ),
    "k-cache-chunked-between": (
        {"between": lambda q, k, v, kc, vc, p: kc.chunk(2, 1)[0] * 2},
        "reads the cache between its two writes",
    ),
    "position-written-between": (
        {"between": lambda q, k, v, kc, vc, p: p.add_(1).sum()},
        "is written in place by add_",
    ),
    "k-cache-written-between": (
        {"between": lambda q, k, v, kc, vc, p: kc[:, :, :6].zero_().sum()},
        "is written in place by zero_",
    ),
    "k-scaled-before-the-write": ({"write_k": lambda c, p, k: c.index_copy_(2, p, k * 2)}, None),
    "setitem": (
        {"write_k": lambda c, p, k: c.__setitem__((slice(None), slice(None), p), k)},
        None,
    ),
    "out-of-place": ({"write_v": lambda c, p, v: c.index_copy(2, p, v)}, None),
    "index_add": ({"write_k": lambda c, p, k: c.index_add_(2, p, k)}, None),
    "other-position": ({"write_v": lambda c, p, v: c.index_copy_(2, p + 1, v)}, None),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_left_alone(name):
    changed, reason = REFUSALS[name]
    result = rewrite(_variant(**changed), *operands())
    assert result.only() == {}
    assert reason is None or reason in result.misses["rope_append"][0], result.misses


def test_the_written_cache_read_between_by_what_the_write_returned():
    def fn(q, k, v, cos, sin, k_cache, v_cache, position):
        q, k = rope(q, cos, sin), rope(k, cos, sin)
        keys = k_cache.index_copy_(2, position, k)
        scores = keys.sum(-1)
        v_cache.index_copy_(2, position, v)
        return q.sin(), scores

    result = rewrite(fn, *operands())
    assert result.only() == {} and "reads the cache between" in result.misses["rope_append"][0]


def test_a_view_of_the_cache_made_before_and_read_between():
    def fn(q, k, v, cos, sin, k_cache, v_cache, position):
        view = k_cache.view(-1)
        q, k = rope(q, cos, sin), rope(k, cos, sin)
        k_cache.index_copy_(2, position, k)
        seen = view.sin()
        v_cache.index_copy_(2, position, v)
        return q.sin(), seen

    result = rewrite(fn, *operands())
    assert result.only() == {} and "reads the cache between" in result.misses["rope_append"][0]


def test_k_and_v_are_one_cache():
    def fn(q, k, v, cos, sin, cache, _, position):
        q, k = rope(q, cos, sin), rope(k, cos, sin)
        cache.index_copy_(2, position, k)
        cache.index_copy_(2, position, v)
        return q.sin()

    assert rewrite(fn, *operands()).only() == {}


def test_caches_in_one_buffer():
    """Two inputs of one storage: what is written to one is not read as the other."""

    def fn(q, k, v, cos, sin, k_cache, v_cache, position):
        return step(q, k, v, cos, sin, k_cache, v_cache, position)[0]

    both = torch.randn(2, B, HKV, S, D)
    given = operands()
    given[5:7] = both[0], both[1]
    rewrite(fn, *given)


def test_the_write_is_returned():
    def fn(q, k, v, cos, sin, k_cache, v_cache, position):
        q, k = rope(q, cos, sin), rope(k, cos, sin)
        keys = k_cache.index_copy_(2, position, k)
        v_cache.index_copy_(2, position, v)
        return q.sin(), keys

    result = rewrite(fn, *operands())
    assert result.only() == {} and "is an output" in result.misses["rope_append"][0]


def test_the_cache_is_made_in_the_graph():
    def fn(q, k, v, cos, sin, k_cache, v_cache, position):
        q, k = rope(q, cos, sin), rope(k, cos, sin)
        k_cache, v_cache = k_cache.clone(), torch.zeros_like(v_cache)
        k_cache.index_copy_(2, position, k)
        v_cache.index_copy_(2, position, v)
        return q.sin(), k_cache, v_cache

    result = rewrite(fn, *operands())
    assert result.only() == {} and "is not an input" in result.misses["rope_append"][0]


def test_q_rotated_after_the_writes():
    def fn(q, k, v, cos, sin, k_cache, v_cache, position):
        k = rope(k, cos, sin)
        k_cache.index_copy_(2, position, k)
        v_cache.index_copy_(2, position, v)
        return rope(q * k_cache.mean(), cos, sin)

    assert rewrite(fn, *operands()).only() == {}


def test_v_written_first():
    def fn(q, k, v, cos, sin, k_cache, v_cache, position):
        q, k = rope(q, cos, sin), rope(k, cos, sin)
        v_cache.index_copy_(2, position, v)
        k_cache.index_copy_(2, position, k)
        return q.sin()

    assert rewrite(fn, *operands()).only() == {}


@pytest.mark.parametrize("shared", [True, False], ids=["one-table", "table-per-layer"])
def test_two_layers(shared):
    """Each layer's q goes with its own k, also when all read one unsqueezed table."""

    def fn(q, k, v, cos, sin, caches, position):
        total = 0
        c, s = cos[None, None], sin[None, None]
        for k_cache, v_cache in caches:
            if not shared:
                c, s = cos.unsqueeze(0).unsqueeze(0), sin.unsqueeze(0).unsqueeze(0)
            q2, k2 = rope(q + total, c, s), rope(k + total, c, s)
            k_cache.index_copy_(2, position, k2)
            v_cache.index_copy_(2, position, v)
            total = total + q2.mean() + k_cache.mean() * v_cache.mean()
        return total

    q, k, v, cos, sin, *_, position = operands()
    caches = [(torch.randn(B, HKV, S, D), torch.randn(B, HKV, S, D)) for _ in range(3)]
    result = rewrite(fn, q, k, v, cos[0, 0], sin[0, 0], caches, position)
    assert result.only() == {"rope_append": 3}, result.misses


@pytest.mark.parametrize(
    "table,batch,rows",
    [
        # Broadcasting counts from the right: [2, M, D] differs by head here, not by batch.
        pytest.param((HKV, M, D), HKV, M, id="by-head"),
        pytest.param((1, HKV, M, D), B, M, id="by-head-4D"),
        pytest.param((1, 1, 1, D), B, M, id="one-row"),
        pytest.param((1, 1, M, 1), B, M, id="one-column"),
        pytest.param((M, 1, 1, D), M, M, id="by-batch-only"),
    ],
)
def test_tables_that_broadcast_otherwise(table, batch, rows):
    given = operands(rows, batch=batch, table=table)
    if table[-3] == HKV:
        given[0] = given[0][:, :HKV].clone()
    result = rewrite(step, *given)
    assert result.only() == {} and "cos" in result.misses["rope_append"][0]


@pytest.mark.parametrize("odd", [7])
def test_an_odd_head_has_no_halves(odd):
    assert rewrite(step, *operands(head=odd)).only() == {}


def test_tables_in_another_dtype():
    q, k, v, cos, sin, k_cache, v_cache, position = operands()
    result = rewrite(step, q, k, v, cos.double(), sin.double(), k_cache.double(), v_cache, position)
    assert result.only() == {} and "differ in dtype" in result.misses["rope_append"][0]
    half = [t.half() for t in (q, k, v, cos, sin, k_cache, v_cache)]
    assert rewrite(step, *half, position, limit=2e-3).only() == {"rope_append": 1}


def test_a_scalar_position():
    q, k, v, cos, sin, k_cache, v_cache, _ = operands(1)
    result = rewrite(step, q, k, v, cos, sin, k_cache, v_cache, torch.tensor(5))
    assert result.only() == {} and "position has shape ()" in result.misses["rope_append"][0]


def test_dynamic_rows_stay():
    given = operands()
    for tensor, dim in zip(given, (2, 2, 2, 2, 2, None, None, 0), strict=True):
        if dim is not None:
            torch._dynamo.mark_dynamic(tensor, dim)
    result = rewrite(step, *given, dynamic=None)
    assert result.only() == {} and result.misses["rope_append"] == ["dynamic shapes"]
    assert result.guards == 0


def repeat_kv(x, n):
    b, h, s, d = x.shape
    return x[:, :, None, :, :].expand(b, h, n, s, d).reshape(b, h * n, s, d)


def qkv(hq=HQ, hkv=HKV, m=M, s=S, d=D, batch=B):
    return (
        torch.randn(batch, hq, m, d),
        torch.randn(batch, hkv, s, d),
        torch.randn(batch, hkv, s, d),
    )


def masks(m=M, s=S, batch=B, heads=1):
    seen = torch.rand(batch, heads, m, s) > 0.4
    return {
        "bool": seen,
        "bool-rows-hidden": seen & (torch.arange(m) > 0)[:, None],
        "float": torch.randn(batch, heads, m, s),
        "finfo.min": torch.where(seen, 0.0, torch.finfo(torch.float32).min),
        "finfo.min-rows-hidden": torch.where(
            seen & (torch.arange(m) > 0)[:, None], 0.0, torch.finfo(torch.float32).min
        ),
        "-inf": torch.where(seen, 0.0, float("-inf")),
    }


@pytest.mark.parametrize("kind", masks())
@pytest.mark.parametrize("grouped", ["repeat_kv", "enable_gqa", "one-to-one"])
@pytest.mark.parametrize("lowered", [False, True], ids=["ops", "lowered"])
def test_attention(kind, grouped, lowered):
    def fn(q, k, v, mask):
        if grouped == "repeat_kv":
            k, v = repeat_kv(k, HQ // HKV), repeat_kv(v, HQ // HKV)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, enable_gqa=grouped == "enable_gqa"
        ).cos()

    q, k, v = qkv(hq=HKV if grouped == "one-to-one" else HQ)
    result = rewrite(fn, q, k, v, masks()[kind], lowered=lowered)
    assert result.only() == {"attention": 1}, result.misses
    assert not result.after.keys() & {"expand", "reshape", "sdpa"}


@pytest.mark.parametrize(
    "shape",
    [
        (B, 1, M, S),
        (1, 1, M, S),
        (B, 1, 1, S),
        (1, 1, 1, S),
        (B, HQ, M, S),
        (1, HQ, 1, S),
        (B, 1, M, 1),
    ],
    ids=str,
)
def test_mask_shapes(shape):
    def fn(q, k, v, mask):
        return F.scaled_dot_product_attention(q, repeat_kv(k, 2), repeat_kv(v, 2), mask)

    assert rewrite(fn, *qkv(), torch.randn(shape)).only() == {"attention": 1}


def test_without_a_mask():
    def grouped(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    def repeated(q, k, v):
        return F.scaled_dot_product_attention(q, repeat_kv(k, 2), repeat_kv(v, 2), scale=0.3)

    for fn in (grouped, repeated):
        assert rewrite(fn, *qkv()).only() == {"attention": 1}

    def plain(q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    result = rewrite(plain, *qkv(hkv=HQ))
    assert result.only() == {} and "no mask and no grouped heads" in result.misses["attention"][0]
    assert rewrite(plain, *qkv(hkv=HQ), device="cuda").only() == {"attention": 1}


def test_value_heads_of_another_size():
    def fn(q, k, v, mask):
        return F.scaled_dot_product_attention(q, repeat_kv(k, 2), repeat_kv(v, 2), mask)

    q, k, _ = qkv()
    assert rewrite(fn, q, k, torch.randn(B, HKV, S, 5), masks()["bool"]).only() == {"attention": 1}


def test_what_reads_the_layout_of_the_result():
    def fn(q, k, v, mask):
        y = F.scaled_dot_product_attention(q, repeat_kv(k, 2), repeat_kv(v, 2), mask)
        return (
            y.transpose(1, 2).contiguous().view(B, M, HQ * D),
            y.reshape(-1),
            y.contiguous().view(B, -1),
        )

    assert rewrite(fn, *qkv(), masks()["bool"]).only() == {"attention": 1}


def test_repeated_keys_are_read_by_others_too():
    def fn(q, k, v, mask):
        k = repeat_kv(k, 2)
        return F.scaled_dot_product_attention(q, k, repeat_kv(v, 2), mask), k.sum(1)

    result = rewrite(fn, *qkv(), masks()["bool"])
    assert result.only() == {"attention": 1} and result.after["expand"] == 1


def test_keys_written_after_they_were_repeated():
    def fn(q, k, v, mask):
        keys = repeat_kv(k, 2)
        k.mul_(2)
        return F.scaled_dot_product_attention(q, keys, repeat_kv(v, 2), mask)

    result = rewrite(fn, *qkv(), masks()["bool"])
    assert result.only() == {} and "is written in place by mul_" in result.misses["attention"][0]


def _sdpa(**options):
    return lambda q, k, v, mask: F.scaled_dot_product_attention(
        q, repeat_kv(k, 2), repeat_kv(v, 2), **options
    )


def _permuted_heads(x):
    return x[:, [1, 0], None].expand(B, HKV, 2, S, D).reshape(B, HQ, S, D)


ATTENTION_REFUSALS = {
    "is_causal": (_sdpa(is_causal=True), "is_causal"),
    "only-keys-repeated": (
        lambda q, k, v, mask: F.scaled_dot_product_attention(
            q, repeat_kv(k, 2), v.repeat_interleave(2, 1), mask
        ),
        "are repeated (2, 1) times",
    ),
    "mask-2-D": (
        lambda q, k, v, mask: F.scaled_dot_product_attention(
            q, repeat_kv(k, 2), repeat_kv(v, 2), mask[0, 0]
        ),
        "the mask has shape",
    ),
    "mask-3-D": (
        lambda q, k, v, mask: F.scaled_dot_product_attention(
            q, repeat_kv(k, 2), repeat_kv(v, 2), mask[0]
        ),
        "the mask has shape",
    ),
    "3-D": (
        lambda q, k, v, mask: F.scaled_dot_product_attention(q[:, 0], k[:, 0], v[:, 0], mask[:, 0]),
        "not [batch, heads, tokens, head]",
    ),
    "5-D": (
        lambda q, k, v, mask: F.scaled_dot_product_attention(
            q[None], repeat_kv(k, 2)[None], repeat_kv(v, 2)[None]
        ),
        "not [batch, heads, tokens, head]",
    ),
    "one-key-head-broadcast": (
        lambda q, k, v, mask: F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], mask),
        "heads are broadcast without enable_gqa",
    ),
    "batch-broadcast": (
        lambda q, k, v, mask: F.scaled_dot_product_attention(
            q, repeat_kv(k, 2)[:1], repeat_kv(v, 2)[:1], mask
        ),
        "are broadcast",
    ),
    "scores-written-out": (
        lambda q, k, v, mask: (
            torch.softmax(q @ repeat_kv(k, 2).mT * 0.3 + mask.float(), -1) @ repeat_kv(v, 2)
        ),
        None,
    ),
}


@pytest.mark.parametrize("name", ATTENTION_REFUSALS)
def test_attention_left_alone(name):
    fn, reason = ATTENTION_REFUSALS[name]
    result = rewrite(fn, *qkv(), masks()["bool"])
    assert result.only() == {}
    assert reason is None or reason in result.misses["attention"][0], result.misses


def test_dropout_in_attention_stays():
    """p=1 drops everything, which is the one dropout with a reproducible result."""
    result = rewrite(_sdpa(dropout_p=1.0), *qkv(), masks()["bool"], limit=float("inf"))
    assert result.only() == {} and result.misses["attention"] == ["dropout_p=1.0"]


NO_REPEAT_KV = {
    "repeat": lambda x: x.repeat(1, 2, 1, 1),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1),
    "heads-permuted": _permuted_heads,
    "tiled-not-interleaved": lambda x: x[:, None].expand(B, 2, HKV, S, D).reshape(B, HQ, S, D),
    "along-tokens": lambda x: x[:, :, :, None].expand(B, HKV, S, 2, D).reshape(B, HQ, S, D),
    "expanded-from-the-head": lambda x: (
        x[:, :1, None].expand(B, 1, HQ, S, D).reshape(B, HQ, S, D) * 1
    ),
}


@pytest.mark.parametrize("name", NO_REPEAT_KV)
def test_what_is_no_repeat_kv(name):
    def fn(q, k, v, mask):
        return F.scaled_dot_product_attention(q, NO_REPEAT_KV[name](k), NO_REPEAT_KV[name](v), mask)

    result = rewrite(fn, *qkv(), masks()["bool"])
    # Attention over what the heads were made into is right; reading the original heads would not be.
    assert result.only() == {"attention": 1}
    (node,) = [n for n in result.graph.nodes if n.target is torch.ops.fsvd.attention.default]
    assert node.args[1].meta["example_value"].shape[1] == HQ


def test_one_key_head_for_all():
    def fn(q, k, v, mask):
        return F.scaled_dot_product_attention(q, repeat_kv(k, HQ), repeat_kv(v, HQ), mask)

    result = rewrite(fn, *qkv(hkv=1), masks()["bool"])
    assert result.only() == {"attention": 1} and result.after["expand"] == 0
