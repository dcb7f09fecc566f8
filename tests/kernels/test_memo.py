"""Launches that are told again: the same to Triton as when they are worked out anew."""

from __future__ import annotations

import itertools

import pytest
import torch
from harness import assert_close
from opcases import gapped, gapped_weights, made, streamed_only

from fsvd_compile.kernels import (
    _linear,
    _memo,
    _stream,
    _stream_few,
    _triton,
    _tuning,
    expand_reference,
    expand_rms_triton,
    expand_triton,
    shrink_reference,
    shrink_rms_triton,
    shrink_triton,
)

BF16 = torch.bfloat16
NORM = ("rms", 1e-5, 0.5)


def empty(*shape, dtype=BF16):
    return torch.empty(*shape, dtype=dtype)


def odd(rows, k):
    """Rows that begin two bytes behind a multiple of 16."""
    return empty(rows * k + 1)[1:].view(rows, k)


def shrink(
    tokens, k=4096, rows=(1024, 512, 512), norm=("none", 0.0, 0.0), bias=False, weight=empty
):
    def run():
        kind, eps, offset = norm
        x = empty(tokens, 2 * k)[:, :k] if tokens % 2 else empty(tokens, k)
        g = None if kind == "none" else empty(k)
        biases = [empty(n) if bias and i else None for i, n in enumerate(rows)]
        weights = [weight(n, k) for n in rows]
        shrink_triton(x, weights, biases, kind, g, None, eps, offset, pdl=True)

    return run


def expand(tokens, ranks=(1024, 512), rows=(4096, 1024), act="none", residual=False, weight=empty):
    def run():
        z, n = empty(tokens, sum(ranks)), rows[0] if act.endswith("_mul") else sum(rows)
        weights = [weight(m, r) for m, r in zip(rows, ranks, strict=True)]
        offsets = [sum(ranks[:i]) for i in range(len(ranks))]
        beside = empty(tokens, n) if residual else None
        expand_triton(z, weights, [None] * len(rows), offsets, beside, act, pdl=True)

    return run


def carried(tokens):
    def run():
        x, sums = empty(tokens, 4096), empty(128, tokens, dtype=torch.float32)
        shrink_rms_triton(x, sums, [empty(1024, 4096)] * 1, [None], 1e-5, pdl=True)
        expand_rms_triton(
            empty(tokens, 1024),
            empty(4096, 1024),
            None,
            0,
            empty(tokens, 4096),
            empty(4096),
            pdl=True,
        )

    return run


CASES = {
    "stream": shrink(1, norm=NORM),
    "stream-bias": shrink(1, bias=True),
    "stream-odd": expand(1, (1031,), (4096,), residual=True),
    "stream-gated": expand(1, (1488, 1488), (11008, 11008), "silu_mul"),
    "stream-tail": expand(1, (1488,), (4096,)),
    "few": shrink(8),
    "few-norm": shrink(8, norm=("rms", 1e-5, 0.0)),
    "few-slices": expand(32, (1024, 512), (4096, 2048)),
    "few-gated": expand(8, (1488, 1488), (11008, 11008), "gelu_mul"),
    "few-residual": expand(16, (1024,), (4096,), residual=True),
    "carried": carried(8),
    "gemv": shrink(2, norm=NORM, bias=True),
    "gemv-unaligned": expand(1, (256,), (512,), weight=odd),
    "skinny": expand(8, (819, 819), (2048, 2048), "silu_mul"),
    "skinny-norm": shrink(9, k=1000, rows=(100,), norm=("layer", 1e-5, 0.0)),
    "two launches": shrink(1, rows=(1024,) * 5),
}  # fmt: skip


@pytest.fixture
def told(hopper, monkeypatch):
    """What launches would tell Triton, and how often they were worked out."""
    launches, worked_out = [], []
    anew = _linear._launch_anew
    monkeypatch.setattr(_triton, "require_triton", lambda tensor: None)
    monkeypatch.setattr(_linear, "_launch_anew", lambda *a: worked_out.append(1) or anew(*a))

    def launch(kernel, grid, device, pdl, **kwargs):
        if (recorded := _triton._told.get()) is not None:
            recorded.append((kernel, grid, device, pdl, dict(kwargs)))
        launches.append((kernel, grid, device, pdl, kwargs))

    monkeypatch.setattr(_triton, "launch", launch)
    return launches, worked_out


def flat(launch):
    """A launch with its tensors replaced by their places: (memory, offset, size, stride, dtype)."""

    def seen(value):
        if isinstance(value, torch.Tensor):
            at = value.untyped_storage().data_ptr(), value.storage_offset()
            return "tensor", *at, tuple(value.shape), value.stride(), value.dtype
        if isinstance(value, (tuple, list)):
            return type(value), *map(seen, value)
        if isinstance(getattr(value, "base", None), torch.Tensor):
            return type(value), *((name, seen(v)) for name, v in sorted(vars(value).items()))
        return value

    kernel, grid, device, pdl, kwargs = launch
    return kernel, grid, device, pdl, {name: seen(value) for name, value in kwargs.items()}


@pytest.mark.skipif(_stream.gluon is None, reason="Triton without Gluon")
@pytest.mark.parametrize("case", CASES)
def test_told_again_as_when_worked_out(case, told, monkeypatch):
    """Both see tensors that are made in the same order, of which each has its own memory."""
    launches, worked_out = told
    kept = []
    for owner, name in ((torch, "empty"), (torch.Tensor, "new_empty")):
        make = getattr(owner, name)
        keeping = lambda *a, make=make, **k: kept.append(make(*a, **k)) or kept[-1]  # noqa: E731
        monkeypatch.setattr(owner, name, keeping)
    CASES[case]()
    first, tensors = list(map(flat, launches)), list(kept)
    count = len(worked_out)
    assert count and len(first) >= count
    launches.clear(), kept.clear()
    CASES[case]()
    assert len(worked_out) == count, "not told again"
    again = list(map(flat, launches))
    moved = {
        a.untyped_storage().data_ptr(): b.untyped_storage().data_ptr()
        for a, b in zip(tensors, kept, strict=True)
    }
    assert len(moved) == len(tensors) and not moved.keys() & set(moved.values())

    def there(value):
        if isinstance(value, tuple):
            if value[:1] == ("tensor",):
                return ("tensor", moved[value[1]], *value[2:])
            return tuple(map(there, value))
        return {k: there(v) for k, v in value.items()} if isinstance(value, dict) else value

    assert [there(launch) for launch in first] == again
    assert "tensor" in str(again)


def test_what_lies_otherwise_is_worked_out(told):
    _, worked_out = told
    x, w = empty(1, 1024), empty(512, 1024)
    out = empty(1, 512)

    def run(x=x, w=w, out=out, norm=("none", None, None, 0.0, 0.0), **given):
        before = len(worked_out)
        phase = given.pop("phase", _linear.Phase.DECODE)
        biases = given.pop("biases", [None])
        _linear.linear(
            "shrink",
            x,
            [w],
            biases,
            [0],
            out,
            phase=phase,
            pdl=given.pop("pdl", True),
            norm=norm,
            **given,
        )
        return len(worked_out) - before

    assert run() == 1 and run() == 0
    assert run(x=empty(1, 1024), w=empty(512, 1024), out=empty(1, 512)) == 0
    assert run(x=empty(1025)[1:].view(1, 1024)) == 1  # its address is no multiple of 16 bytes
    assert run(w=empty(1024, 512).t()) == 1
    assert run(w=empty(512, 2048)[:, :1024]) == 1
    assert run(out=empty(1, 1024)[:, :512]) == (0 if out.stride() == (1024, 1) else 1)
    assert run(biases=[empty(512)]) == 1
    assert run(pdl=False) == 1
    assert run(residual=empty(1, 512)) == 1
    assert run(activation="silu") == 1
    for norm in (1e-5, 0.0), (1e-6, 0.0), (1e-5, 1.0):
        given = ("rms", empty(1024), None, *norm)
        assert run(norm=given) == 1 and run(norm=given) == 0
    assert run() == 0
    _tuning.forget()  # a table may have other tiles
    assert run() == 1


def test_the_same_tensor_twice_is_not_remembered(told):
    """Which of the two an argument was cannot be told from it."""
    _, worked_out = told
    w = empty(512, 1024)
    for expected in (1, 2):
        shrink_triton(empty(1, 1024), [w, w], [None, None])
        assert len(worked_out) == expected


def test_a_view_of_memory_that_two_have_is_not_remembered(told):
    """x of a few tokens is copied slice by slice, and a slice may be either's."""
    _, worked_out = told
    for expected in (1, 2):
        both = empty(8, 6144)
        x, residual = both[:, :2048], both[:, 2048:]
        weights = [empty(2048, 1024), empty(2048, 1024)]
        expand_triton(x, weights, [None] * 2, [0, 1024], residual)
        assert len(worked_out) == expected


def test_nothing_is_remembered_while_tiles_are_tried(told):
    _, worked_out = told
    run = shrink(1)
    for tile in _tuning.Tile(4, 256, 4), _tuning.Tile(8, 256, 4):
        with _tuning.forced(tile):
            run()
    with _tuning.forced(lambda launch: _tuning.Tile(4, 512, 4)):
        run()
    with _tuning.recording() as asked:
        run()
    run()
    assert len(asked) == 1 and len(worked_out) == 5
    run()
    assert len(worked_out) == 5


def test_no_tensor_is_kept(told):
    import gc
    import weakref

    made = []
    make = torch.empty
    run = shrink(8, norm=("rms", 1e-5, 0.0))
    try:
        torch.empty = lambda *a, **k: made.append(make(*a, **k)) or made[-1]
        run()
    finally:
        torch.empty = make
    assert _memo._known and all(_memo._known.values())
    told[0].clear()
    there = [weakref.ref(t) for t in made]
    made.clear()
    gc.collect()
    assert there and not any(ref() is not None for ref in there)


def test_few_are_kept(told, monkeypatch):
    monkeypatch.setattr(_memo, "MOST", 3)
    for rows in range(512, 552, 8):
        shrink(1, rows=(rows,))()
        assert len(_memo._known) <= 3


@pytest.mark.gpu
@streamed_only
@pytest.mark.parametrize("tokens", (1, 2, 5, 8, 24, 40))
def test_values(tokens):
    """Of tensors that the launch was not worked out for."""
    worked_out = []
    anew = _linear._launch_anew
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_linear, "_launch_anew", lambda *a: worked_out.append(1) or anew(*a))
        for turn, (k, rows) in itertools.product(
            range(3), ((2048, (1024, 520)), (1488, (2056, 2056)))
        ):
            count = len(worked_out)
            x, weights = gapped(tokens, k), gapped_weights(rows, (k, k))
            g, none = made(k), [None] * 2
            args = x, weights, none, "rms", g, None, 1e-5, 0.0
            assert_close("shrink", shrink_triton(*args, pdl=True), shrink_reference(*args), 6e-3)
            z, residual = gapped(tokens, 2 * k), made(tokens, sum(rows))
            args = z, weights, none, [0, k], residual, "none"
            assert_close("expand", expand_triton(*args, pdl=True), expand_reference(*args), 6e-3)
            assert (len(worked_out) == count) == (turn > 0)
    assert _stream_few.gluon is None or worked_out
