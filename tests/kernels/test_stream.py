"""The kernel that streams weights through shared memory: which products it takes, and on a GPU that they are right."""

from __future__ import annotations

import itertools

import pytest
import torch
from harness import assert_close
from opcases import gapped_weights, made, streamed_only, watch_streamed

from fsvd_compile.kernels import (
    _stream,
    _triton,
    _tuning,
    expand_reference,
    expand_triton,
    shrink_reference,
    shrink_triton,
)

HALVES = (torch.bfloat16, torch.float16)
# The result is rounded, and so is x behind a norm, as eager rounds it.
LIMITS = {torch.bfloat16: 6e-3, torch.float16: 8e-4}


def test_parts_hold_a_row():
    for blocks in range(1, 200):
        for whole in (False, True):
            found = _stream.parts(blocks, whole)
            assert sum(found) >= blocks and all(p & (p - 1) == 0 for p in found), (blocks, found)
            assert not whole or found[1:] == (0, 0)
    assert _stream.parts(11, False) == (8, 2, 1) and _stream.parts(43, False) == (32, 8, 4)


def taken(k=4096, rows=1024, tokens=1, dtype=torch.bfloat16, op="expand", layout="row", offset=0):
    w = torch.empty(rows * k + offset, dtype=dtype)[offset:].view(rows, k)
    return _stream.takes(op, torch.empty(tokens, k, dtype=dtype), [w], layout)


@pytest.mark.skipif(_stream.gluon is None, reason="Triton without Gluon")
def test_what_is_taken(hopper, monkeypatch):
    assert taken() and taken(dtype=torch.float16) and taken(op="shrink") and taken(k=4104)
    assert not taken(tokens=2)
    assert not taken(dtype=torch.float32)
    assert not taken(layout="col")
    # Every second and every eighth row is one of whole 16 bytes.
    assert taken(k=4100) and taken(k=4095) and taken(k=4100, rows=1030)
    assert not taken(k=4095, rows=1028) and not taken(k=4100, rows=1029)
    padded = torch.empty(1024, 4096, dtype=torch.bfloat16)[:, :4095]
    assert not _stream.takes("expand", padded[:1], [padded], "row")
    assert not taken(offset=1)
    assert taken(k=16384, rows=64) and not taken(k=16392, rows=64)  # x is in shared memory
    # What is moved takes seven elements more.
    assert taken(k=16377, rows=128) and not taken(k=16378, rows=128)
    same = torch.empty(1, 4096, dtype=torch.bfloat16).expand(1024, 4096)
    assert not _stream.takes("expand", torch.empty(1, 4096, dtype=torch.bfloat16), [same], "row")
    assert not taken(rows=128) and not taken(k=576, rows=49152, op="shrink")  # too little
    assert taken(rows=1023) and taken(op="shrink", rows=1023)
    for capability in ((8, 0), (8, 9), (10, 0), (12, 0), None):
        monkeypatch.setattr(_triton, "capability", lambda device, c=capability: c)
        assert not taken()


@pytest.mark.skipif(_stream.gluon is None, reason="Triton without Gluon")
def test_a_triton_that_nobody_has_tried(hopper, monkeypatch, caplog):
    """Gluon changes without notice: a kernel that no longer compiles would stop the first call."""
    monkeypatch.delenv("FSVD_GLUON", raising=False)
    versions = {"3.6.0": True, "3.9.1": True, "3.9+git1": True, "3.10.0+git1": False, "4.0": False}
    for version, known in versions.items():
        monkeypatch.setattr(_triton.triton, "__version__", version)
        _stream._compiles.cache_clear()
        caplog.clear()
        assert taken() == taken() == known
        warned = [record.getMessage() for record in caplog.records]
        assert len(warned) == (not known), version
        assert known or f"Triton {version} is newer than 3.9" in warned[0]
    monkeypatch.setenv("FSVD_GLUON", "1")
    _stream._compiles.cache_clear()
    assert taken()
    _stream._compiles.cache_clear()


@pytest.mark.parametrize("vector", (1, 8))
@pytest.mark.parametrize("gated", (False, True))
@pytest.mark.parametrize("norm", (False, True))
def test_tiles_fit(hopper, norm, gated, vector):
    for k, rows in itertools.product((256, 576, 1488, 4096, 11008, 16384), (100, 1024, 128256)):
        launch = _tuning.Launch("expand", "stream", k, rows, 1, 2, "row", gated, vector, norm)
        tile = _tuning.linear_tile(launch, torch.device("cpu"))
        held = k + vector - 1  # what is in shared memory of a row, and of x
        used = _stream.shared_bytes(held, tile.block_r, tile.block_k, tile.num_stages, gated, norm)
        assert used <= 232448, (k, rows, tile)
        assert tile.num_warps <= tile.block_r and tile.block_k % _stream.PIECE == 0
        assert 1 <= tile.num_stages <= -(-k // tile.block_k)


@pytest.mark.gpu
@streamed_only
class TestGpu:
    @pytest.fixture(autouse=True)
    def _always(self, monkeypatch):
        """Small weights, too; and a launch that went elsewhere is an error."""
        self.launched = watch_streamed(monkeypatch, _stream, 3)

    @pytest.mark.parametrize("dtype", HALVES)
    @pytest.mark.parametrize("norm", ("none", "rms", "layer"))
    @pytest.mark.parametrize("k", (256, 264, 1000, 1001, 1488, 4096, 4168, 11008))
    @pytest.mark.parametrize("rows", ((8,), (1024, 1024, 1032), (64, 8, 16, 808)))
    def test_shrink(self, poisoned, rows, k, norm, dtype):
        weights = gapped_weights(rows, (k,) * len(rows), dtype)
        biases = [made(n, dtype=dtype) if i != 1 else None for i, n in enumerate(rows)]
        g = made(k, dtype=dtype) if norm != "none" else None
        h = made(k, dtype=dtype) if norm == "layer" else None
        args = made(1, 1, k, dtype=dtype), weights, biases, norm, g, h, 1e-5
        args += (1.0 if norm == "rms" else 0.0,)
        assert_close("y", shrink_triton(*args), shrink_reference(*args), LIMITS[dtype])
        assert len(self.launched) == 1

    @pytest.mark.parametrize("dtype", HALVES)
    @pytest.mark.parametrize("residual", (False, True))
    @pytest.mark.parametrize(
        ("rows", "ranks", "act"),
        (
            ((4096, 1000, 1001), (1024, 1000, 264), "none"),
            ((4097,), (1488,), "gelu"),
            ((333,), (256,), "gelu_tanh"),
            ((777,), (2048,), "relu"),
            ((1111, 1111), (1488, 1480), "silu_mul"),
            ((11008, 11008), (1024, 1024), "gelu_tanh_mul"),
            ((5, 6, 7, 8, 9), (256, 320, 328, 1000, 3000), "silu"),
            ((4096, 1000, 1032), (1023, 1021, 257), "none"),
            ((1112, 1112), (1791, 1790), "silu_mul"),
            ((1102,), (1228,), "gelu"),
            ((8, 4096, 16, 40), (1638, 2089, 320, 2388), "silu"),
        ),
    )
    def test_expand(self, poisoned, rows, ranks, act, residual, dtype):
        offsets = [3 + sum(ranks[:i]) + 8 * i for i in range(len(ranks))]
        z = made(1, offsets[-1] + ranks[-1] + 1, dtype=dtype)
        biases = [made(n, dtype=dtype) if i != 1 else None for i, n in enumerate(rows)]
        n = rows[0] if act.endswith("_mul") else sum(rows)
        res = made(n, 2, dtype=dtype)[:, 0][None] if residual else None
        args = z, gapped_weights(rows, ranks, dtype), biases, offsets, res, act
        assert_close("y", expand_triton(*args), expand_reference(*args), LIMITS[dtype])
        assert len(self.launched) == -(-len(rows) // 4)

    @pytest.mark.parametrize("stages", (1, 2, 3, 8))
    @pytest.mark.parametrize("block_k", (256, 512, 1024))
    @pytest.mark.parametrize(("block_r", "warps"), ((4, 4), (8, 4), (16, 8), (8, 8)))
    def test_tiles(self, block_r, warps, block_k, stages):
        tile = _tuning.Tile(block_r, block_k, warps, 1, stages)
        w, x = gapped_weights((1031,), (4168,)), made(1, 4168)
        odd, g = gapped_weights((1032,), (4167,)), made(4168)
        with _tuning.forced(tile):
            y = expand_triton(x, w, [None], [0])
            shifted = expand_triton(x, odd, [None], [1])
            args = x, gapped_weights((1031,), (4168,)), [None], "rms", g, None, 1e-5
            normed = shrink_triton(*args)
        assert self.launched == [tile] * 3
        assert_close("y", y, expand_reference(x, w, [None], [0]), 4e-3)
        assert_close("shifted", shifted, expand_reference(x, odd, [None], [1]), 4e-3)
        assert_close("normed", normed, shrink_reference(*args), 6e-3)

    @pytest.mark.parametrize("act", ("none", "silu_mul"))
    @pytest.mark.parametrize(
        ("k", "stride"), ((1791, 1791), (1791, 1793), (1792, 1793), (1788, 1790), (4096, 4099))
    )
    def test_rows_as_they_lie(self, poisoned, k, stride, act):
        """Ranks and strides of other multiples, and a last row that ends with its memory."""
        weights = []
        for _ in range(2):
            room = torch.full((1031, stride), float("nan"), device="cuda", dtype=torch.bfloat16)
            room[:1024, :k] = made(1024, k, scale=k**-0.5)
            flat = room.view(-1)[: 1023 * stride + k].clone()
            weights.append(flat.as_strided((1024, k), (stride, 1)))
        args = made(1, 2 * k), weights, [None] * 2, [0, k], None, act
        assert_close("y", expand_triton(*args), expand_reference(*args), 6e-3)
        assert len(self.launched) == 1

    def test_pdl_is_bitwise(self):
        x, w, g = made(1, 4096), gapped_weights((1024,) * 3, (4096,) * 3), made(4096)
        on, off = (shrink_triton(x, w, [None] * 3, "rms", g, pdl=pdl) for pdl in (True, False))
        assert torch.equal(on, off) and len(self.launched) == 2

    def test_what_is_not_finite_stays_where_it_is(self):
        """An inf of x behind the last whole piece meets its own column of the weight and no other."""
        for k, at in itertools.product((4096, 4168, 4167), (0, -1, -100)):
            x, w = made(1, k), gapped_weights((1024,), (k,))
            x[0, at] = float("inf")  # the last block repeats columns, x does not
            expected = torch.sign(w[0][:, at].float()) * float("inf")
            y = expand_triton(x, w, [None], [0])
            assert torch.equal(y[0].float().nan_to_num(7, 9, -9), expected.nan_to_num(7, 9, -9))

    def test_weights_changed_in_place_in_a_graph(self):
        x, w = made(1, 4096), gapped_weights((1024,), (4096,))
        graph = torch.cuda.CUDAGraph()
        expand_triton(x, w, [None], [0])
        with torch.cuda.graph(graph):
            y = expand_triton(x, w, [None], [0])
        w[0].mul_(-2)
        graph.replay()
        assert_close("y", y, expand_reference(x, w, [None], [0]), 4e-3)
