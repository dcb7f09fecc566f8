"""The kernel that streams weights for a few tokens: which products it takes, and on a GPU that they are right."""

from __future__ import annotations

import itertools

import pytest
import torch
from harness import assert_close
from opcases import gapped, gapped_weights, made, streamed_only, watch_streamed

from fsvd_compile.kernels import (
    _linear,
    _memo,
    _stream,
    _stream_few,
    _triton,
    _tuning,
    expand_reference,
    expand_triton,
    shrink_reference,
    shrink_triton,
)
from fsvd_compile.phase import Phase

HALVES = (torch.bfloat16, torch.float16)
# The result is rounded, and so is x behind a norm, as eager rounds it.
LIMITS = {torch.bfloat16: 6e-3, torch.float16: 8e-4}


def taken(tokens=8, k=4096, rows=1024, dtype=torch.bfloat16, op="expand", layout="row", **of):
    offset, wider, at = (of.get(n, 0) for n in ("offset", "wider", "at"))
    x = torch.empty(tokens * (k + wider) + offset, dtype=dtype)[offset:].view(tokens, k + wider)
    weight = torch.empty(rows, k - at, dtype=dtype)
    return _stream_few.takes(op, x[:, :k], [weight], [at], layout)


@pytest.mark.skipif(_stream.gluon is None, reason="Triton without Gluon")
def test_what_is_taken(hopper, monkeypatch):
    assert taken() and taken(dtype=torch.float16) and taken(op="shrink") and taken(k=4104)
    assert taken(tokens=64) and not taken(tokens=65)
    assert not taken(dtype=torch.float32)
    assert not taken(layout="col")
    assert not taken(k=4100) and not taken(k=4095)  # rows of whole 16 bytes only, of x as well
    assert taken(wider=8) and not taken(wider=4)
    assert not taken(offset=1)
    assert taken(at=16) and not taken(at=4)  # where a block starts in the latent
    assert taken(k=64, rows=20000) and not taken(k=56, rows=20000)
    assert not taken(rows=128) and not taken(k=576, rows=49152, op="shrink")  # too little
    assert taken(rows=1023) and not taken(op="shrink", rows=1023)  # ranks of whole 16 bytes only
    same = torch.empty(1, 4096, dtype=torch.bfloat16).expand(8, 4096)
    weight = torch.empty(1024, 4096, dtype=torch.bfloat16)
    assert not _stream_few.takes("expand", same, [weight], [0], "row")
    assert not _stream_few.takes(
        "expand", torch.empty(4096, 8).bfloat16().t(), [weight], [0], "row"
    )
    for capability in ((8, 0), (8, 9), (10, 0), (12, 0), None):
        monkeypatch.setattr(_triton, "capability", lambda device, c=capability: c)
        assert not taken()


@pytest.mark.skipif(_stream.gluon is None, reason="Triton without Gluon")
def test_two_tokens_are_a_few_where_weights_are_streamed(hopper, monkeypatch):
    def phase(tokens=2, k=4096, rows=(1024,), dtype=torch.bfloat16, op="shrink", offset=0):
        x = torch.empty(tokens, k + 8, dtype=dtype)[:, : k + offset]
        weights = [torch.empty(n, k, dtype=dtype) for n in rows]
        return _linear._phase_of(op, x, weights, [offset] * len(rows))

    assert phase() is phase(dtype=torch.float16) is phase(op="expand", offset=8) is Phase.FEW
    assert phase(rows=(1024,) * 5) is Phase.FEW  # two launches
    # A rank, a place in the latent, a type and a size that are not streamed.
    assert phase(rows=(1024, 1023)) is phase(rows=(1024,) * 4 + (1023,)) is Phase.DECODE
    assert phase(op="expand", offset=4) is phase(dtype=torch.float32) is Phase.DECODE
    assert phase(k=576, rows=(8192,)) is phase(rows=(128,)) is Phase.DECODE
    assert phase(tokens=1) is Phase.DECODE and phase(tokens=3) is Phase.FEW
    monkeypatch.setattr(_triton, "capability", lambda device: (8, 0))
    _memo.forget()
    assert phase() is Phase.DECODE and phase(tokens=3) is Phase.FEW


def test_what_is_normalized(hopper):
    def normalized(
        tokens=8, k=4096, dtype=torch.bfloat16, norm="rms", offset=0.0, weight=None, rows=3072
    ):
        g = None if weight is None else torch.empty(k, dtype=weight)
        x = torch.empty(tokens, k, dtype=dtype)
        return _stream_few.normalizes(x, rows, (norm, g, None, 1e-5, offset))

    assert normalized() and normalized(weight=torch.bfloat16) and normalized(tokens=16, k=8192)
    assert not normalized(tokens=17) and not normalized(k=8200)
    assert not normalized(dtype=torch.float16)  # larger numbers than it has, perhaps
    assert not normalized(weight=torch.float32)
    assert not normalized(norm="none") and not normalized(norm="layer")
    assert not normalized(offset=1.0)
    assert normalized(rows=4224) and not normalized(rows=4232)  # two programs a multiprocessor


@pytest.mark.parametrize("tokens", (3, 16))
def test_tiles_of_normalized_x(hopper, tokens):
    for k, rows in itertools.product((64, 576, 4096, 8192), (100, 1024, 3072, 128256)):
        launch = _tuning.Launch("shrink", "few", k, rows, tokens, 2, norm=True)
        tile = _tuning.linear_tile(launch, torch.device("cpu"))
        used = _stream_few.shared_bytes(
            tile.block_r, tile.block_k, tile.block_m, tile.num_warps, tile.num_stages, False, k
        )
        assert used <= 232448, (k, rows, tile)
        assert _stream_few.division(tile.num_warps, tile.block_k // _stream.PIECE)[1] == 1


@pytest.mark.parametrize("gated", (False, True))
@pytest.mark.parametrize("tokens", (2, 3, 8, 9, 32, 64))
def test_tiles_fit(hopper, tokens, gated):
    sizes = itertools.product((64, 576, 1488, 4096, 11008), (100, 1024, 11008, 128256))
    for (k, rows), op in itertools.product(sizes, ("shrink", "expand")):
        launch = _tuning.Launch(op, "few", k, rows, tokens, 2, "row", gated)
        tile = _tuning.linear_tile(launch, torch.device("cpu"))
        used = _stream_few.shared_bytes(
            tile.block_r, tile.block_k, tile.block_m, tile.num_warps, tile.num_stages, gated
        )
        assert used <= 232448, (k, rows, tile)
        pieces = tile.block_k // _stream.PIECE
        columns, parts = _stream_few.division(tile.num_warps, pieces)
        sums = (
            (2 if gated else 1) * (pieces // columns) * (tile.block_r // parts) * tile.block_m // 32
        )
        assert sums <= 128, ("registers a thread", k, rows, tile)
        assert tile.block_m >= tokens and tile.block_m >= 8 and tile.block_r >= 16
        assert columns * parts == tile.num_warps and tile.block_r >= 16 * parts
        assert 1 <= tile.num_stages <= -(-k // tile.block_k)


def test_measured_tiles_and_the_rule(hopper):
    def tile(**of):
        launch = _tuning.Launch("shrink", "few", 4096, 1024, 8, 2)._replace(**of)
        return _tuning.linear_tile(launch, torch.device("cpu"))

    assert tile() == _tuning.Tile(16, 512, 4, 8, 6)
    assert tile(tokens=5) == tile() and tile(tokens=9).block_m == 16
    head = {"rows": 32000}  # no row of a table is as long
    assert [tile(**head, tokens=n).block_r for n in (8, 16, 32, 64)] == [16, 32, 64, 64]
    assert tile(k=2048, rows=300, tokens=64).block_r == 16  # few rows go to many programs


def test_candidates_are_possible():
    from fsvd_compile.bench import tune

    for gated, tokens in itertools.product((False, True), (8, 64)):
        tiles = tune.candidates(
            _tuning.Launch("expand", "few", 1488, 11008, tokens, 2, gated=gated)
        )
        assert len(tiles) > 4 and len(set(tiles)) == len(tiles)
        for t in tiles:
            columns, parts = _stream_few.division(t.num_warps, t.block_k // 64)
            assert columns * parts == t.num_warps and t.block_r >= 16 * parts
            assert t.block_m == tokens and t.num_stages <= 12
            used = _stream_few.shared_bytes(
                t.block_r, t.block_k, t.block_m, t.num_warps, t.num_stages, gated
            )
            assert used <= 232448


@pytest.mark.gpu
@streamed_only
class TestGpu:
    @pytest.fixture(autouse=True)
    def _always(self, monkeypatch):
        """Small weights, too; and a launch that went elsewhere is an error."""
        self.launched = watch_streamed(monkeypatch, _stream_few, 4)
        self.normed, rows = [], _linear._normed_rows
        monkeypatch.setattr(
            _linear, "_normed_rows", lambda *a: self.normed.append(a[1]) or rows(*a)
        )

    @pytest.mark.parametrize("dtype", HALVES)
    @pytest.mark.parametrize(("norm", "offset"), (("none", 0.0), ("rms", 0.0), ("rms", 1.0)))
    @pytest.mark.parametrize("tokens", (2, 3, 8, 13, 50))
    @pytest.mark.parametrize("k", (64, 1000, 1488, 4096))
    @pytest.mark.parametrize("rows", ((8,), (1024, 1032), (64, 8, 16, 808)))
    def test_shrink(self, poisoned, rows, k, tokens, norm, offset, dtype):
        weights = gapped_weights(rows, (k,) * len(rows), dtype)
        biases = [made(n, dtype=dtype) if i != 1 else None for i, n in enumerate(rows)]
        g = made(k, dtype=dtype) if norm != "none" else None
        args = gapped(tokens, k, dtype), weights, biases, norm, g, None, 1e-5, offset
        assert_close("y", shrink_triton(*args), shrink_reference(*args), LIMITS[dtype])
        assert len(self.launched) == 1
        inside = dtype == torch.bfloat16 and tokens <= 16 and not offset
        assert bool(self.normed) == (norm == "rms" and not inside)

    def test_norm_of_many_rows_in_front(self, poisoned):
        w, x, g = gapped_weights((9000,), (1096,)), gapped(8, 1096), made(1096)
        args = x, w, [None], "rms", g, None, 1e-5
        assert_close("y", shrink_triton(*args), shrink_reference(*args), 6e-3)
        assert len(self.launched) == 1 and self.normed

    @pytest.mark.parametrize("large", (1e-3, 3e3))
    def test_norms_of_other_sizes(self, poisoned, large):
        """Tokens of very different size, one of zeros; no weight of the norm; more weights than a launch takes."""
        x = gapped(7, 1096, torch.bfloat16)
        x *= torch.logspace(-3, 1, 7, device="cuda").bfloat16()[:, None] * large
        x[3] = 0
        for counts, g in (((72, 64), None), ((64,) * 5, made(1096, dtype=torch.bfloat16))):
            weights = gapped_weights(counts, (1096,) * len(counts), torch.bfloat16)
            args = x, weights, [None] * len(counts), "rms", g, None, 1e-6
            actual, expected = shrink_triton(*args), shrink_reference(*args)
            for i in range(7):
                if i == 3:
                    assert not actual[i].any()
                else:
                    assert_close(f"token {i}", actual[i], expected[i], 6e-3)
            assert bool(self.normed) == (len(counts) > 4)
            self.normed.clear()

    @pytest.mark.parametrize("dtype", HALVES)
    @pytest.mark.parametrize("residual", (False, True))
    @pytest.mark.parametrize("tokens", (2, 8, 33, 64))
    @pytest.mark.parametrize(
        ("rows", "ranks", "act"),
        (
            ((4096, 1000, 1001), (1024, 1000, 264), "none"),
            ((4097,), (1488,), "gelu"),
            ((333,), (64,), "gelu_tanh"),
            ((777,), (2048,), "relu"),
            ((1111, 1111), (1488, 520), "silu_mul"),
            ((1111, 1111), (72, 1024), "gelu_mul"),
            ((11008, 11008), (1024, 1024), "gelu_tanh_mul"),
            ((5, 6, 7, 8, 9), (256, 320, 328, 1000, 3000), "silu"),
        ),
    )
    def test_expand(self, poisoned, rows, ranks, act, tokens, residual, dtype):
        offsets = [8 + sum(ranks[:i]) + 8 * i for i in range(len(ranks))]
        z = gapped(tokens, offsets[-1] + ranks[-1] + 8, dtype)
        biases = [made(n, dtype=dtype) if i != 1 else None for i, n in enumerate(rows)]
        n = rows[0] if act.endswith("_mul") else sum(rows)
        res = made(n, tokens, dtype=dtype).t() if residual else None
        args = z, gapped_weights(rows, ranks, dtype), biases, offsets, res, act
        assert_close("y", expand_triton(*args), expand_reference(*args), LIMITS[dtype])
        assert len(self.launched) == -(-len(rows) // 4)

    def test_biases_with_gaps_and_of_one_number(self, poisoned):
        """They are copied, and so not read before the kernel in front is done."""
        z, weights = gapped(8, 1096), gapped_weights((1000, 64), (1096, 1096))
        biases = [gapped(1000, 1)[:, 0], made(1).expand(64)]
        assert biases[0].stride() != (1,) and biases[1].stride() == (0,)
        args = z, weights, biases, [0, 0], None, "none"
        assert_close("y", expand_triton(*args, pdl=True), expand_reference(*args), 6e-3)
        args = z, weights, biases
        assert_close("z", shrink_triton(*args, pdl=True), shrink_reference(*args), 6e-3)
        assert len(self.launched) == 2

    def test_two_tokens_of_other_weights_and_of_a_phase_that_is_given(self):
        x, g = gapped(2, 1096), made(1096)
        (odd,), (even,) = gapped_weights((1001,), (1096,)), gapped_weights((1000,), (1096,))
        for weight, phase in ((odd, None), (even, Phase.DECODE)):
            args = x, [weight], [None], "rms", g, None, 1e-5
            y = shrink_triton(*args, phase=phase)
            assert_close("y", y, shrink_reference(*args), 6e-3)
            assert not self.launched
        assert_close("y", shrink_triton(*args), shrink_reference(*args), 6e-3)
        assert len(self.launched) == 1

    def test_gate_and_up_of_one_input(self):
        z, w = gapped(8, 1488), gapped_weights((1000, 1000), (1488, 1488))
        for offsets in ([0, 0], [0, 8]):
            ws = [w[0], w[1][:, : 1488 - offsets[1]]]
            args = z, ws, [None, None], offsets, None, "silu_mul"
            assert_close("y", expand_triton(*args), expand_reference(*args), 6e-3)
        assert len(self.launched) == 2

    @pytest.mark.parametrize("stages", (1, 2, 3, 8))
    @pytest.mark.parametrize("block_k", (64, 128, 256, 512))
    @pytest.mark.parametrize(
        ("block_r", "warps"),
        ((16, 2), (16, 4), (32, 2), (32, 4), (64, 4), (64, 8), (128, 2), (128, 8)),
    )
    def test_tiles(self, block_r, warps, block_k, stages):
        most = (block_r // 16) * (block_k // 64)
        if warps > most or (block_r + 8) * block_k * stages * 2 > 220_000:
            pytest.skip("no such tile")
        tile = _tuning.Tile(block_r, block_k, warps, 8, stages)
        w, x = gapped_weights((1031,), (2120,)), gapped(11, 2120)  # more tokens than one tile has
        with _tuning.forced(tile):
            y = expand_triton(x, w, [None], [0])
        assert self.launched == [tile]
        assert_close("y", y, expand_reference(x, w, [None], [0]), 4e-3)

    def test_pdl_is_bitwise(self):
        x, w, g = made(8, 4096), gapped_weights((1024,) * 3, (4096,) * 3), made(4096)
        on, off = (shrink_triton(x, w, [None] * 3, "rms", g, pdl=pdl) for pdl in (True, False))
        assert torch.equal(on, off) and len(self.launched) == 2

    def test_what_is_not_finite_stays_where_it_is(self):
        """In its own token, block and column: what a copy takes too much of is 0."""
        w = gapped_weights((64, 64), (1488, 1000))
        z = made(8, 2488)
        z[2, 1488:] = float("inf")  # the second block of one token
        w[0][5] = float("inf")
        y = expand_triton(z, w, [None] * 2, [0, 1488])
        finite = torch.isfinite(y)
        expected = torch.ones_like(finite)
        expected[2, 64:] = False
        expected[:, 5] = False
        assert torch.equal(finite, expected) and len(self.launched) == 1

    def test_weights_changed_in_place_in_a_graph(self):
        x, w = made(8, 4096), gapped_weights((1024,), (4096,))
        graph = torch.cuda.CUDAGraph()
        expand_triton(x, w, [None], [0])
        with torch.cuda.graph(graph):
            y = expand_triton(x, w, [None], [0])
        w[0].mul_(-2)
        graph.replay()
        assert_close("y", y, expand_reference(x, w, [None], [0]), 4e-3)
