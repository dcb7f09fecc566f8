"""The stopwatch: what is timed, in which order, and what is written down."""

from __future__ import annotations

import itertools
import json
import time

import pytest
import torch

from fsvd_compile import bench
from fsvd_compile.errors import BenchError


def test_blocks_are_interleaved_and_prepared():
    log = []
    rows = bench.measure(
        {name: lambda name=name: log.append(name) for name in "ab"},
        before={"a": lambda: log.append("reset")},
        rounds=2,
        calls=2,
        warmup=1,
        tokens=7,
        batch=3,
    )
    block = ["reset", "a", "a", "a", "b", "b", "b"]
    assert log == ["reset", "a", "b", *block, *block]
    assert [(row.name, row.calls, row.tokens) for row in rows] == [("a", 4, 7), ("b", 4, 7)]
    assert rows[0].conditions["batch"] == 3


def test_times_are_milliseconds():
    rows = bench.measure({"sleep": lambda: time.sleep(0.02)}, rounds=3, calls=1, tokens=4)
    (row,) = rows
    assert 20 <= row.p20_ms <= row.median_ms <= row.p80_ms < 200
    assert row.tokens_per_s == pytest.approx(4000 / row.median_ms)


def test_conditions_and_json(tmp_path):
    rows = bench.measure({"x": lambda: None}, rounds=1, calls=1, dtype=torch.bfloat16, context=64)
    bench.save(rows, tmp_path / "rows.json")
    (entry,) = json.loads((tmp_path / "rows.json").read_text())
    found = entry["conditions"]
    assert found["torch"] == torch.__version__ and found["threads"] == torch.get_num_threads()
    assert found["dtype"] == "bfloat16" and found["context"] == 64 and found["device"]
    assert {"name", "median_ms", "p20_ms", "p80_ms", "calls", "tokens_per_s"} <= entry.keys()


def test_table_compares_with_the_first_row():
    common = {"p20_ms": 1.0, "p80_ms": 2.0, "calls": 5, "tokens": 1, "conditions": {"batch": 1}}
    rows = [bench.Row("slow", 10.0, **common), bench.Row("fast", 4.0, **common)]
    lines = bench.table(rows).splitlines()
    assert lines[0] == "batch 1"
    assert lines[3].split() == ["fast", "4.00", "1.00..2.00", "250.0", "2.50x"]
    assert bench.table([]) == "(nothing measured)"


def test_wall_times_blocks():
    """A block of three calls of 10, 20 and 30 ms is one sample of 20 ms."""
    pauses = itertools.cycle([0.0, 0.01, 0.02, 0.03])  # the first call of a block is not timed
    (row,) = bench.measure(
        {"x": lambda: time.sleep(next(pauses))}, rounds=2, calls=3, warmup=0, timer="wall"
    )
    assert 20 <= row.p20_ms <= row.p80_ms < 60 and row.calls == 6
    assert row.conditions["timer"] == "wall" and row.conditions["block"] == 3


def test_timers_are_told_apart():
    rows = [bench.measure({"x": lambda: None}, timer=timer)[0] for timer in ("event", "wall")]
    assert [row.conditions["timer"] for row in rows] == ["event", "wall"]
    with pytest.raises(ValueError, match=r"timer='sun'.*\"event\" or \"wall\""):
        bench.measure({"x": lambda: None}, timer="sun")


def row(name, ms=1.0, extra=None, **conditions) -> bench.Row:
    return bench.Row(name, ms, ms, ms, 5, 1, conditions, extra or {})


def test_add_replaces_the_same_name_and_conditions(tmp_path):
    path = tmp_path / "rows.json"
    bench.add([row("a", 1.0, batch=1), row("b", 2.0, batch=1)], path)
    bench.add([row("a", 3.0, {"error": 0.5}, batch=1), row("a", 4.0, batch=2)], path)
    entries = bench.load(path)
    found = [(e["name"], e["conditions"]["batch"], e["median_ms"]) for e in entries]
    assert found == [("a", 1, 3.0), ("b", 1, 2.0), ("a", 2, 4.0)]
    assert entries[0]["error"] == 0.5 and "extra" not in entries[0]
    assert [p.name for p in tmp_path.iterdir()] == ["rows.json"]


def test_add_fails_without_harming_the_file(tmp_path):
    path = tmp_path / "rows.json"
    bench.add([row("a")], path)
    before = path.read_text()
    with pytest.raises(TypeError):
        bench.add([row("a", extra={"x": object()})], path)
    assert path.read_text() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("text", ["no json", '{"a": 1}', '[{"name": "a"}]', "[1]"])
def test_load_refuses_other_files(tmp_path, text):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(BenchError, match=r"rows\.json .*another file"):
        bench.load(path)
    with pytest.raises(BenchError, match="another file"):
        bench.add([row("a")], path)
    assert path.read_text() == text


def test_load_of_nothing(tmp_path):
    assert bench.load(tmp_path / "rows.json") == []
    with pytest.raises(BenchError, match="no folder"):
        bench.load(tmp_path / "missing" / "rows.json")


@pytest.mark.parametrize("wrong", [{"variants": {}}, {"rounds": 0}, {"calls": 0}])
def test_refuses_nothing_to_measure(wrong):
    with pytest.raises(ValueError, match="at least 1"):
        bench.measure(**{"variants": {"x": lambda: None}} | wrong)
