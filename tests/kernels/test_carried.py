"""expand_rms and shrink_rms: RMSNorm between an expand and a shrink, on a CPU by torch ops and on a GPU streamed."""

from __future__ import annotations

import pytest
import torch
from harness import assert_close
from opcases import gapped, gapped_weights, made, streamed_only, watch_streamed
from torch._subclasses.fake_tensor import FakeTensorMode

from fsvd_compile.errors import FactorError
from fsvd_compile.kernels import (
    _linear,
    _stream,
    _stream_few,
    _tuning,
    expand_reference,
    expand_rms_aten,
    expand_rms_triton,
    expand_triton,
    shrink_reference,
    shrink_rms_aten,
    shrink_rms_triton,
)

EPS = 1e-5
EXPAND, SHRINK = torch.ops.fsvd.expand_rms, torch.ops.fsvd.shrink_rms


def random(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape) * scale).to(dtype)


def both(expand, shrink, z, w, bias, residual, g, offset, weights, biases):
    """The residual stream and what a shrink reads of its norm."""
    y, scaled, squares = expand(z, w, bias, 8, residual, g, offset)
    return y, shrink(scaled, squares, weights, biases, EPS), scaled, squares


def expected(z, w, bias, residual, g, offset, weights, biases):
    y = expand_reference(z, [w], [bias], [8], residual)
    weights, biases, (g,) = (
        [None if t is None else t.float() for t in ts] for ts in (weights, biases, [g])
    )
    return y, shrink_reference(y, weights, biases, "rms", g, None, EPS, offset)


def operands(make, lead, n, rank, rows, dtype, weighted=True, whole=True):
    z = make(*lead, rank + 16, dtype=dtype)
    return (
        z,
        make(n, rank, dtype=dtype, scale=rank**-0.5),
        make(n, dtype=dtype) if whole else None,
        make(*lead, n, dtype=dtype) if whole else None,
        make(n, dtype=dtype) if weighted else None,
    ), (
        [make(r, n, dtype=dtype, scale=n**-0.5) for r in rows],
        [make(r, dtype=dtype) if i % 2 == 0 else None for i, r in enumerate(rows)],
    )


@pytest.mark.parametrize("weighted,offset", [(True, 0.0), (True, 1.0), (False, 0.0)])
@pytest.mark.parametrize("n", (31, 32, 100))
@pytest.mark.parametrize("lead", ((3,), (2, 1), (4, 3)), ids=str)
def test_on_a_cpu(lead, n, weighted, offset):
    first, last = operands(random, lead, n, 24, (7, 13), torch.float32, weighted)
    y, z, scaled, squares = both(EXPAND, SHRINK, *first, offset, *last)
    wanted = expected(*first, offset, *last)
    assert_close("y", y, wanted[0], 1e-6)
    assert_close("z", z, wanted[1], 1e-6)
    assert squares.shape == (-(-n // 32), y.numel() // n) and squares.dtype == torch.float32
    assert_close("squares", squares.sum(0), wanted[0].square().sum(-1).flatten(), 1e-6)
    assert len({t.untyped_storage().data_ptr() for t in (y, scaled, squares)}) == 3


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_on_a_cpu(dtype):
    first, last = operands(random, (5,), 96, 24, (16,), dtype)
    y, z, scaled, _ = both(EXPAND, SHRINK, *first, 0.0, *last)
    wanted = expected(*first, 0.0, *last)
    assert y.dtype == z.dtype == scaled.dtype == dtype
    assert_close("y", y, wanted[0], 1e-2)
    assert_close("z", z, wanted[1], 1e-2)


def test_fake_values():
    first, last = operands(random, (4, 3), 100, 24, (7, 13), torch.float32)
    real = both(EXPAND, SHRINK, *first, 0.0, *last)
    mode = FakeTensorMode()
    with mode:
        fake = [None if t is None else mode.from_tensor(t) for t in first]
        weights = [mode.from_tensor(t) for t in last[0]]
        biases = [None if t is None else mode.from_tensor(t) for t in last[1]]
        made = both(EXPAND, SHRINK, *fake, 0.0, weights, biases)
    for a, b in zip(made, real, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def test_no_kernel_carries_on_a_cpu():
    first, (weights, biases) = operands(random, (5,), 100, 24, (7,), torch.bfloat16)
    with pytest.raises(FactorError, match=r"5 tokens of torch.bfloat16 on cpu.*\[\(100, 24\)\]"):
        expand_rms_triton(*first[:3], 8, *first[3:])
    _, scaled, squares = expand_rms_aten(*first[:3], 8, *first[3:])
    with pytest.raises(FactorError, match="shrink_rms: no kernel carries"):
        shrink_rms_triton(scaled, squares, weights, biases, EPS)


def test_errors():
    first, (weights, biases) = operands(random, (5,), 100, 24, (7,), torch.float32)
    z, w, bias, residual, g = first
    with pytest.raises(FactorError, match=r"norm_weight has shape \(99,\).*\[100\]"):
        expand_rms_aten(z, w, bias, 8, residual, g[1:])
    with pytest.raises(FactorError, match="block 0 reads"):
        expand_rms_aten(z, w, bias, 17, residual, g)
    _, scaled, squares = expand_rms_aten(z, w, bias, 8, residual, g)
    with pytest.raises(FactorError, match=r"squares have shape \(4, 4\).*\[4, 5\]"):
        shrink_rms_aten(scaled, squares[:, 1:], weights, biases, EPS)
    with pytest.raises(FactorError, match="contiguous float32"):
        shrink_rms_aten(scaled, squares.double(), weights, biases, EPS)
    with pytest.raises(FactorError, match="contiguous float32"):
        shrink_rms_aten(scaled, squares.t().contiguous().t(), weights, biases, EPS)


@pytest.mark.skipif(_stream.gluon is None, reason="Triton without Gluon")
def test_what_carries(hopper):
    def carried(op="expand", tokens=8, k=1024, rows=(4096,), dtype=torch.bfloat16):
        weights = [torch.empty(n, k, dtype=dtype) for n in rows]
        x = torch.empty(tokens, k, dtype=dtype)
        return _linear.carries(op, x, weights, [0] * len(rows))

    assert all(carried(tokens=n) for n in (2, 3, 8, 17, 32))
    assert not any(carried(tokens=n) for n in (1, 9, 16, 33, 64, 65))
    assert not carried(dtype=torch.float16) and not carried(dtype=torch.float32)
    assert not carried(rows=(4096, 4096))  # an expand of one weight
    assert carried("shrink", k=4096, rows=(1024,) * 3)
    assert carried("shrink", k=4096, rows=(1024,) * 5)  # two launches
    assert not carried("shrink", k=4096, rows=(1024, 1023)) and not carried(k=1020)


@pytest.mark.parametrize("tokens", (8, 32))
def test_tiles_of_a_carried_norm(hopper, tokens):
    """Sums are of 32 rows, which one program has."""
    for k, rows in ((64, 100), (1024, 4096), (1488, 4096), (8192, 8192)):
        launch = _tuning.Launch("expand", "few", k, rows, tokens, 2, carry=True)
        tile = _tuning.linear_tile(launch, torch.device("cpu"))
        assert tile.block_r % 32 == 0
        used = _stream_few.shared_bytes(
            tile.block_r, tile.block_k, tile.block_m, tile.num_warps, tile.num_stages, False
        )
        assert used <= 232448


@pytest.mark.gpu
@streamed_only
class TestGpu:
    @pytest.fixture(autouse=True)
    def _always(self, monkeypatch):
        self.launched = watch_streamed(monkeypatch, _stream_few, 4)

    @pytest.mark.parametrize("whole", (False, True))
    @pytest.mark.parametrize("weighted,offset", [(True, 0.0), (True, 1.0), (False, 0.0)])
    @pytest.mark.parametrize("tokens", (2, 3, 8, 21, 32))
    @pytest.mark.parametrize(
        ("n", "rank", "rows"),
        ((4096, 1024, (1024,) * 3), (1000, 264, (8, 1032)), (64, 64, (64,)), (8200, 72, (64,) * 5)),
    )
    def test_values(self, poisoned, n, rank, rows, tokens, weighted, offset, whole):
        def make(*shape, dtype, scale=1.0):
            return gapped(*shape, dtype, scale) if len(shape) == 2 else made(*shape, dtype=dtype)

        first, last = operands(make, (tokens,), n, rank, rows, torch.bfloat16, weighted, whole)
        y, z, scaled, squares = both(expand_rms_triton, shrink_rms_triton, *first, offset, *last)
        wanted = expected(*first, offset, *last)
        assert_close("y", y, wanted[0], 4e-3)
        assert_close("z", z, wanted[1], 6e-3)
        assert_close("squares", squares.sum(0), wanted[0].square().sum(-1), 1e-3)
        factor = 1.0 if first[4] is None else first[4].float() + offset
        assert_close("scaled", scaled, wanted[0] * factor, 4e-3)
        assert len(self.launched) == 1 + -(-len(rows) // 4)

    def test_result_is_that_of_an_expand(self):
        """Bit by bit, with and without dependent launches."""
        z, (w,) = made(7, 264), gapped_weights((1000,), (264,))
        residual, g = made(7, 1000), made(1000)
        with _tuning.forced(_tuning.Tile(32, 64, 2, 8, 3)):
            plain = expand_triton(z, [w], [None], [0], residual)
            on, off = (
                expand_rms_triton(z, w, None, 0, residual, g, pdl=pdl) for pdl in (True, False)
            )
        assert torch.equal(plain, on[0]) and all(map(torch.equal, on, off))

    def test_shrink_is_bitwise_with_dependent_launches(self):
        z, (w,), (v,) = (
            made(32, 264),
            gapped_weights((1000,), (264,)),
            gapped_weights((64,), (1000,)),
        )
        _, scaled, squares = expand_rms_triton(z, w, None, 0)
        on, off = (
            shrink_rms_triton(scaled, squares, [v], [None], EPS, pdl=pdl) for pdl in (True, False)
        )
        assert torch.equal(on, off)

    @pytest.mark.parametrize("block_k,stages", ((64, 3), (256, 2)))
    @pytest.mark.parametrize("block_r,warps", ((32, 2), (64, 2), (64, 4), (128, 4)))
    @pytest.mark.parametrize("tokens", (8, 32))
    def test_tiles(self, block_r, warps, block_k, stages, tokens):
        """A program of more rows leaves what it has in front of its others."""
        if warps > (block_r // 16) * (block_k // 64):
            pytest.skip("no such tile")
        z, (w,), residual = (
            made(tokens - 3, 1096),
            gapped_weights((1000,), (1096,)),
            made(1000, tokens - 3).t(),
        )
        tile = _tuning.Tile(block_r, block_k, warps, tokens, stages)
        with _tuning.forced(tile):
            y, _, squares = expand_rms_triton(z, w, None, 0, residual)
        wanted = expand_reference(z, [w], [None], [0], residual)
        assert_close("y", y, wanted, 4e-3)
        assert_close("squares", squares.sum(0), wanted.square().sum(-1), 1e-3)
        programs = torch.zeros(32, dtype=torch.bool, device="cuda")
        programs[:: block_r // 32] = True
        assert torch.equal(squares.any(1), programs) and self.launched == [tile]

    @pytest.mark.parametrize("warps", (2, 8, 16))
    @pytest.mark.parametrize("tokens", (8, 32))
    def test_warps_share_the_sums(self, tokens, warps):
        """Of more parts than a program holds at once."""
        z, (w,), (v,) = (
            made(tokens, 72),
            gapped_weights((8200,), (72,)),
            gapped_weights((64,), (8200,)),
        )
        y, scaled, squares = expand_rms_triton(z, w, None, 0)
        tile = _tuning.Tile(64, 256, warps, tokens, 2)
        with _tuning.forced(tile):
            out = shrink_rms_triton(scaled, squares, [v], [None], EPS)
        wanted = shrink_reference(y.float(), [v.float()], [None], "rms", norm_eps=EPS)
        assert_close("z", out, wanted, 6e-3)
        assert self.launched[-1] == tile

    def test_what_is_not_finite_stays_in_its_token(self):
        z, (w,), (v,) = (
            made(8, 264),
            gapped_weights((1000,), (264,)),
            gapped_weights((64,), (1000,)),
        )
        z[2] = float("inf")
        _, scaled, squares = expand_rms_triton(z, w, None, 0)
        out = shrink_rms_triton(scaled, squares, [v], [None], EPS)
        assert torch.equal(out.isfinite().all(1), torch.arange(8, device="cuda") != 2)

    def test_ops_take_these_kernels_and_others(self):
        first, last = operands(made, (8,), 1000, 264, (64,), torch.bfloat16)
        for few in (True, False):
            if not few:  # rows of the latent that no copy takes
                first = (first[0][:, 1:], *first[1:])
            args = first if few else (first[0], first[1][:, :-1], *first[2:])
            y, z, *_ = both(EXPAND, SHRINK, *args, 0.0, *last)
            wanted = expected(*args, 0.0, *last)
            assert_close("y", y, wanted[0], 1e-2)
            assert_close("z", z, wanted[1], 1e-2)
            assert len(self.launched) == (2 if few else 1)  # the shrink is streamed still
            self.launched.clear()
