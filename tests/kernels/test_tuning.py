"""Tile sizes: the measured rows are used where they apply, and no rule asks for too much."""

from __future__ import annotations

import pytest
import torch

from fsvd_compile.kernels import _triton, _tuning
from fsvd_compile.phase import Phase

CPU = torch.device("cpu")


@pytest.fixture
def h200(monkeypatch):
    """The device facts of an H200 for lookups on CPU tensors."""
    monkeypatch.setattr(_triton, "capability", lambda device: (9, 0))
    monkeypatch.setattr(_triton, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(_triton, "shared_memory", lambda device: 232448)
    _tuning.linear_tile.cache_clear()
    yield
    _tuning.linear_tile.cache_clear()


def tile(op, k, rows, tokens=1, itemsize=2, layout="row", gated=False, phase=Phase.DECODE):
    return _tuning.linear_tile(
        op,
        phase,
        k=k,
        rows=rows,
        tokens=tokens,
        itemsize=itemsize,
        layout=layout,
        gated=gated,
        device=CPU,
    )


def test_measured_rows_have_provenance():
    table = _tuning.measured()
    assert {"gpu", "versions", "what", "caveat"} <= set(table["provenance"])
    for row in table["gemv"]:
        assert set(row) == {"op", "k", "rows", "tokens", "itemsize", "block_r", "num_warps", "of"}


def test_measured_rows_are_found(h200):
    for row in _tuning.measured()["gemv"]:
        found = tile(row["op"], row["k"], row["rows"])
        assert (found.block_r, found.num_warps) == (row["block_r"], row["num_warps"]), row["of"]
        assert found.block_k >= row["k"]


def test_gated_takes_half_of_the_packed_row(h200):
    found = tile("expand", 1488, 11008, gated=True)
    assert (found.block_r, found.num_warps) == (2, 2)


@pytest.mark.parametrize(
    "change", ({"tokens": 2}, {"itemsize": 4}, {"layout": "col"}, {"k": 400}, {"rows": 20})
)
def test_measured_rows_do_not_stretch(change, h200, monkeypatch):
    """Another problem than the measured one asks the rule."""
    asked = []
    rule = _tuning._gemv_rule
    monkeypatch.setattr(_tuning, "_gemv_rule", lambda *args: asked.append(args) or rule(*args))
    tile(**{"op": "shrink", "k": 4096, "rows": 1024, **change})
    assert asked


def test_other_gpus_ask_the_rule(monkeypatch):
    monkeypatch.setattr(_tuning, "_nearest", lambda *args: pytest.fail("no table for this device"))
    tile("shrink", 4097, 1024)


@pytest.mark.parametrize("gated", (False, True))
@pytest.mark.parametrize("itemsize", (2, 4))
@pytest.mark.parametrize("tokens", (1, 2))
def test_gemv_tiles_fit_in_registers(tokens, itemsize, gated, h200):
    for k in (1, 100, 819, 1488, 4096, 11008, 16384, 28672):
        for rows in (1, 819, 4096, 128256):
            t = tile("expand", k, rows, tokens, itemsize, gated=gated)
            a_thread = t.block_r * t.block_k * itemsize // (32 * t.num_warps) * (2 if gated else 1)
            assert a_thread <= 256, (k, rows, t)
            assert 1 <= t.num_warps <= 32 and t.block_r >= 1


@pytest.mark.parametrize("gated", (False, True))
@pytest.mark.parametrize("itemsize", (2, 4))
@pytest.mark.parametrize("op", ("shrink", "expand"))
@pytest.mark.parametrize("tokens", (3, 17, 64))
def test_skinny_tiles_fit_in_99_kb(tokens, op, itemsize, gated):
    """What GPUs of compute capability 8.6 and 8.9 have, the least since 8.0."""
    t = tile(op, 4096, 11008, tokens, itemsize, gated=gated, phase=Phase.FEW)
    stage = (t.block_m + t.block_r) * t.split * t.block_k * itemsize * (2 if gated else 1)
    assert stage * (t.num_stages - 1) <= 99 * 1024
    assert t.block_m >= 16 and t.block_r >= 16 and t.block_k >= 16
    assert t.num_warps % t.split == 0


def test_attention_splits():
    def splits(batch, kv_heads, length):
        return _tuning.attention_tile(
            batch=batch, kv_heads=kv_heads, rows=4, length=length, dim=128, itemsize=2, device=CPU
        ).splits

    assert splits(1, 1, 100) == 1
    assert splits(1, 1, 4096) > 1
    assert splits(64, 8, 4096) == 1


@pytest.mark.parametrize("group", (1, 4))
@pytest.mark.parametrize("batch, kv_heads", ((1, 1), (1, 8), (1, 32), (8, 32), (64, 8)))
def test_decode_attention_programs_fit_side_by_side(batch, kv_heads, group, h200):
    found = _tuning.decode_attention_tile(
        batch=batch, kv_heads=kv_heads, group=group, length=8320, dim=128, itemsize=2, device=CPU
    )
    assert 1 <= found.splits <= 64
    assert found.splits == 1 or found.splits * batch * kv_heads <= 3 * 132
    short = _tuning.decode_attention_tile(
        batch=batch, kv_heads=kv_heads, group=group, length=10, dim=128, itemsize=2, device=CPU
    )
    assert short.splits == 1
