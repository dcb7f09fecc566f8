"""counters, position and decode_attention on functions of a few lines: what they take and what they leave alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from harness import rewrite
from test_rope_and_attention import rope

from fsvd_compile.passes import PIPELINE, Context, run

B, HQ, HKV, D, S = 2, 4, 2, 8, 11


def counter(value=3, shape=()):
    return torch.full(shape, value, dtype=torch.int64)


def layers(*lengths):
    """What each layer of a static cache does with its counter."""
    out = []
    for length in lengths:
        position = torch.arange(1) + length
        length.add_(1)
        out.append(position.sin())
    return out


def test_counters_of_all_layers_become_one_operation_at_the_end():
    result = rewrite(layers, counter(3), counter(4), counter(5))
    assert result.matches == {"counters": 1, "position": 3}
    assert result.before["add_"] == 3
    assert not result.after.keys() & {"add_", "add", "arange"}
    assert result.after["_foreach_add_"] == 1
    assert list(result.graph.nodes)[-2].target is torch._foreach_add_


def test_counters_by_step_and_dtype():
    def fn(a, b, c, d):
        for x, n in ((a, 1), (b, 2), (c, 1), (d, 1)):
            x.add_(n)
        return a.new_ones(2)

    result = rewrite(fn, counter(), counter(), counter(), counter().int())
    assert result.matches == {"counters": 3}
    assert result.after["_foreach_add_"] == 3


@pytest.mark.parametrize("shape", [(), (1,)], ids=["scalar", "vector"])
def test_a_position_of_one_token_is_the_counter(shape):
    result = rewrite(layers, counter(3, shape))
    assert result.matches == {"counters": 1, "position": 1}


def read_after(x):
    x.add_(1)
    return x.sin()


def read_later_through_a_view(x):
    view = x.view(1)
    x.add_(1)
    return view.sin()


def twice(x):
    y = x.sin()
    x.add_(1)
    x.add_(1)
    return y


def returned(x):
    y = x.sin()
    x.add_(1)
    return y, x


def of_floats(x):
    y = x.sin()
    x.double().add_(1)
    return y


def by_a_tensor(x):
    y = x.sin()
    x.add_(x)
    return y


@pytest.mark.parametrize(
    "fn", [read_after, read_later_through_a_view, twice, returned, of_floats, by_a_tensor]
)
def test_counters_that_are_looked_at_stay(fn):
    result = rewrite(fn, counter())
    # Dynamo hands an input back by itself: the graph does not return it.
    assert result.matches.get("counters", 0) == (fn in (twice, returned)), result.matches


def test_many_numbers_are_no_counter():
    def fn(x):
        y = x.sin()
        x.add_(1)
        return y

    assert "counters" not in rewrite(fn, torch.arange(5)).matches


POSITIONS = {
    "two tokens": lambda x: (torch.arange(2) + x).sin(),
    "start at one": lambda x: (torch.arange(1, 2) + x).sin(),
    "another dtype": lambda x: (
        (torch.arange(1, dtype=torch.int32) + x.int()).to(torch.int64)[None] + x
    ),
    "scaled": lambda x: torch.add(torch.arange(1), x, alpha=2).sin(),
    "returned": lambda x: torch.arange(1) + x,
}


@pytest.mark.parametrize("fn", POSITIONS.values(), ids=POSITIONS)
def test_positions_that_stay(fn):
    result = rewrite(fn, counter())
    assert result.matches.get("position", 0) == (1 if fn is POSITIONS["another dtype"] else 0)


def test_a_position_outlives_a_write_to_what_it_came_from():
    def fn(x):
        position = torch.arange(1) + x
        x.mul_(2)
        return position.sin(), x.sin()

    assert "position" not in rewrite(fn, counter()).matches


def test_a_position_that_is_written_is_no_counter():
    def fn(x):
        position = torch.arange(1) + x
        y = position.sin()
        position.fill_(9)
        return y, position.cos(), x.sin()

    assert "position" not in rewrite(fn, counter()).matches


def test_a_position_computed_from_a_view_of_another():
    """The second position is the counter by way of the first: the write to the counter lies between as well."""

    def fn(x):
        first = torch.arange(1) + x
        second = torch.arange(1) + first[0]
        x.add_(2)
        return second.sin(), x.sin()

    rewrite(fn, counter())


def test_a_position_on_another_device_than_the_counter():
    def fn(x):
        return (torch.arange(1, device="meta") + x).sin().shape, x.sin()

    def seen(gm, inputs):
        outcomes = run(PIPELINE, gm.graph, Context())
        matches.update({o.name: o.matches for o in outcomes})
        return gm

    matches: dict[str, int] = {}
    torch.compile(fn, backend=seen)(counter())
    assert matches["position"] == 0


def test_a_position_beside_its_counter_in_a_higher_order_operator():
    def fn(x, y):
        p = torch.arange(1) + x
        z = torch.cond(y.sum() > 0, lambda p, x: p + x, lambda p, x: p - x, (p, x))
        x.add_(1)
        return z

    result = rewrite(fn, counter(), torch.ones(2))
    assert "position" not in result.matches


def test_a_position_of_floats():
    result = rewrite(lambda x: (torch.arange(1.0) + x).sin(), torch.tensor(-0.0))
    assert "position" not in result.matches


def step(q, k, v, cos, sin, k_cache, v_cache, position, mask):
    """As Llama does it for one token: rotate, write, attend."""
    q, k = rope(q, cos, sin), rope(k, cos, sin)
    keys = k_cache.index_copy_(2, position, k)
    values = v_cache.index_copy_(2, position, v)
    return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)


def operands(rows=1, heads=HQ):
    q, k, v = (torch.randn(B, h, rows, D) for h in (heads, HKV, HKV))
    cos, sin = (torch.randn(1, 1, rows, D) for _ in range(2))
    k_cache, v_cache = (torch.randn(B, HKV, S, D) for _ in range(2))
    mask = (torch.arange(S) < rows + 4).expand(B, 1, rows, S)
    return [q, k, v, cos, sin, k_cache, v_cache, torch.arange(rows) + 4, mask]


@pytest.mark.parametrize("heads", [HKV, HQ])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_decode_attention(device, heads):
    result = rewrite(step, *operands(heads=heads), device=device)
    assert result.only() == {"rope_append": 1, "attention": 1, "decode_attention": 1}
    assert result.after["fsvd.decode_attention"] == 1
    assert not result.after.keys() & {"index_copy_", "fsvd.rope_append", "fsvd.attention"}


def test_lowered_to_aten_on_a_cpu():
    result = rewrite(step, *operands(), lowered=True)
    assert result.after["decode_attention_aten"] == 1
    assert not any(name.startswith("fsvd.") for name in result.after)


def test_without_a_mask():
    args = operands()
    args[8] = None
    assert rewrite(step, *args, device="cuda").only()["decode_attention"] == 1


def two_layers(other_mask=False, written=False):
    """Two caches under one mask."""

    def fn(q, k, v, cos, sin, k_cache, v_cache, position, mask, k_next, v_next):
        y = step(q, k, v, cos, sin, k_cache, v_cache, position, mask)
        if written:
            mask.logical_not_()
        late = mask.logical_not() if other_mask else mask
        return step(y, k, v, cos, sin, k_next, v_next, position, late)

    args = operands()
    args[8] = args[8].contiguous()
    return fn, [*args, *(c.clone() for c in args[5:7])]


def test_how_far_a_mask_reaches_is_found_once_for_all_layers():
    fn, args = two_layers()
    result = rewrite(fn, *args, device="cuda")
    assert result.only()["decode_attention"] == 2
    assert result.after["mask_reach"] == 1
    ops = [n for n in result.graph.nodes if "fsvd.decode_attention" in str(n.target)]
    (reach,) = {n.args[10] for n in ops}
    assert reach.args == (ops[0].args[8], S)
    assert reach < min(n for n in result.graph.nodes if n.op == "call_function" and n is not reach)


@pytest.mark.parametrize("how", ({"other_mask": True}, {"written": True}))
def test_how_far_a_mask_of_one_layer_reaches_is_not_worth_a_kernel(how):
    fn, args = two_layers(**how)
    result = rewrite(fn, *args, device="cuda")
    assert result.only()["decode_attention"] == 2
    assert "mask_reach" not in result.after


def test_how_far_a_mask_of_no_sequence_reaches():
    fn, args = two_layers()
    args = [a if a.dim() < 4 or a.shape[0] == 1 else a[:0] for a in args]
    assert "mask_reach" not in rewrite(fn, *args, device="cuda").after


def test_several_tokens_keep_two_operations():
    result = rewrite(step, *operands(rows=3))
    assert result.only() == {"rope_append": 1, "attention": 1}
    assert "3 tokens" in result.misses["decode_attention"][0]


def _changed(between=None, after=None, other=False):
    def fn(q, k, v, cos, sin, k_cache, v_cache, position, mask):
        q, k = rope(q, cos, sin), rope(k, cos, sin)
        k_cache.index_copy_(2, position, k)
        v_cache.index_copy_(2, position, v)
        seen = between(q, k_cache, v_cache) if between else None
        values = v_cache.clone() if other else v_cache
        y = F.scaled_dot_product_attention(q, k_cache, values, mask, enable_gqa=True)
        late = after(k_cache, v_cache) if after else None
        return y, seen, late

    return fn


LEFT_ALONE = {
    "the cache is read in between": _changed(lambda q, k, v: k.sum()),
    "the cache is written in between": _changed(lambda q, k, v: k.mul_(0.5).sum()),
    "the cache is written afterwards": _changed(after=lambda k, v: v.zero_().sum()),
    "q is read by others": _changed(lambda q, k, v: q.sin()),
    "attention is over other values": _changed(other=True),
}


@pytest.mark.parametrize("fn", LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_left_alone(fn):
    result = rewrite(fn, *operands(), device="cuda")
    assert "decode_attention" not in result.matches, result.text()


def test_the_cache_may_be_read_afterwards():
    result = rewrite(_changed(after=lambda k, v: k.sum() + v.sum()), *operands(), device="cuda")
    assert result.only()["decode_attention"] == 1


def test_a_second_append_to_the_same_cache():
    """Two steps in one graph: the second would read ahead what the first writes."""

    def fn(q, k, v, cos, sin, k_cache, v_cache, position, mask):
        args = cos, sin, k_cache, v_cache
        y = step(q, k, v, *args, position, mask)
        return step(y, k, v, *args, position + 1, mask)

    result = rewrite(fn, *operands(), device="cuda")
    assert "decode_attention" not in result.matches
    assert any("writes the cache as well" in reason for reason in result.misses["decode_attention"])


def caches(kind):
    """Keys and values in one buffer, or with another order of dimensions."""
    if kind == "overlapping":
        room = torch.randn(B, HKV, S, D + 3)
        return room[..., :D], room[..., 3:]
    if kind == "apart":
        return torch.randn(2, B, HKV, S, D).unbind()
    return torch.randn(B, HKV, D, S).transpose(2, 3), torch.randn(B, HKV, S, D)


@pytest.mark.parametrize(("kind", "appends"), [("overlapping", 0), ("apart", 1), ("transposed", 0)])
def test_where_caches_lie(kind, appends):
    q, k, v, cos, sin, _, _, position, mask = operands()

    def fn(k_cache, v_cache):
        return step(q, k, v, cos, sin, k_cache, v_cache, position, mask)

    seen = {}

    def backend(gm, inputs):
        seen.update({o.name: o.matches for o in run(PIPELINE, gm.graph, Context("cuda"))})
        return gm

    ours = caches(kind)
    theirs = [c.clone() for c in ours]
    actual = torch.compile(fn, backend=backend)(*ours)
    assert seen["rope_append"] == appends
    if kind != "overlapping":
        torch.testing.assert_close(actual, fn(*theirs))
