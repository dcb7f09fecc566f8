"""The contract of `GraphedCallable`, point by point: on a stand-in for CUDA, then on CUDA."""

from __future__ import annotations

import gc
import logging
import sys
import threading
import weakref

import pytest
import torch
from fake_cuda import FakeApi
from harness import assert_close
from torch.multiprocessing.reductions import StorageWeakRef

from fsvd_compile.cuda_graph import (
    PAYBACK,
    GraphedCallable,
    GraphPool,
    returning_addresses,
)

WIDTH, SLOTS = 4, 8


@pytest.fixture
def pool():
    return GraphPool(api=FakeApi())


def graphed(fn, pool, static=(), mutated=(), **kwargs):
    kwargs = {"name": "test", "max_captures": 4, **kwargs}
    return GraphedCallable(
        fn, static=frozenset(static), mutated=frozenset(mutated), pool=pool, **kwargs
    )


def decode(weight, keys, length, x):
    """One step with a KV cache: inputs 1 and 2 are written in place."""
    length.add_(1)
    keys.index_copy_(0, length, (x @ weight)[None])
    return [keys.sum(0) + x]


class Steps:
    """`decode` graphed, beside the same steps run plainly on tensors of their own."""

    def __init__(self, pool, device="cpu", fn=decode, **kwargs):
        self.step = graphed(fn, pool, static=[0], mutated=[1, 2], **kwargs)
        self.weight = torch.randn(WIDTH, WIDTH, device=device)
        self.device = device

    def cache(self):
        keys = torch.zeros(SLOTS, WIDTH, device=self.device)
        return keys, torch.full((1,), -1, device=self.device)

    def check(self, cache, twin):
        x = torch.randn(WIDTH, device=self.device)
        (out,) = self.step(self.weight, *cache, x)
        (expected,) = decode(self.weight, *twin, x)
        assert_close("output", out, expected, 1e-5)
        assert_close("keys", cache[0], twin[0], 1e-5)
        assert cache[1].item() == twin[1].item()
        return out


# Points 1 and 2


def test_each_call_advances_caches_and_counters_once(pool):
    steps = Steps(pool)
    cache, twin = steps.cache(), steps.cache()
    for calls in range(1, 6):
        steps.check(cache, twin)
        assert cache[1].item() == calls - 1
    assert pool.warm_ups == pool.captures == {"test": 1}
    assert pool.replays == {"test": 4}
    assert not pool.stood_aside


def test_addresses_that_return_are_captured_by_the_first_call(pool):
    steps = Steps(pool, ahead=True)
    cache, twin = steps.cache(), steps.cache()
    with returning_addresses():
        steps.check(cache, twin)
        assert (pool.warm_ups, pool.captures, pool.replays) == ({"test": 1}, {"test": 1}, {})
        steps.check(cache, twin)
    steps.check(cache, twin)
    assert (pool.warm_ups, pool.captures, pool.replays) == ({"test": 1}, {"test": 1}, {"test": 2})
    other, other_twin = steps.cache(), steps.cache()
    steps.check(other, other_twin)  # the promise is over
    assert (pool.warm_ups, pool.captures) == ({"test": 2}, {"test": 1})


def test_addresses_that_return_make_no_other_capture_go(pool):
    steps = Steps(pool, max_captures=2, ahead=True)
    caches = [(steps.cache(), steps.cache()) for _ in range(3)]
    with returning_addresses():
        for cache, twin in caches:
            for _ in range(1 + (cache is not caches[2][0])):
                steps.check(cache, twin)
    assert pool.captures == {"test": 2}
    for cache, twin in caches[:2]:
        steps.check(cache, twin)
    assert pool.captures == {"test": 2} and pool.replays == {"test": 4}


def test_a_promise_that_was_not_kept_costs_one_capture_and_no_patience(pool):
    steps = Steps(pool, ahead=True)
    with returning_addresses():
        for _ in range(8):
            steps.check(steps.cache(), steps.cache())
    assert pool.captures == {"test": 8} and len(steps.step._entries) == 1
    caches = [(steps.cache(), steps.cache()) for _ in range(4)]
    for cache, twin in caches:
        for _ in range(6):
            steps.check(cache, twin)
    assert pool.captures == {"test": 12} and pool.replays == {"test": 20}
    assert not pool.stood_aside


@pytest.mark.parametrize("borrow", (False, True))
def test_a_chain_is_not_captured_ahead(pool, borrow):
    steps = Steps(pool, borrow_outputs=borrow)
    cache, twin = steps.cache(), steps.cache()
    with returning_addresses():
        steps.check(cache, twin)
    assert not pool.captures


def test_a_capture_ahead_that_fails_leaves_the_answer(pool):
    def fn(weight, keys, length, x):
        if pool.api.capturing:
            raise RuntimeError("no")
        return decode(weight, keys, length, x)

    steps = Steps(pool, fn=fn, ahead=True)
    cache, twin = steps.cache(), steps.cache()
    with returning_addresses():
        for _ in range(3):
            steps.check(cache, twin)
    assert pool.stood_aside == {("test", "capture failed: RuntimeError: no"): 2}


def test_failed_capture_runs_the_same_call_uncaptured(pool, caplog):
    calls = []

    def fn(weight, keys, length, x):
        calls.append(pool.api.capturing)
        out = decode(weight, keys, length, x)
        if pool.api.capturing:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return out

    steps = Steps(pool, fn=fn)
    cache, twin = steps.cache(), steps.cache()
    with caplog.at_level(logging.INFO):
        for _ in range(5):
            steps.check(cache, twin)
    assert calls == [False, True, False, False, False, False]
    reason = "capture failed: RuntimeError: operation not permitted when stream is capturing"
    assert pool.stood_aside == {("test", reason): 4}
    assert not pool.captures
    assert [r.levelname for r in caplog.records] == ["WARNING", "INFO"]
    assert gc.isenabled()


def test_captures_made_before_a_failure_stay_in_use(pool):
    broken = False

    def fn(weight, keys, length, x):
        if broken and pool.api.capturing:
            raise RuntimeError("no")
        return decode(weight, keys, length, x)

    steps = Steps(pool, fn=fn)
    first, first_twin = steps.cache(), steps.cache()
    second, second_twin = steps.cache(), steps.cache()
    for _ in range(2):
        steps.check(first, first_twin)
    broken = True
    for _ in range(3):
        steps.check(second, second_twin)
        steps.check(first, first_twin)
    assert pool.captures["test"] == 1
    assert pool.replays["test"] == 4
    assert sum(pool.stood_aside.values()) == 2


def test_pool_of_a_failed_capture_is_not_used_again(pool):
    def fails(x):
        if pool.api.capturing:
            raise RuntimeError("no")
        return [x]

    steps = [graphed(fn, pool) for fn in (lambda x: [x + 1], fails, lambda x: [x + 2])]
    for step in steps:
        for _ in range(3):
            step(torch.ones(2))
    assert pool.api.pools == [0, 0, 1]


def test_error_of_a_warm_up_reaches_the_caller(pool):
    def fn(x):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        graphed(fn, pool)(torch.ones(2))


# Point 3


def test_new_cache_is_captured_once_and_the_old_one_stays(pool):
    steps = Steps(pool)
    a, a_twin, b, b_twin = (steps.cache() for _ in range(4))
    for _ in range(3):
        steps.check(a, a_twin)
    for _ in range(3):
        steps.check(b, b_twin)
    assert pool.captures["test"] == 2
    for _ in range(2):
        steps.check(a, a_twin)
        steps.check(b, b_twin)
    assert pool.captures["test"] == 2
    assert pool.replays["test"] == 8


def test_weight_values_are_read_and_new_weight_tensors_are_noticed(pool):
    step = graphed(lambda weight, x: [x @ weight], pool, static=[0])
    weight, x = torch.randn(WIDTH, WIDTH), torch.randn(WIDTH)
    for _ in range(3):
        step(weight, x)
    weight.mul_(2)
    assert_close("in place", step(weight, x)[0], x @ weight, 1e-6)
    weight.data = torch.randn(WIDTH, WIDTH)
    for _ in range(3):
        assert_close("replaced", step(weight, x)[0], x @ weight, 1e-6)
    assert pool.captures["test"] == 2


def test_constants_are_part_of_the_key(pool):
    step = graphed(lambda x, n, flag, none: [x * n + flag], pool)
    x = torch.ones(2)
    for n, flag in [(2, True), (3, True), (3, 1), (2, True), (3, True), (3, 1), (2, True)]:
        assert step(x, n, flag, None)[0].tolist() == [n + 1] * 2
    assert pool.captures["test"] == 3  # True and 1 are equal, and two captures


def test_no_reference_to_caches_is_kept(pool):
    def fn(keys, x):
        keys.add_(x)
        return [keys, keys[:1], keys[:0], x * 2]

    step = graphed(fn, pool, mutated=[0])
    keys, x = torch.zeros(3, 2), torch.ones(2)
    for _ in range(4):
        out = step(keys, x)
    assert pool.captures["test"] == 1
    storage, tensor = StorageWeakRef(keys.untyped_storage()), weakref.ref(keys)
    assert not storage.expired()
    del keys, out
    assert storage.expired()
    assert tensor() is None


def test_input_in_the_memory_of_a_mutated_one_is_not_copied(pool):
    def fn(keys, last):
        keys.add_(1)
        return [last * 10]

    step = graphed(fn, pool, mutated=[0])
    keys = torch.zeros(3)
    for calls in range(1, 5):
        assert step(keys, keys[2:])[0].item() == 10 * calls
    assert pool.captures["test"] == 1
    assert pool.api.copies == 0


# Point 4


def test_outputs_kept_by_the_caller_do_not_change(pool):
    step = graphed(lambda x: (x + 1, 7, None, x * 2), pool)
    kept = [step(torch.full((2,), float(i))) for i in range(5)]
    for i, (first, seven, none, second) in enumerate(kept):
        assert first.tolist() == [i + 1] * 2
        assert second.tolist() == [i * 2] * 2
        assert (seven, none) == (7, None)
    assert all(type(out) is tuple for out in kept)


def test_outputs_that_are_inputs_come_back_as_the_callers_tensors(pool):
    def fn(keys, x):
        keys[1].add_(x)
        return [keys, x, keys[1], x.view(2, 1), keys.view(torch.int32)[1:, :1]]

    step = graphed(fn, pool, mutated=[0])
    keys = torch.zeros(3, 2)
    for i in range(4):
        x = torch.full((2, 2), float(i))[1]  # at an offset in its storage
        out = step(keys, x)
        for actual, expected in zip(out, fn(keys, torch.zeros(2)), strict=True):
            assert actual.shape == expected.shape
            assert actual.stride() == expected.stride()
            assert actual.dtype is expected.dtype
        assert out[0] is keys
        assert out[1] is x
        assert out[2].data_ptr() == keys[1].data_ptr()
        assert out[3].data_ptr() == x.data_ptr()
        assert out[4].data_ptr() == keys[1].data_ptr()


def test_outputs_that_share_memory_still_do(pool):
    def fn(x):
        y = torch.stack([x, x + 1, x + 2])
        return [y[1:], y.t(), x.sum().expand(3), y[2, 1:]]

    step = graphed(fn, pool)
    for i in range(4):
        x = torch.full((2,), float(i))
        out, expected = step(x), fn(x)
        for actual, wanted in zip(out, expected, strict=True):
            assert torch.equal(actual, wanted)
            assert actual.stride() == wanted.stride()
        out[0][1, 1] = -1
        assert out[1][1, 2] == -1
        assert out[3].item() == -1


def test_layout_of_outputs_is_kept(pool):
    step = graphed(lambda x: [x.t() + 1, (x + 1)[:, ::2], x.new_zeros(0, 3)], pool)
    for i in range(3):
        out = step(torch.full((2, 4), float(i)))
        assert [o.stride() for o in out] == [(1, 4), (4, 2), (3, 1)]
        assert [o.shape for o in out] == [(4, 2), (2, 2), (0, 3)]
        assert all((o == i + 1).all() for o in out)


def test_chain_passes_lent_outputs_without_copies(pool):
    layers = [
        graphed(lambda w, x: [x @ w], pool, static=[0], name=f"layer{i}", borrow_outputs=True)
        for i in range(3)
    ]
    head = graphed(lambda x: [x + 1], pool, name="head")
    weights = [torch.randn(WIDTH, WIDTH) for _ in layers]
    kept = []
    for _ in range(4):
        pool.api.copies = 0
        x = h = torch.randn(WIDTH)
        for layer, weight in zip(layers, weights, strict=True):
            (h,) = layer(weight, h)
        kept.append((head(h)[0], x @ weights[0] @ weights[1] @ weights[2] + 1))
    assert pool.api.copies == 1  # the input of the first layer
    assert set(pool.captures.values()) == {1}
    assert len(set(pool.api.pools)) == 1
    for actual, expected in kept:
        assert_close("head", actual, expected, 1e-5)
    # A hidden state from elsewhere is no lent buffer: captured anew, right at once.
    for _ in range(3):
        h = torch.randn(WIDTH)
        assert_close("foreign", layers[1](weights[1], h)[0], h @ weights[1], 1e-5)
    assert pool.captures["layer1"] == 2


def test_output_fed_back_is_copied(pool):
    step = graphed(lambda x, n: [x + n], pool, borrow_outputs=True)
    x = torch.zeros(2)
    for _ in range(8):
        (x,) = step(x, 1)
        (x,) = step(x, 2)
    assert x.tolist() == [24, 24]
    assert pool.captures["test"] == 2


def test_captures_out_of_order_get_a_pool_of_their_own(pool):
    def layer(name):
        return graphed(lambda k, x: [x + k], pool, static=[0], name=name, borrow_outputs=True)

    layers = [layer("a"), layer("b")]
    caches = [torch.ones(2), torch.full((2,), 2.0)]
    for cache in caches:
        for _ in range(3):
            (h,) = layers[0](cache, torch.zeros(2))
            (h,) = layers[1](cache, h)
            assert torch.equal(h, 2 * cache)
    assert pool.api.pools == [0, 0, 1, 1]


def test_pool_without_graphs_is_not_used_again(pool):
    step = graphed(lambda w, x: [x + w], pool, static=[0], max_captures=1)
    weights = [torch.ones(2), torch.ones(2)]
    for weight in weights:
        for _ in range(PAYBACK + 2):
            step(weight, torch.ones(2))
    assert pool.api.pools == [0, 1]


# Point 5


def test_copies_are_batched_by_dtype(pool):
    step = graphed(lambda a, b, c, d: [a + b + c + d], pool)
    args = [torch.ones(2), torch.ones(2), torch.ones(2, dtype=torch.long), torch.ones(2).bool()]
    for _ in range(2):
        step(*args)
    pool.api.copies = pool.api.copy_calls = 0
    assert step(*args)[0].tolist() == [4, 4]
    assert (pool.api.copies, pool.api.copy_calls) == (4, 3)


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x[:1].expand(6, 6),
        lambda x: x[:, :1].expand(2, 6, 6),
        lambda x: x.t(),
        lambda x: x[1:, ::2],
        lambda x: x.as_strided((4, 3), (1, 1)),
        lambda x: x.as_strided((2, 4, 3), (0, 1, 1), 5),
        lambda x: x[3, 3],
        lambda x: x[:0],
    ],
    ids=["expand", "expand3", "t", "gaps", "windows", "expanded-windows", "scalar", "empty"],
)
def test_buffers_have_the_layout_of_the_input(pool, layout):
    strides = []

    def fn(x):
        strides.append(x.stride())
        return [x * 2]

    step = graphed(fn, pool)
    for _ in range(4):
        x = layout(torch.randn(6, 6))
        assert torch.equal(step(x)[0], x * 2)
    assert set(strides) == {x.stride()}
    assert pool.captures["test"] == 1


def test_another_layout_is_another_capture(pool):
    step = graphed(lambda x: [x * 2], pool)
    base = torch.randn(3, 3)
    for x in [base, base.t(), base.long(), base[:1]] * 3:
        out = step(x)[0]
        assert torch.equal(out, x * 2)
        assert out.stride() == (x * 2).stride()
    # With no static input nothing else tells them apart; the warm-up is shared.
    assert pool.captures["test"] == 4
    assert pool.warm_ups["test"] == 1


def test_another_layout_at_a_lent_address_is_another_capture(pool):
    first = graphed(lambda x: [x + 1], pool, name="first", borrow_outputs=True)
    second = graphed(lambda x: [x * 2], pool, name="second")
    for i in range(8):
        (lent,) = first(torch.arange(6.0).view(2, 3) + i)
        for x in [lent, lent[:1], lent.view(3, 2)]:
            assert torch.equal(second(x)[0], x * 2)


# Point 6


def test_least_recently_found_capture_makes_room(pool):
    step = graphed(lambda w, x: [x + w], pool, static=[0], max_captures=2)
    a, b, c = (torch.full((2,), float(i)) for i in range(3))
    x = torch.ones(2)
    for weight in (a, b):
        for _ in range(PAYBACK + 1):
            step(weight, x)
    step(a, x)
    for _ in range(2):
        step(c, x)  # in the place of b
    captures = pool.captures["test"]
    step(a, x)
    assert pool.captures["test"] == captures == 3
    assert step(b, x)[0].tolist() == [2, 2]
    assert pool.captures["test"] == 3  # addresses that lost their capture start over
    assert step(b, x)[0].tolist() == [2, 2]
    assert pool.captures["test"] == 4


def test_more_caches_than_captures_do_not_thrash(pool, caplog):
    step = graphed(lambda w, x: [x + w], pool, static=[0], max_captures=2)
    weights, x = [torch.full((2,), float(i)) for i in range(3)], torch.ones(2)
    with caplog.at_level(logging.INFO):
        for _ in range(200):
            for i, weight in enumerate(weights):
                assert step(weight, x)[0].tolist() == [1 + i] * 2
    assert pool.captures["test"] <= 600 / PAYBACK
    assert pool.replays["test"] >= 300
    (record,) = caplog.records
    assert "more than 2 (max_captures) address sets take turns" in record.getMessage()


def test_captures_that_pay_make_the_next_one_cheap_again(pool):
    step = graphed(lambda w, x: [x + w], pool, static=[0], max_captures=1)
    x = torch.ones(2)

    def uncaptured(weight, calls):
        """How many of the calls ran before the capture."""
        before = pool.replays["test"]
        for _ in range(calls):
            step(weight, x)
        return calls - pool.replays["test"] + before

    weights = [torch.ones(2) for _ in range(8)]
    assert [uncaptured(w, 3) for w in weights[:3]] == [1, 1, 2]
    assert [uncaptured(w, 20) for w in weights[3:]] == [4, 8, 4, 2, 1]


def test_addresses_that_never_come_back_cost_no_capture(pool):
    step = graphed(lambda w, x: [x + w], pool, static=[0])
    weights = [torch.ones(2) for _ in range(50)]
    for weight in weights:
        step(weight, torch.ones(2))
    assert not pool.captures
    assert pool.warm_ups["test"] == 50
    assert len(step._sights) <= 16


# Point 7


def stands_aside(pool, step, args, reason, calls=3):
    for _ in range(calls):
        step(*args)
    assert not pool.captures
    assert [key for key in pool.stood_aside if reason in key[1]], pool.stood_aside


def test_stands_aside_while_the_stream_is_capturing(pool):
    step = graphed(lambda x: [x + 1], pool)
    for _ in range(3):
        step(torch.ones(2))
    pool.api.capturing = True
    assert step(torch.ones(2))[0].tolist() == [2, 2]
    assert pool.stood_aside == {("test", "the current stream is capturing already"): 1}
    assert pool.replays["test"] == 2
    pool.api.capturing = False
    step(torch.ones(2))
    assert pool.replays["test"] == 3


def test_graphed_callable_inside_another_ones_capture(pool):
    inner = graphed(lambda x: [x + 1], pool, name="inner")
    outer = graphed(lambda x: inner(x), pool, name="outer")
    for i in range(4):
        assert outer(torch.full((2,), float(i)))[0].tolist() == [i + 1] * 2
    assert pool.captures == {"outer": 1}


def test_stands_aside_on_other_devices(pool):
    step = graphed(lambda x, y: [x], pool)
    stands_aside(pool, step, (torch.ones(2), torch.ones(2, device="meta")), "on meta")


def test_stands_aside_when_a_gradient_may_be_asked_for(pool):
    step = graphed(lambda w, x: [x * w], pool, static=[0])
    weight = torch.nn.Parameter(torch.ones(2))
    stands_aside(pool, step, (weight, torch.ones(2)), "a gradient")
    assert step(weight, torch.ones(2))[0].requires_grad
    with torch.no_grad():
        for _ in range(3):
            step(weight, torch.ones(2))
    assert pool.replays["test"] == 2
    assert step(weight, torch.ones(2))[0].requires_grad


def test_stands_aside_for_subclasses_and_unknown_inputs(pool):
    class Sub(torch.Tensor):
        pass

    step = graphed(lambda x, y: [x + 1], pool)
    plain = torch.ones(2)
    for _ in range(2):
        step(plain, None)
    captures = pool.captures["test"]
    with torch._subclasses.FakeTensorMode() as mode:
        fake = mode.from_tensor(plain)
    assert type(step(fake, None)[0]) is type(fake)
    step(torch.ones(2).as_subclass(Sub), None)
    step(plain, torch.Generator())
    step(torch._to_functional_tensor(plain), None)
    torch.vmap(lambda x: step(x, None)[0])(torch.ones(3, 2))
    assert pool.captures["test"] == captures
    reasons = [reason for _, reason in pool.stood_aside]
    assert len(reasons) == 4
    for part, reason in zip(["FakeTensor", "Sub", "Generator", "(Tensor)"], reasons, strict=True):
        assert part in reason


def test_static_fake_tensors_do_not_reach_the_graph(pool):
    weight = torch.ones(2)
    step = graphed(lambda w, x: [x + w], pool, static=[0])
    for _ in range(3):
        step(weight, torch.ones(2))
    with torch._subclasses.FakeTensorMode() as mode:
        fake = mode.from_tensor(weight)
        out = step(fake, mode.from_tensor(torch.ones(2)))[0]
    assert type(out) is type(fake)


def test_undeclared_mutation_is_seen(pool):
    def fn(x):
        x.add_(1)
        return [x * 2]

    step, x = graphed(fn, pool), torch.zeros(2)
    for i in range(1, 5):
        assert step(x)[0].tolist() == [2 * i] * 2
    assert not pool.captures
    assert ("test", "input 0 is written but not declared mutated") in pool.stood_aside


@pytest.mark.parametrize(
    ("fn", "part"),
    [
        (lambda x: x + 1, "returns a Tensor"),
        (lambda x: [x, object()], "returns a object"),
        (lambda x: [torch.ones(2, device="meta")], "on meta"),
        (lambda x: [(x * 1j).conj()], "lazily"),
    ],
)
def test_outputs_that_cannot_be_replayed(pool, fn, part):
    step = graphed(fn, pool)
    pool.api.capture = lambda fn, args, pool, device: (None, fn(*args))
    stands_aside(pool, step, (torch.ones(2),), part)


# Points 8 to 10


def test_reset_frees_and_starts_over(pool):
    steps = Steps(pool, borrow_outputs=True)
    cache, twin = steps.cache(), steps.cache()
    for _ in range(3):
        out = steps.check(cache, twin)
    entry = weakref.ref(steps.step._last)
    lent = StorageWeakRef(out.untyped_storage())
    del out
    assert entry() is not None
    assert not lent.expired()
    pool.reset()
    assert entry() is None
    assert lent.expired()
    assert not pool.lent
    for _ in range(3):
        steps.check(cache, twin)
    assert pool.captures["test"] == 2
    assert pool.api.pools == [0, 1]


def test_dropped_callables_take_their_graphs_along(pool):
    steps = Steps(pool)
    cache, twin = steps.cache(), steps.cache()
    for _ in range(3):
        steps.check(cache, twin)
    entry = weakref.ref(steps.step._last)
    del steps
    assert entry() is None
    assert not pool.callables


def test_streams_are_ordered_when_they_change(pool):
    steps = Steps(pool)
    cache, twin = steps.cache(), steps.cache()
    for stream in [0, 0, 0, 7, 7, 0]:
        pool.api.stream = stream
        steps.check(cache, twin)
    assert pool.api.joins == [(None, 0), (0, 7), (7, 0)]


def test_threads_do_not_mix_their_inputs(pool):
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    step = graphed(lambda x: [x + 1], pool)
    wrong = []

    def run(base):
        for i in range(100):
            value = float(base * 1000 + i)
            if (step(torch.full((4096,), value))[0] != value + 1).any():
                wrong.append(value)

    threads = [threading.Thread(target=run, args=(base,)) for base in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert not wrong
    assert pool.captures["test"] == 1


def test_collector_is_off_during_a_capture_only(pool):
    step = graphed(lambda x: [x + 1], pool)
    for _ in range(3):
        step(torch.ones(2))
    assert pool.api.collecting == [False]
    assert gc.isenabled()


def test_inference_mode_and_no_grad_share_buffers(pool):
    step = graphed(lambda x: [x + 1], pool)
    for i in range(6):
        with torch.inference_mode() if i % 2 else torch.no_grad():
            assert step(torch.full((2,), float(i)))[0].tolist() == [i + 1] * 2
    assert pool.captures["test"] == 1


def test_logs_each_reason_once(pool, caplog):
    step = graphed(lambda x, y: [x], pool)
    with caplog.at_level(logging.INFO):
        stands_aside(pool, step, (torch.ones(2), object()), "input 1 is a object", calls=4)
    assert len(caplog.records) == 1
    assert sum(pool.stood_aside.values()) == 4


# The same on CUDA


@pytest.fixture
def cuda_pool():
    pool = GraphPool()
    yield pool
    pool.reset()


@pytest.mark.gpu
def test_cuda_decode_steps_with_two_caches(cuda_pool):
    steps = Steps(cuda_pool, device="cuda")
    a, a_twin, b, b_twin = (steps.cache() for _ in range(4))
    with torch.no_grad():
        kept = []
        for _ in range(5):
            out = steps.check(a, a_twin)
            kept.append((out, out.clone()))
        for _ in range(3):
            steps.check(b, b_twin)
        for _ in range(2):
            steps.check(a, a_twin)
            steps.check(b, b_twin)
    for out, copy in kept:
        assert torch.equal(out, copy)
    assert a[1].item() == 6
    assert cuda_pool.captures["test"] == 2
    assert not cuda_pool.stood_aside
    keys = StorageWeakRef(a[0].untyped_storage())
    assert not keys.expired()
    del a
    assert keys.expired()


class Layer(torch.nn.Module):
    """A residual block with a cache, large enough for cuBLAS to want its workspace."""

    def __init__(self, width):
        super().__init__()
        self.up, self.down = torch.nn.Linear(width, 2 * width), torch.nn.Linear(2 * width, width)

    def weights(self):
        return [self.up.weight, self.up.bias, self.down.weight, self.down.bias]


def layer_step(up, up_bias, down, down_bias, keys, length, x):
    length.add_(1)
    linear = torch.nn.functional.linear
    keys.index_copy_(0, length, linear(linear(x, up, up_bias).relu(), down, down_bias)[None])
    return [x + keys.mean(0)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_chain_with_recaptures(cuda_pool, dtype):
    """Two KV caches, lent outputs: captures for the second must leave those of the first be."""
    width, count, batch = 256, 3, 16
    modules = [Layer(width).to("cuda", dtype) for _ in range(count)]
    layers = [
        graphed(
            layer_step,
            cuda_pool,
            static=range(4),
            mutated=[4, 5],
            name=f"layer{i}",
            borrow_outputs=True,
        )
        for i in range(count)
    ]
    head = graphed(lambda x: [x.float().sum(-1)], cuda_pool, name="head")

    def caches():
        return [
            (
                torch.zeros(SLOTS, batch, width, device="cuda", dtype=dtype),
                torch.full((1,), -1, device="cuda"),
            )
            for _ in range(count)
        ]

    def run(calls, end, cache, x):
        for call, module, kv in zip(calls, modules, cache, strict=True):
            (x,) = call(*module.weights(), *kv, x)
        return end(x)[0]

    sets = [(caches(), caches()) for _ in range(2)]
    order = [0, 0, 0, 1, 1, 1, 0, 1, 0, 1]
    with torch.no_grad():
        for which in order:
            ours, plain = sets[which]
            x = torch.randn(batch, width, device="cuda", dtype=dtype)
            actual = run(layers, head, ours, x)
            expected = run([layer_step] * count, lambda x: [x.float().sum(-1)], plain, x)
            assert_close("head", actual, expected, 1e-5 if dtype is torch.float32 else 2e-2)
            for (keys, length), (plain_keys, plain_length) in zip(ours, plain, strict=True):
                assert_close("keys", keys, plain_keys, 1e-5 if dtype is torch.float32 else 2e-2)
                assert torch.equal(length, plain_length)
    assert {cuda_pool.captures[f"layer{i}"] for i in range(count)} == {2}
    assert not cuda_pool.stood_aside


@pytest.mark.gpu
def test_cuda_captures_run_nothing_on_another_stream(cuda_pool):
    """The profiler sees kernels of the warm-up, the copies in and the replay on one stream, and none beside."""
    step = graphed(lambda w, x: [(w @ x).sin()], cuda_pool, static=[0])
    weight, x = torch.randn(64, 64, device="cuda"), torch.randn(64, 8, device="cuda")
    torch.cuda.synchronize()
    with torch.no_grad(), torch.profiler.profile() as profile:
        for _ in range(3):
            step(weight, x)
        torch.cuda.synchronize()
    assert cuda_pool.captures["test"] == 1
    events = profile.profiler.kineto_results.events()
    kernels = [e for e in events if e.device_type() == torch.autograd.DeviceType.CUDA]
    assert len(kernels) > 4 and len({e.device_resource_id() for e in kernels}) == 1


@pytest.mark.gpu
def test_cuda_evictions_leave_other_graphs_their_workspace(cuda_pool):
    """Graphs of one stream come and go around one that uses cuBLAS; its answers stay right."""
    n = 512
    weight = torch.randn(n, n, device="cuda", dtype=torch.bfloat16)
    stays = graphed(lambda w, x: [x @ w], cuda_pool, static=[0], name="stays")
    comes = graphed(lambda w, x: [x @ w], cuda_pool, static=[0], name="comes", max_captures=1)
    x = torch.randn(8, n, device="cuda", dtype=torch.bfloat16)
    others = [torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    with torch.no_grad():
        for other in others:
            for _ in range(PAYBACK + 2):
                assert_close("comes", comes(other, x)[0], x @ other, 1e-2)
                assert_close("stays", stays(weight, x)[0], x @ weight, 1e-2)
            torch.cuda.empty_cache()
            filler = [torch.full((1 << 20,), 7.0, device="cuda") for _ in range(16)]
            assert_close("stays", stays(weight, x)[0], x @ weight, 1e-2)
            assert all((f == 7).all() for f in filler)
    assert cuda_pool.captures == {"stays": 1, "comes": 4}


@pytest.mark.gpu
def test_cuda_failed_capture_leaves_everything_usable(cuda_pool):
    def fn(keys, x):
        keys.add_(1)
        if x.sum().item() > 1e9:  # a synchronisation: not allowed during a capture
            keys.zero_()
        return [keys + x]

    step = graphed(fn, cuda_pool, mutated=[0], name="syncs")
    keys, x = torch.zeros(4, device="cuda"), torch.ones(4, device="cuda")
    stream = torch.cuda.current_stream()
    with torch.no_grad():
        for i in range(1, 5):
            assert step(keys, x)[0].tolist() == [i + 1] * 4
    assert torch.cuda.current_stream() == stream
    assert sum(cuda_pool.stood_aside.values()) == 3
    fine = graphed(lambda x: [x * 2], cuda_pool, name="fine")
    for _ in range(3):
        assert fine(x)[0].tolist() == [2] * 4
    assert cuda_pool.captures == {"fine": 1}


@pytest.mark.gpu
def test_cuda_stands_aside_inside_an_outer_capture(cuda_pool):
    steps = Steps(cuda_pool, device="cuda")
    cache, twin = steps.cache(), steps.cache()
    with torch.no_grad():
        for _ in range(3):
            steps.check(cache, twin)
        x = torch.randn(WIDTH, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            (out,) = steps.step(steps.weight, *cache, x)
        assert cache[1].item() == 2
        for _ in range(2):
            graph.replay()
            (expected,) = decode(steps.weight, *twin, x)
            assert_close("outer", out, expected, 1e-5)
            assert_close("keys", cache[0], twin[0], 1e-5)
        assert cache[1].item() == 4
    assert cuda_pool.stood_aside == {("test", "the current stream is capturing already"): 1}


@pytest.mark.gpu
def test_cuda_streams(cuda_pool):
    step = graphed(lambda x: [(x @ x).relu().sum(1)], cuda_pool)
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    with torch.no_grad():
        results = []
        for i in range(12):
            with torch.cuda.stream(streams[i % 3]):
                x = torch.randn(256, 256, device="cuda")
                results.append((x, step(x)[0]))
        torch.cuda.synchronize()
        for x, out in results:
            assert_close("stream", out, (x @ x).relu().sum(1), 1e-4)
    assert cuda_pool.captures["test"] == 1


@pytest.mark.gpu
def test_cuda_random_numbers_differ_between_replays(cuda_pool):
    step = graphed(lambda x: [torch.rand_like(x)], cuda_pool)
    x = torch.ones(64, device="cuda")
    drawn = [step(x)[0] for _ in range(5)]
    assert len({tuple(d.tolist()) for d in drawn}) == 5


@pytest.mark.gpu
def test_cuda_cpu_scalar_and_expanded_mask(cuda_pool):
    step = graphed(lambda x, s: [x * s], cuda_pool, name="scalar")
    x = torch.ones(4, device="cuda")
    for i in range(4):
        assert step(x, torch.tensor(float(i)))[0].tolist() == [i] * 4
    assert not cuda_pool.captures
    masked = graphed(lambda x, m: [x.masked_fill(m, 0)], cuda_pool, name="mask")
    for i in range(4):
        mask = (torch.arange(4, device="cuda") == i)[None].expand(3, 4)
        assert torch.equal(masked(x.expand(3, 4), mask)[0], (~mask).float())
    assert cuda_pool.captures == {"mask": 1}


@pytest.mark.gpu
def test_cuda_reset_gives_the_memory_back(cuda_pool):
    step = graphed(lambda x: [(x * 2).relu() + 1], cuda_pool)
    x = torch.ones(1 << 22, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for _ in range(3):
        step(x)
    cuda_pool.reset()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before + (2 << 20)
    for _ in range(3):
        assert (step(x)[0] == 3).all()
    assert cuda_pool.captures["test"] == 2


@pytest.mark.gpu
def test_cuda_compiled_callable(cuda_pool):
    """Inductor's own code under the graph, with a written input."""

    def fn(keys, length, x):
        length.add_(1)
        keys.index_copy_(0, length, (x * 2)[None])
        return [torch.softmax(keys.sum(0) + x, -1)]

    compiled = torch.compile(fn, fullgraph=True)
    step = graphed(compiled, cuda_pool, mutated=[0, 1])
    ours = torch.zeros(SLOTS, 64, device="cuda"), torch.full((1,), -1, device="cuda")
    plain = tuple(t.clone() for t in ours)
    with torch.no_grad():
        for _ in range(5):
            x = torch.randn(64, device="cuda")
            assert_close("out", step(*ours, x)[0], fn(*plain, x)[0], 1e-5)
            assert_close("keys", ours[0], plain[0], 1e-5)
            assert torch.equal(ours[1], plain[1])
    assert cuda_pool.captures["test"] == 1
    assert not cuda_pool.stood_aside
