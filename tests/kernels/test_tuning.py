"""Tile sizes: the measured rows are used where they apply, and no rule asks for too much."""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import time
from importlib import resources

import pytest
import torch

from fsvd_compile.bench import tune
from fsvd_compile.errors import BenchError, TableError
from fsvd_compile.kernels import _measured, _stream_attention, _triton, _tuning

CPU = torch.device("cpu")
STREAM = {
    "op": "shrink", "gated": False, "k": 4096, "rows": 1024, "tokens": 1, "itemsize": 2, "shifted": False,
    "block_r": 4, "block_k": 512, "num_warps": 4, "num_stages": 3,
}  # fmt: skip


@pytest.fixture
def h200(monkeypatch):
    """The device facts of an H200 for lookups on CPU tensors."""
    monkeypatch.setattr(_triton, "capability", lambda device: (9, 0))
    monkeypatch.setattr(_triton, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(_triton, "shared_memory", lambda device: 232448)
    _tuning.forget()
    yield
    _tuning.forget()


def tile(op, k, rows, tokens=1, itemsize=2, layout="row", gated=False, kernel="gemv", vector=1):
    launch = _tuning.Launch(op, kernel, k, rows, tokens, itemsize, layout, gated, vector)
    return _tuning.linear_tile(launch, CPU)


def test_measured_rows_have_provenance():
    path = resources.files("fsvd_compile.kernels").joinpath("configs/sm90.json")
    assert {"gpu", "versions", "what", "caveat"} <= set(_measured.read(path)["provenance"])
    table = _measured.measured((9, 0))
    assert table["gemv"]
    for kernel, rows in table.items():
        for row in rows:
            assert {*_measured.KEY, *_measured.TILES[kernel], "of"} <= set(row)


def test_measured_rows_are_found(h200):
    for kernel, rows in _measured.measured((9, 0)).items():
        for row in rows:
            vector = 16 // row["itemsize"] if row["shifted"] else 1
            found = tile(
                row["op"], row["k"], row["rows"], row["tokens"], gated=row["gated"], kernel=kernel,
                vector=vector,
            )  # fmt: skip
            for name in _measured.TILES[kernel]:
                assert getattr(found, name) == row[name], row
            assert kernel != "gemv" or found.block_k >= row["k"] + vector - 1


@pytest.mark.parametrize(
    "change",
    ({"tokens": 2}, {"itemsize": 4}, {"layout": "col"}, {"k": 400}, {"rows": 20}, {"vector": 8}),
)
def test_measured_rows_do_not_stretch(change, h200, monkeypatch):
    """Another problem than the measured one asks the rule."""
    asked = []
    rule = _tuning._gemv_rule
    monkeypatch.setattr(_tuning, "_gemv_rule", lambda *args: asked.append(args) or rule(*args))
    tile(**{"op": "shrink", "k": 4096, "rows": 1024, **change})
    assert asked


def test_other_gpus_ask_the_rule(monkeypatch):
    monkeypatch.setattr(_triton, "capability", lambda device: (8, 0))
    asked = []
    rule = _tuning._gemv_rule
    monkeypatch.setattr(_tuning, "_gemv_rule", lambda *args: asked.append(args) or rule(*args))
    _tuning.forget()
    tile("shrink", 4096, 1024)
    _tuning.forget()
    assert asked


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
    t = tile(op, 4096, 11008, tokens, itemsize, gated=gated, kernel="skinny")
    stage = (t.block_m + t.block_r) * t.split * t.block_k * itemsize * (2 if gated else 1)
    assert stage * (t.num_stages - 1) <= 99 * 1024
    assert t.block_m >= 16 and t.block_r >= 16 and t.block_k >= 16
    assert t.num_warps % t.split == 0


@pytest.fixture
def own(h200, tmp_path, monkeypatch):
    """The user's table for an H200, empty at first."""
    monkeypatch.setenv("FSVD_TUNED", str(tmp_path / "tuned"))
    yield _measured.own_file((9, 0))
    monkeypatch.undo()
    _measured.measured.cache_clear()


def found_tile(launch, tile, us=3.0):
    return tune.Found(launch, {tile: us}, before=4.0, library=5.0, bytes=10**6)


def test_what_tune_found_is_used(own, monkeypatch):
    monkeypatch.setattr(
        tune, "conditions", lambda device: dict.fromkeys(("device", "torch", "triton"), "x")
    )
    gemv = _tuning.Launch("shrink", "gemv", 4096, 1024, 1, 2)
    few = _tuning.Launch("expand", "skinny", 300, 700, 9, 2, gated=True)
    wanted = {
        gemv: _tuning.Tile(16, 4096, 32),
        few: _tuning.Tile(64, 32, 4, 16, 3, 4),
    }
    for launch, chosen in wanted.items():
        assert _tuning.linear_tile(launch, CPU) != chosen
        tune.keep([found_tile(launch, chosen)], own)
    for launch, chosen in wanted.items():
        assert _tuning.linear_tile(launch, CPU) == chosen
        assert _tuning.linear_tile(launch._replace(k=launch.k - 8), CPU).block_r == chosen.block_r
    again = _tuning.Tile(8, 4096, 32)
    tune.keep([found_tile(gemv, again)], own)
    assert _tuning.linear_tile(gemv, CPU) == again
    assert [len(json.loads(own.read_text())[kernel]) for kernel in ("gemv", "skinny")] == [1, 1]


def test_runs_of_tune_at_the_same_time_lose_no_row(own, monkeypatch):
    monkeypatch.setattr(
        tune, "conditions", lambda device: dict.fromkeys(("device", "torch", "triton"), "x")
    )
    read = _measured.read

    def slowly(path):
        found = read(path)
        time.sleep(0.02)
        return found

    monkeypatch.setattr(_measured, "read", slowly)
    launches = [_tuning.Launch("shrink", "gemv", k, 1024, 1, 2) for k in range(512, 1024, 64)]
    keep = lambda launch: tune.keep([found_tile(launch, _tuning.Tile(8, 1024, 4))], own)  # noqa: E731
    with concurrent.futures.ThreadPoolExecutor(len(launches)) as pool:
        list(pool.map(keep, launches))
    assert {row["k"] for row in read(own)["gemv"]} == {launch.k for launch in launches}


@pytest.mark.parametrize(
    "text",
    (
        "",
        "{}",
        "[]",
        '{"gemv": [{"op": "shrink"}], "skinny": []}',
        '{"gemv": 3, "skinny": []}',
        *(
            json.dumps({"gemv": [], "skinny": [], "stream": [STREAM | c]})
            for c in ({"block_k": 128}, {"num_warps": 8}, {"block_k": 32768}, {"num_stages": 0})
        ),
        *(
            json.dumps({"gemv": [], "skinny": [], "few": [STREAM | {"block_r": 16} | c]})
            for c in ({"block_r": 8}, {"num_warps": 16}, {"block_k": 500}, {"block_r": 512})
        ),
    ),
)
def test_a_file_that_is_no_table(text, own):
    own.parent.mkdir(parents=True)
    own.write_text(text)
    _measured.measured.cache_clear()
    with pytest.raises(TableError, match="FSVD_TUNED"):
        tile("shrink", 4096, 1024)


def test_a_row_of_the_streamed_kernel_is_used(own):
    own.parent.mkdir(parents=True)
    own.write_text(json.dumps({"gemv": [], "skinny": [], "stream": [STREAM]}))
    _tuning.forget()
    found = tile("shrink", 4000, 1024, kernel="stream")
    assert found == _tuning.Tile(4, 512, 4, 1, 3)


def test_a_row_of_the_streamed_kernel_for_few_tokens_is_used(own, monkeypatch):
    monkeypatch.setattr(
        tune, "conditions", lambda device: dict.fromkeys(("device", "torch", "triton"), "x")
    )
    launch = _tuning.Launch("expand", "few", 300, 700, 9, 2, gated=True)
    chosen = _tuning.Tile(64, 128, 2, 16, 2)
    assert _tuning.linear_tile(launch, CPU) != chosen
    tune.keep([found_tile(launch, chosen)], own)
    assert _tuning.linear_tile(launch, CPU) == chosen
    assert _tuning.linear_tile(launch._replace(tokens=8), CPU) != chosen  # another tile of tokens


@pytest.mark.interpret
def test_what_one_weight_would_take_another_kernel_for_is_not_tuned():
    for kernel, same in (("gemv", True), ("stream", False)):
        launch = _tuning.Launch("expand", kernel, 64, 16, 1, 4)
        assert tune.Case(launch, copies=1, device="cpu").same_kernel() is same


@pytest.mark.parametrize("failure", (PermissionError(13, "denied"), RuntimeError("no home")))
def test_without_a_home_directory(failure, own, monkeypatch, caplog):
    def fails(capability):
        raise failure

    monkeypatch.setattr(_measured, "own_file", fails)
    _measured.measured.cache_clear()
    assert tile("shrink", 4096, 1024).block_r == 2  # as in the package's table
    assert "FSVD_TUNED" in caplog.text


def test_candidates_fit_in_registers():
    gated = _tuning.Launch("expand", "gemv", 1791, 11008, 1, 2, gated=True, vector=8)
    tiles = tune.candidates(gated)
    assert len(tiles) > 4 and len(set(tiles)) == len(tiles)
    for t in tiles:
        assert t.block_k == 2048 and t.block_r * 2 * 2048 * 2 / (32 * t.num_warps) <= 256
    assert tune.candidates(gated._replace(k=20000)) == []
    assert tune.candidates(gated._replace(layout="col")) == []
    assert len(tune.candidates(gated._replace(kernel="skinny"))) > 20


@pytest.mark.interpret
@pytest.mark.parametrize("op, gated", (("shrink", False), ("expand", False), ("expand", True)))
@pytest.mark.parametrize("kernel", ("gemv", "skinny"))
def test_a_tile_is_checked(op, gated, kernel, monkeypatch):
    launch = _tuning.Launch(op, kernel, 120, 70, 2, 4, gated=gated)
    case = tune.Case(launch, copies=1, device="cpu")
    monkeypatch.setattr(case, "replayed", lambda call: 1.0)
    for chosen in tune.candidates(launch)[:3]:
        assert case.us(chosen) == 1.0
    monkeypatch.setattr(tune.Case, "ours", lambda self, weights: self.library(weights) * 1.001)
    with pytest.raises(tune.WrongResultError, match="relative RMS"):
        case.us(chosen)


@pytest.mark.parametrize(
    "wrong", ({"tokens": ()}, {"tokens": (1, 65)}, {"tokens": (0,)}, {"jobs": 0})
)
def test_settings_of_tune(wrong):
    with pytest.raises(BenchError, match="|".join(wrong)):
        tune.Setting(**wrong)


def test_recording_collects_each_launch_once():
    with _tuning.recording() as launches:
        tile("shrink", 40, 30)
        tile("shrink", 40, 30)
        tile("expand", 40, 30)
    assert [launch.op for launch in launches] == ["shrink", "expand"]
    tile("shrink", 41, 30)
    assert len(launches) == 2


def test_attention_splits():
    def splits(batch, kv_heads, length):
        return _tuning.attention_tile(
            batch=batch, kv_heads=kv_heads, rows=4, length=length, dim=128, itemsize=2, device=CPU
        ).splits

    assert splits(1, 1, 100) == 1
    assert splits(1, 1, 4096) > 1
    assert splits(64, 8, 4096) == 1


@pytest.mark.parametrize("streamed", (False, True))
@pytest.mark.parametrize("group", (1, 4))
@pytest.mark.parametrize("batch, kv_heads", ((1, 1), (1, 8), (1, 32), (8, 32), (64, 8)))
def test_decode_attention_programs_fit_side_by_side(batch, kv_heads, group, streamed, h200):
    def tile(length):
        return _tuning.decode_attention_tile(
            streamed=streamed, batch=batch, kv_heads=kv_heads, group=group, length=length, dim=128,
            itemsize=2, device=CPU,
        )  # fmt: skip

    found = tile(8320)
    assert 1 <= found.splits <= 64
    assert found.splits == 1 or found.splits * batch * kv_heads <= 3 * 132
    assert tile(10).splits == 1


@pytest.mark.parametrize("group", (1, 4))
@pytest.mark.parametrize("dim", (64, 128))
def test_streamed_attention_fits_shared_memory(group, dim, h200):
    """Twice in a multiprocessor, and a warp has 16 rows of a block at least."""
    for batch, length in itertools.product((1, 2, 8, 64), (10, 1024, 2048, 2049, 131072)):
        tile = _tuning.decode_attention_tile(
            streamed=True, batch=batch, kv_heads=8, group=group, length=length, dim=dim,
            itemsize=2, device=CPU,
        )  # fmt: skip
        assert tile.block_n >= 16 * tile.num_warps
        used = _stream_attention.shared_bytes(tile.block_n, dim, dim, tile.num_stages)
        assert 2 * used <= 227 * 1024


def test_launches_that_share_a_row_of_a_table_are_tuned_once():
    few = _tuning.Launch("expand", "few", 1024, 4096, 8, 2)
    two, carried, wide = (
        few._replace(**of) for of in ({"tokens": 2}, {"carry": True}, {"tokens": 9})
    )
    assert tune._commonest([two, few, two]) == [few]
    assert tune._commonest([two, few, carried, wide]) == [carried, wide]
    gemv = few._replace(kernel="gemv", tokens=2)
    assert tune._commonest([gemv, gemv._replace(tokens=1), two]) == [
        gemv,
        gemv._replace(tokens=1),
        two,
    ]


def test_splits_of_streamed_attention(h200):
    """What was measured: every program beside the others, fewer of them where four warps read long texts."""

    def tile(batch, kv_heads, group, length):
        return _tuning.decode_attention_tile(
            streamed=True, batch=batch, kv_heads=kv_heads, group=group, length=length, dim=128,
            itemsize=2, device=CPU,
        )  # fmt: skip

    assert tile(1, 32, 1, 1024) == tile(1, 32, 1, 8320) == _tuning.AttentionTile(1, 64, 8, 2, 3)
    assert tile(1, 8, 4, 8320) == _tuning.AttentionTile(1, 64, 26, 4, 3)
    assert tile(1, 8, 4, 2048) == _tuning.AttentionTile(1, 64, 32, 4, 3)
    assert tile(4, 32, 1, 8320).splits == 1 and tile(4, 32, 1, 1024).splits == 2
    assert tile(32, 32, 1, 1024) == _tuning.AttentionTile(1, 32, 1, 2, 2)


def test_decode_attention_of_many_sequences(h200):
    def tile(batch, group=1, itemsize=2, dim=128):
        return _tuning.decode_attention_tile(
            streamed=False, batch=batch, kv_heads=32, group=group, length=1024, dim=dim,
            itemsize=itemsize, device=CPU,
        )  # fmt: skip

    assert tile(8) == _tuning.AttentionTile(1, 128, 1, 4, 2)
    assert tile(16) == tile(64) == _tuning.AttentionTile(1, 64, 1, 2, 2)
    assert tile(1) == _tuning.AttentionTile(1, 64, 8, 4, 2)
    for other in (
        tile(8, itemsize=4),
        tile(16, dim=256),
        tile(16, group=4),
        tile(1, itemsize=4),
        tile(2),
    ):
        assert other.num_stages == 3  # measured for heads of their own in 16-bit types only
