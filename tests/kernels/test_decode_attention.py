"""fsvd::decode_attention against its reference: ATen, the Triton kernels, the op; the caches it writes."""

from __future__ import annotations

import pytest
import torch
from harness import assert_close
from opcases import LIMITS
from test_attention import MASKS, mask_of

from fsvd_compile.errors import FactorError
from fsvd_compile.kernels import (
    _stream_attention,
    _triton,
    decode_attention_aten,
    decode_attention_reference,
    decode_attention_triton,
    mask_reach,
)

OP = torch.ops.fsvd.decode_attention.default
# (batch, query heads, KV heads, cache length, head dim, value head dim)
SHAPES = (
    (2, 6, 2, 100, 64, 64),
    (1, 3, 3, 200, 16, 16),
    (2, 3, 1, 130, 34, 33),
    (3, 2, 2, 70, 20, 14),
)
ARGUMENTS = pytest.mark.parametrize(
    "shape", SHAPES, ids=["B{}-Hq{}-Hkv{}-S{}-D{}-Dv{}".format(*s) for s in SHAPES]
)
ONE_TOKEN = tuple(m for m in MASKS if m != "rows")


def case(shape, mask="decode", *, position=57, dtype=torch.float32, device="cpu", table=1):
    """Arguments of one call: q, k and v as slices of a packed projection, caches of the usual order."""
    b, hq, hkv, s, d, dv = shape
    make = {"dtype": dtype, "device": device}
    packed = torch.randn(b, 1, hq * d + hkv * (d + dv), **make)
    q, k, v = packed.split((hq * d, hkv * d, hkv * dv), -1)
    q, k = (t.view(b, 1, -1, d).transpose(1, 2) for t in (q, k))
    v = v.view(b, 1, -1, dv).transpose(1, 2)
    cos, sin = (torch.randn(table, 1, d, device=device) for _ in range(2))
    caches = torch.randn(b, hkv, s, d, **make), torch.randn(b, hkv, s, dv, **make)
    at = torch.tensor([position], device=device)
    return q, k, v, cos, sin, *caches, at, mask_of(mask, b, hq, 1, s, dtype, device), 1.3 * d**-0.5


def check(run, args, limit):
    """Output and both caches; what is not the new row stays bitwise."""
    position = args[7].item()
    for cache in args[5:7]:  # whatever lies in the row that is written
        cache[:, :, position] = float("nan")
    before = args[5].clone(), args[6].clone()
    expected, keys, values = decode_attention_reference(*args)
    assert_close("o", run(*args), expected, limit)
    for name, cache, wanted, old in (
        ("keys", args[5], keys, before[0]),
        ("values", args[6], values, before[1]),
    ):
        assert_close(name, cache, wanted, limit)
        others = torch.arange(cache.shape[2], device=cache.device) != position
        assert torch.equal(cache[:, :, others], old[:, :, others]), name


@ARGUMENTS
@pytest.mark.parametrize("mask", ONE_TOKEN)
def test_aten(dtype, mask, shape):
    check(decode_attention_aten, case(shape, mask, dtype=dtype), LIMITS[dtype])


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("heads", "splits", "mask"),
    [(6, 3, mask) for mask in ONE_TOKEN] + [(2, 1, mask) for mask in ("decode", "additive")],
)
def test_triton_masks(heads, splits, mask, poisoned):
    args = case((2, heads, 2, 150, 16, 16), mask)
    check(lambda *a: decode_attention_triton(*a, splits=splits), args, 2e-6)


@ARGUMENTS
@pytest.mark.interpret
def test_triton(interpreted_dtype, shape, poisoned):
    args = case(shape, dtype=interpreted_dtype)
    check(decode_attention_triton, args, LIMITS[interpreted_dtype])


@pytest.mark.interpret
@pytest.mark.parametrize("position", (0, 63, 64, 65, 129))
@pytest.mark.parametrize("mask", ("none", "causal", "beyond"))
def test_positions(mask, position, poisoned):
    """First and last rows of blocks; a mask may show what the position does not promise."""
    args = list(case((1, 4, 2, 130, 16, 16), "none", position=position))
    if mask != "none":
        n = torch.arange(130)
        args[8] = ((n <= position) if mask == "causal" else (n >= position - 1))[None, None, None]
    check(lambda *a: decode_attention_triton(*a, splits=3), args, 2e-6)


@pytest.mark.interpret
@pytest.mark.parametrize("position", (0, 64))
@pytest.mark.parametrize("mask", ONE_TOKEN[1:])
def test_reach(mask, position, poisoned):
    """What is known of the mask beforehand changes nothing, whether the position promises less or more."""
    args = case((2, 2, 1, 130, 16, 16), mask, position=position)
    reach = mask_reach(args[8], 130)
    check(lambda *a: decode_attention_triton(*a, reach, splits=2), args, 2e-6)


@pytest.mark.interpret
@pytest.mark.parametrize("splits", (1, 2))
def test_what_the_mask_does_not_reach_is_not_looked_at(splits, poisoned):
    """Not even the mask itself: a promise, kept by who calls."""
    args = list(case((1, 2, 2, 1100, 16, 16), "none", position=60))
    args[8] = (torch.arange(1100) <= 60)[None, None, None]
    expected = decode_attention_reference(*args)[0]
    reach = mask_reach(args[8], 1100)
    assert reach.item() == 61
    args[8] = args[8].clone()
    args[8][..., 64:] = True
    args[5][:, :, 64:] = args[6][:, :, 64:] = float("nan")
    assert_close("o", decode_attention_triton(*args, reach, splits=splits), expected, 2e-6)
    assert decode_attention_triton(*args, splits=splits).isnan().all()


@pytest.mark.parametrize(
    ("mask", "length", "reach"),
    [
        (torch.tensor([[True, False, True, False]]), 4, 3),
        (
            torch.tensor([[True, False, False], [False, True, False]])[:, None, None],
            3,
            2,
        ),  # by sequence
        (torch.tensor([[False, True], [True, False]])[None, :, None], 2, 2),  # by head
        (
            torch.tensor([[0.0, float("-inf"), -1e30, float("-inf")]]),
            4,
            3,
        ),  # what is small is shown
        (torch.zeros(1, 5, dtype=torch.bool), 5, 0),
        (torch.ones(1, 1, dtype=torch.bool), 7, 7),  # one value for all rows
    ],
)
def test_mask_reach(mask, length, reach):
    found = mask_reach(mask, length)
    assert (found.dtype, found.item()) == (torch.int64, reach)


@pytest.mark.parametrize("given", ("int32", "two", "no mask"))
def test_reach_is_checked(given):
    args = list(case((1, 2, 2, 20, 16, 16)))
    reach = torch.zeros(2 if given == "two" else 1, dtype=torch.int32 if given == "int32" else None)
    if given == "no mask":
        args[8], reach = None, reach.long()
    elif given == "two":
        reach = reach.long()
    with pytest.raises(FactorError, match="mask_reach"):
        decode_attention_aten(*args, reach)


@pytest.mark.interpret
def test_what_the_position_does_not_reach_is_not_read(poisoned):
    args = list(case((1, 2, 2, 512, 16, 16), "none", position=60))
    args[8] = (torch.arange(512) <= 60)[None, None, None]
    args[5][:, :, 64:] = args[6][:, :, 64:] = float("nan")
    short = list(args)
    short[5], short[6], short[8] = args[5][:, :, :64], args[6][:, :, :64], args[8][..., :64]
    expected, *_ = decode_attention_reference(*short)
    assert_close("o", decode_attention_triton(*args, splits=2), expected, 2e-6)


@pytest.mark.interpret
@pytest.mark.parametrize("where", ("key", "new key"))
@pytest.mark.parametrize("value", (float("nan"), float("inf")))
@pytest.mark.parametrize("splits", (1, 2, 3))
def test_what_is_not_finite_comes_out(splits, value, where, poisoned):
    """A split that saw NaN is not one that saw nothing."""
    args = list(case((1, 2, 2, 80, 16, 16), "none"))
    if where == "key":
        args[5][:, :, 5] = value
    else:
        args[1] = torch.full_like(args[1], value)
    expected, *_ = decode_attention_reference(*args)
    actual = decode_attention_triton(*args, splits=splits)
    assert expected.isnan().all()
    assert actual.isnan().all()


@pytest.mark.interpret
@pytest.mark.parametrize("position", (-1, 100, 1000))
def test_a_position_outside_the_cache_writes_nothing(position, poisoned):
    args = case((1, 4, 2, 100, 16, 16), "none", position=position)
    before = args[5].clone(), args[6].clone()
    decode_attention_triton(*args)
    assert torch.equal(args[5], before[0])
    assert torch.equal(args[6], before[1])


@pytest.mark.interpret
def test_tables_by_sequence_and_other_strides(poisoned):
    args = list(case((2, 6, 2, 100, 16, 16), table=2))
    args[0] = args[0].transpose(1, 3).contiguous().transpose(1, 3)
    args[3] = args[3].transpose(1, 2).contiguous().transpose(1, 2)
    room = torch.randn(2, 100, 2, 16)
    args[5] = room.transpose(1, 2)
    check(decode_attention_triton, args, 2e-6)


def test_aten_equals_the_two_ops():
    args = case(SHAPES[0])
    caches = [c.clone() for c in args[5:7]]
    q = torch.ops.fsvd.rope_append(*args[:5], *caches, args[7])
    expected = torch.ops.fsvd.attention(q, *caches, args[8], args[9])
    assert torch.equal(OP(*args), expected)
    assert torch.equal(args[5], caches[0])


@pytest.mark.parametrize("mask", ("none", "decode"))
def test_opcheck(mask):
    torch.library.opcheck(OP, case(SHAPES[0], mask))
    args = list(case(SHAPES[2], mask))
    args[5] = args[5].transpose(1, 2).contiguous().transpose(1, 2)
    torch.library.opcheck(OP, args)


def test_errors():
    args = case(SHAPES[0])

    def call(**changed):
        names = ("q", "k", "v", "cos", "sin", "k_cache", "v_cache", "position", "mask", "scale")
        OP(**dict(zip(names, args, strict=True), **changed))

    with pytest.raises(FactorError, match="one token a sequence"):
        OP(
            *(t.expand(-1, -1, 2, -1) for t in args[:3]),
            *(t.expand(-1, 2, -1) for t in args[3:5]),
            *args[5:7],
            torch.arange(2),
            None,
            1.0,
        )
    with pytest.raises(FactorError, match="decode_attention: k has shape"):
        call(k=args[1][..., :32])
    with pytest.raises(FactorError, match="decode_attention: position is"):
        call(position=args[7].int())
    with pytest.raises(FactorError, match="decode_attention: mask has shape"):
        call(mask=torch.ones(2, 1, 1, 7, dtype=torch.bool))


@_triton.jit
def write_late(at, value, turns, USE_PDL: _triton.tl.constexpr):
    """Lets the next kernel start, and writes what that kernel reads much later."""
    if USE_PDL:
        _triton.tl.extra.cuda.gdc_launch_dependents()
    seen = _triton.tl.load(at, volatile=True)
    for _ in range(turns):
        seen = _triton.tl.load(at, volatile=True)
    _triton.tl.store(at, value + (seen & 0))


@pytest.mark.gpu
class TestGpu:
    @pytest.fixture(autouse=True, params=("streamed", "other"))
    def kernel(self, request, monkeypatch):
        """Both kernels, where the one that takes all of these takes what the streamed one would have."""
        takes, taken = _stream_attention.takes, []

        def asked(*args):
            taken.append(takes(*args))
            return taken[-1] and request.param == "streamed"

        monkeypatch.setattr(_stream_attention, "takes", asked)
        self.taken = taken
        yield
        if request.param == "other" and not any(taken):
            pytest.skip("the other run was of this kernel")

    @pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="not streamed here",
    )
    def test_what_is_streamed(self):
        def streams(dims=(128, 128), heads=(8, 2), mask="decode", dtype=torch.bfloat16, cache=None):
            args = list(case((2, *heads, 100, *dims), mask, dtype=dtype, device="cuda"))
            if cache is not None:
                args[5] = cache(args[5])
            self.taken.clear()
            OP(*args)
            return self.taken == [True]

        assert (
            streams()
            and streams(dtype=torch.float16)
            and streams((64, 128))
            and streams(mask="none")
        )
        assert (
            streams(heads=(16, 1)) and streams(heads=(5, 5)) and streams(heads=(8, 8), mask="heads")
        )
        assert not streams(heads=(17, 1)) and not streams(mask="heads")
        assert (
            not streams(dtype=torch.float32) and not streams((80, 80)) and not streams((256, 256))
        )
        assert streams(cache=lambda c: c.transpose(1, 2).contiguous().transpose(1, 2))
        wide = lambda c, more: torch.cat((c, c[..., :more]), -1)[..., :128]  # noqa: E731
        assert streams(cache=lambda c: wide(c, 8)) and not streams(cache=lambda c: wide(c, 4))

    @pytest.mark.parametrize("mask", ("bool", "float", "none"))
    @pytest.mark.parametrize("length", (2500, 4096))
    @pytest.mark.parametrize("splits", (None, 1, 2))
    def test_many_rows_a_program(self, splits, length, mask):
        """Rings that go round and the next thousand rows of a mask, all of which are seen here and there."""
        for heads, dtype in (((4, 2), torch.bfloat16), ((3, 3), torch.float16)):
            make = {"dtype": dtype, "device": "cuda"}
            args = list(case((2, *heads, length, 128, 128), "none", position=length - 1, **make))
            seen = torch.rand(2, 1, 1, length, device="cuda") > 0.4
            if mask == "bool":
                args[8] = seen
            elif mask == "float":
                args[8] = torch.where(seen, torch.randn(seen.shape, device="cuda"), float("-inf"))
                args[8] = args[8].to(dtype)
            check(lambda *a, n=splits: decode_attention_triton(*a, splits=n), args, LIMITS[dtype])

    @pytest.mark.parametrize("mask", ("column", "expanded", "matrix", "additive"))
    @pytest.mark.parametrize("heads", ((5, 1), (16, 1), (28, 4)))
    def test_masks_groups_and_layouts(self, heads, mask):
        make = {"dtype": torch.float16, "device": "cuda"}
        args = list(case((2, *heads, 300, 64, 128), mask, position=200, table=2, **make))
        args[5] = args[5].transpose(1, 2).contiguous().transpose(1, 2)
        check(lambda *a: decode_attention_triton(*a, splits=3), args, LIMITS[torch.float16])

    @pytest.mark.parametrize("splits", (1, 3))
    @pytest.mark.parametrize("position", (-1, 60, 300))
    def test_a_sequence_that_sees_nothing(self, position, splits):
        make = {"dtype": torch.bfloat16, "device": "cuda"}
        args = list(case((2, 8, 2, 300, 128, 128), "none", position=position, **make))
        args[8] = torch.zeros(2, 1, 1, 300, dtype=torch.bool, device="cuda")
        args[8][1, ..., :40] = True
        before = args[5].clone()
        actual = decode_attention_triton(*args, splits=splits)
        assert not actual[0].any() and actual[1].isfinite().all() and actual[1].any()
        assert torch.equal(args[5], before) == (position != 60)

    @pytest.mark.parametrize("heads", ((8, 8), (8, 2)))
    @pytest.mark.parametrize("dims", ((64, 64), (128, 64), (128, 128)))
    @pytest.mark.parametrize("length", (1, 65, 1000, 2500))
    def test_lengths(self, dims, heads, length):
        """Cut off at blocks and nowhere in particular."""
        for position in {0, length // 2, length - 1}:
            for mask in ("none", "decode", "additive"):
                shape = (3, *heads, length, *dims)
                args = case(shape, mask, position=position, dtype=torch.float16, device="cuda")
                for splits in (None, 3):
                    check(lambda *a, n=splits: decode_attention_triton(*a, splits=n), args, 2e-3)

    @pytest.mark.parametrize("mask", ("causal", "none", "beyond"))
    @pytest.mark.parametrize("position", (3, 64, 700))
    @pytest.mark.parametrize("splits", (None, 3))
    def test_a_position_that_is_written_late(self, splits, position, mask):
        """What is read ahead follows a number that the kernel before has not written yet."""
        make = {"dtype": torch.bfloat16, "device": "cuda"}
        args = list(case((2, 8, 2, 1100, 128, 128), "none", position=position, **make))
        if mask != "none":
            n = torch.arange(1100, device="cuda")
            args[8] = ((n <= position) if mask == "causal" else (n >= position))[None, None, None]
        expected, keys, values = decode_attention_reference(*args)
        decode_attention_triton(*args, pdl=True, read_ahead=True, splits=splits)  # compiled
        for guess in (0, 65, 1099):
            args[5].normal_()
            args[6].normal_()
            expected, keys, values = decode_attention_reference(*args)
            args[7].fill_(guess)
            torch.cuda.synchronize()
            kwargs = {"at": args[7], "value": position, "turns": 20000}
            _triton.launch(write_late, (1,), args[0].device, True, **kwargs)
            actual = decode_attention_triton(*args, pdl=True, read_ahead=True, splits=splits)
            assert_close("o", actual, expected, 1e-2)
            assert_close("keys", args[5], keys, 1e-2)
            assert_close("values", args[6], values, 1e-2)

    @pytest.mark.parametrize("splits", (None, 1, 2))
    def test_what_lies_behind_the_position_is_not_seen(self, splits):
        make = {"dtype": torch.bfloat16, "device": "cuda"}
        args = list(case((2, 8, 2, 512, 128, 128), "none", position=60, **make))
        args[8] = (torch.arange(512, device="cuda") <= 60)[None, None, None]
        expected, *_ = decode_attention_reference(*args)
        args[5][:, :, 60:] = args[6][:, :, 60:] = float("nan")
        for reach in (None, mask_reach(args[8], 512)):
            actual = decode_attention_triton(*args, reach, splits=splits)
            assert_close("o", actual, expected, 1e-2)

    @pytest.mark.parametrize("where", ("key", "new key"))
    @pytest.mark.parametrize("splits", (1, 3))
    def test_what_is_not_finite_comes_out(self, splits, where):
        make = {"dtype": torch.bfloat16, "device": "cuda"}
        args = list(case((1, 4, 2, 200, 128, 128), "none", **make))
        if where == "key":
            args[5][:, :, 5] = float("nan")
        else:
            args[1] = torch.full_like(args[1], float("nan"))
        assert decode_attention_triton(*args, splits=splits).isnan().all()

    @pytest.mark.parametrize("position", (-1, 100, 1000))
    def test_a_position_outside_the_cache_writes_nothing(self, position):
        make = {"dtype": torch.bfloat16, "device": "cuda"}
        args = case((1, 4, 2, 100, 64, 64), "none", position=position, **make)
        before = args[5].clone(), args[6].clone()
        decode_attention_triton(*args)
        assert torch.equal(args[5], before[0])
        assert torch.equal(args[6], before[1])

    @pytest.mark.parametrize("mask", ("none", "decode", "heads", "additive", "finfo"))
    @pytest.mark.parametrize("heads", ((32, 32), (32, 8), (9, 3), (32, 1)))
    @pytest.mark.parametrize("dims", ((64, 64), (80, 80), (128, 128), (256, 256), (192, 128)))
    def test_op(self, dims, heads, mask):
        args = case((2, *heads, 1500, *dims), mask, dtype=torch.bfloat16, device="cuda")
        check(OP, args, 1e-2)
        if mask != "none":
            reach = mask_reach(args[8], 1500)
            check(lambda *a: OP(*a, reach), args, 1e-2)

    @pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
    @pytest.mark.parametrize("shape", SHAPES)
    def test_dtypes(self, shape, dtype):
        check(OP, case(shape, dtype=dtype, device="cuda"), LIMITS[dtype])

    @pytest.mark.parametrize("position", (0, 63, 64, 511, 4095))
    @pytest.mark.parametrize("mask", ("none", "causal", "beyond"))
    def test_positions(self, mask, position):
        shape = (1, 32, 8, 4096, 128, 128)
        make = {"dtype": torch.bfloat16, "device": "cuda"}
        args = list(case(shape, "none", position=position, **make))
        if mask != "none":
            n = torch.arange(4096, device="cuda")
            args[8] = ((n <= position) if mask == "causal" else (n >= position))[None, None, None]
            reach = mask_reach(args[8], 4096)
            check(lambda *a: OP(*a, reach), args, 1e-2)
        check(OP, args, 1e-2)

    @pytest.mark.parametrize("heads", ((32, 32), (32, 8)))
    @pytest.mark.parametrize("splits", (1, 4, None))
    def test_pdl_is_bitwise(self, splits, heads):
        results = []
        for pdl in (True, False):
            torch.manual_seed(1)
            args = case((1, *heads, 4096, 128, 128), dtype=torch.bfloat16, device="cuda")
            results.append(decode_attention_triton(*args, pdl=pdl, splits=splits))
        assert torch.equal(*results)

    @pytest.mark.parametrize("reaching", (True, False))
    def test_many_steps_in_a_graph(self, reaching):
        """Dependent launches one behind the other, each appending a row that the next ones read."""
        make = {"dtype": torch.bfloat16, "device": "cuda"}
        args = list(case((1, 8, 2, 256, 128, 128), "none", position=0, **make))
        args[8] = torch.zeros(1, 1, 1, 256, dtype=torch.bool, device="cuda")
        rows = torch.arange(256, device="cuda")
        positions = [rows[i : i + 1] for i in range(64)]
        masks = [(rows <= i)[None, None, None] for i in range(64)]
        wide = [c.double() for c in args[5:7]]
        OP(*args, mask_reach(args[8], 256))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs = [
                OP(*args[:7], p, m, args[9], mask_reach(m, 256) if reaching else None)
                for p, m in zip(positions, masks, strict=True)
            ]
        args[0].normal_()
        args[1].normal_()
        graph.replay()
        for i, out in enumerate(outs):
            wide_args = [*(t.double() for t in args[:5]), *wide, positions[i], masks[i], args[9]]
            expected, *wide = decode_attention_reference(*wide_args)
            assert_close(f"step {i}", out, expected, 2e-2)
