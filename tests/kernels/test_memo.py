"""Launches that are told again: the same to Triton as when they are worked out anew."""

from __future__ import annotations

import itertools

import pytest
import torch
from harness import assert_close
from opcases import Kernel, gapped, gapped_weights, made, streamed_only

from fsvd_compile.kernels import (
    _linear,
    _memo,
    _stream,
    _triton,
    _tuning,
    expand_reference,
    expand_rms_triton,
    expand_triton,
    shrink_reference,
    shrink_rms_triton,
    shrink_triton,
)
from fsvd_compile.kernels._gemv import _gemv
from fsvd_compile.kernels._skinny import _norm_rows
from fsvd_compile.kernels._stream_few import _stream_few

BF16, CPU = torch.bfloat16, torch.device("cpu")
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


def behind(rows, k):
    """Behind eight rows of others, in the same memory."""
    return empty(rows + 8, k)[8:]


def expand(
    tokens, ranks=(1024, 512), rows=(4096, 1024), act="none", residual=False, weight=empty, z=empty
):
    def run(z=z):
        z, n = z(tokens, sum(ranks)), rows[0] if act.endswith("_mul") else sum(rows)
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
    "few-slices-behind": expand(32, (1024, 512), (4096, 2048), weight=behind, z=behind),
    "few-gated": expand(8, (1488, 1488), (11008, 11008), "gelu_mul"),
    "few-residual": expand(16, (1024,), (4096,), residual=True),
    "carried": carried(8),
    "few-two": shrink(2, norm=NORM, bias=True),
    "gemv": shrink(2, norm=NORM, bias=True, weight=odd),
    "gemv-unaligned": expand(1, (256,), (512,), weight=odd),
    "skinny": expand(8, (819, 819), (2048, 2048), "silu_mul"),
    "skinny-norm": shrink(9, k=1000, rows=(100,), norm=("layer", 1e-5, 0.0)),
    "two launches": shrink(1, rows=(1024,) * 5),
}  # fmt: skip


def counted(monkeypatch):
    """As long as launches were worked out often."""
    worked_out = []
    launch = _memo.launch
    monkeypatch.setattr(
        _memo, "launch", lambda key, tensors, anew: launch(key, tensors, lambda: worked_out.append(1) or anew())
    )  # fmt: skip
    return worked_out


@pytest.fixture
def told(hopper, monkeypatch):
    """What launches would tell Triton, and how often they were worked out."""
    launches, worked_out = [], counted(monkeypatch)
    monkeypatch.setattr(_triton, "require_triton", lambda tensor: None)

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
def test_two_tokens_by_each_of_their_kernels(told):
    launches, _ = told
    for case, kernels in {"few-two": [_norm_rows, _stream_few], "gemv": [_gemv]}.items():
        launches.clear()
        CASES[case]()
        assert [kernel for kernel, *_ in launches] == kernels


@pytest.mark.skipif(_stream.gluon is None, reason="Triton without Gluon")
def test_a_bias_that_is_copied_is_not_read_ahead(told):
    launches, _ = told
    x, w = empty(1, 4096), empty(1024, 4096)
    for bias in (empty(1024), empty(2048)[::2], empty(1).expand(1024)):
        shrink_triton(x, [w], [bias], pdl=True)
        expand_triton(x, [w], [bias], [0], pdl=True)
    assert [pdl for *_, pdl, _ in launches] == [True, True, False, False, False, False]
    for *_, given in launches:
        assert given["BIAS"][0].stride() == (1,)


def test_an_answer_is_remembered_by_how_tensors_lie(hopper):
    asked = []

    def answer(key, *tensors):
        return _memo.answer(key, tensors, lambda: asked.append(key) or len(asked))

    x = empty(2, 64)
    assert [answer("a", x), answer("a", x), answer("a", empty(2, 64))] == [1, 1, 1]
    assert answer("b", x) == 2 and answer("a", empty(2, 128)[:, :64]) == 3
    assert answer("a", empty(65 * 2)[1:129].view(2, 64)) == 4  # another distance from 16 bytes
    _memo.forget()
    assert answer("a", x) == 5


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
    assert run(out=empty(1, 1024)[:, :512]) == 1
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


def test_views_are_taken_where_they_lie_now(told):
    """x of a few tokens is told slice by slice; it may lie elsewhere in its memory the next time."""
    launches, worked_out = told
    weights = [empty(4096, 1024), empty(2048, 512)]
    for rows in (0, 8, 16):
        memory = empty(64, 1536)
        z = memory[rows : rows + 32]
        expand_triton(z, weights, [None] * 2, [0, 1024], None, pdl=True)
        maps = [launches[-1][4][name].base for name in ("X0", "X1")]
        assert [m.data_ptr() - z.data_ptr() for m in maps] == [0, 2048]
    assert len(worked_out) == 1


def test_weights_of_one_memory(told):
    launches, worked_out = told
    for count in (1, 1):
        memory = empty(2, 1024, 1024)
        shrink_triton(empty(1, 1024), list(memory), [None] * 2, pdl=True)
        maps = [launches[-1][4][name].base for name in ("W0", "W1")]
        assert [m.data_ptr() - memory.data_ptr() for m in maps] == [0, 2 << 20]
        assert len(worked_out) == count


def test_every_argument_that_is_no_tensor_counts(told):
    """Calls that differ in one thing alone."""
    launches, worked_out = told

    def new(run):
        before = len(worked_out)
        run()
        return len(worked_out) - before

    z, weights, out = empty(8, 2048), [empty(1024, 1024), empty(1024, 1024)], empty(8, 2048)

    def linear(offsets=(0, 1024), norm=("none", None, None, 0.0, 0.0), x=z, w=weights, **given):
        _linear.linear(
            "expand",
            x,
            w,
            [None] * 2,
            offsets,
            out,
            phase=_linear.Phase.FEW,
            pdl=True,
            norm=norm,
            **given,
        )

    assert new(linear) == 1 and new(linear) == 0
    few = z[:5]
    assert new(lambda: linear(x=few)) == 1 and launches[-1][4]["M"] == 5
    assert new(lambda: linear(offsets=(0, 512))) == 1
    assert launches[-1][4]["X1"].base.data_ptr() - z.data_ptr() == 1024
    half = [w.half() for w in weights]
    assert new(lambda: linear(x=z.half(), w=half)) == 1

    sums, g = empty(32, 8, dtype=torch.float32), empty(1024)
    x, w, y = empty(8, 1024), [empty(1024, 1024)], empty(8, 1024)
    for kind, count in (("rms", 1), ("layer", 1), ("rms", 0)):
        run = lambda kind=kind: _linear.linear(  # noqa: E731
            "shrink", empty(1, 1024), w, [None], [0], empty(1, 1024), phase=_linear.Phase.DECODE, pdl=True,
            norm=(kind, g, None, 1e-5, 0.0),
        )  # fmt: skip
        assert new(run) == count and launches[-1][4]["NORM"] == kind
    assert new(lambda: shrink_rms_triton(x, sums, w, [None], 1e-5, pdl=True)) == 1
    for offset, count in ((0, 1), (1.0, 1), (0.5, 1), (1.0, 0)):
        carry = _linear.Carry(g, offset, empty(8, 1024), empty(32, 8, dtype=torch.float32))
        run = lambda carry=carry: _linear.linear(  # noqa: E731
            "expand", x, w, [None], [0], y, phase=_linear.Phase.FEW, pdl=True, carry=carry
        )
        assert new(run) == count and launches[-1][4]["norm_offset"] == offset


def test_what_an_address_is_a_multiple_of(told):
    """Of 16 bytes, wherever the memory itself begins: not of 8, and not by the offset into it."""
    _, worked_out = told
    memory = torch.empty(2048 * 2 + 64, dtype=torch.uint8)
    first = -memory.data_ptr() % 16
    x = [memory[first + at :][: 2 * 1024].view(BF16).view(1, 1024) for at in (0, 8, 16)]
    w, out = empty(512, 1024), empty(1, 512)
    own = torch.frombuffer(memory.numpy().data, dtype=BF16, offset=first + 8, count=1024).view(
        1, 1024
    )
    assert own.data_ptr() % 16 == 8 and own.storage_offset() == 0
    counts = []
    for one in (x[0], own, *x):
        before = len(worked_out)
        _linear.linear("shrink", one, [w], [None], [0], out, phase=_linear.Phase.DECODE, pdl=True)
        counts.append(len(worked_out) - before)
    assert counts == [1, 1, 0, 0, 0]


def test_kernels_that_are_compiled_ahead_are_not_remembered(told):
    """What stands in for a tensor there has no address."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    launches, _ = told
    run = shrink(1, norm=NORM)
    with FakeTensorMode(), _triton.compiling_only():
        run()
    assert launches and not _memo._known
    launches.clear()
    run()
    (first,), _ = list(launches), launches.clear()
    run()
    (again,) = launches
    for told_ in (first, again):
        assert isinstance(told_[4]["W0"].base, torch.Tensor) and told_[4]["W0"].base.data_ptr()


def test_what_triton_is_given(hopper, monkeypatch):
    """The launcher's own record, through to the kernel."""
    kernel = Kernel()
    monkeypatch.setattr(_stream, "_stream", kernel)
    monkeypatch.setattr(_triton, "require_triton", lambda tensor: None)
    worked_out = counted(monkeypatch)
    run = shrink(1, rows=(1024,))
    run(), run()
    assert len(worked_out) == 1
    first, again = kernel.given
    assert first["grid"] == again["grid"] == (first["N"][0] // first["BLOCK_R"],)
    assert first.keys() == again.keys()
    assert first["USE_PDL"] and first["launch_pdl"] and again["launch_pdl"] and again["USE_PDL"]
    assert first["X"] is not again["X"] and first["NUM_K"] == again["NUM_K"]


def test_a_tile_that_another_thread_tries_is_not_remembered(told, monkeypatch):
    """Or that was read from a table before it was looked at again."""
    _, worked_out = told
    tile_of = _tuning._linear_tile
    for change in (
        lambda: setattr(_tuning, "_forced", _tuning.Tile(16, 512, 4, 1, 2)),
        _tuning.forget,
    ):
        _memo.forget()
        before = len(worked_out)
        with monkeypatch.context() as patch:
            patch.setattr(_tuning, "_forced", None)
            patch.setattr(_tuning, "linear_tile", lambda *a, c=change: (tile_of(*a), c())[0])
            shrink(1)()
        assert not _memo._known
        shrink(1)(), shrink(1)()
        assert len(worked_out) == before + 2


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
        for _ in range(3):
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
    _, worked_out = told
    monkeypatch.setattr(_memo, "MOST", 3)
    for rows in range(512, 552, 8):
        shrink(1, rows=(rows,))()
        assert len(_memo._known) <= 3
        shrink(1, rows=(512,))()  # used all the time, so it stays
    assert len(worked_out) == 5


def test_another_launcher(told, monkeypatch):
    """One that notes nothing down is asked each time."""
    _, worked_out = told
    launched = []
    monkeypatch.setattr(_triton, "launch", lambda *a, **k: launched.append(k))
    run = shrink(1)
    run(), run()
    assert len(launched) == len(worked_out) == 2


def test_tensors_in_a_list(monkeypatch):
    """As in a tuple: one that stayed from the first call would be read in every later one."""
    kernel = Kernel()

    def run(*tensors):
        _memo.launch(
            "list", tensors, lambda: _triton.launch(kernel, (1,), CPU, False, W=[*tensors], N=[3])
        )
        return kernel.given[-1]

    for _ in range(3):
        a, b = empty(8), empty(8)
        given = run(a, b)
        assert given["W"][0] is a and given["W"][1] is b and given["N"] == [3]
    assert len(_memo._known) == 1


@pytest.mark.gpu
@streamed_only
@pytest.mark.parametrize("tokens", (1, 2, 5, 8, 24, 40))
def test_values(tokens):
    """Of tensors that the launch was not worked out for."""
    with pytest.MonkeyPatch.context() as patch:
        worked_out = counted(patch)
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
