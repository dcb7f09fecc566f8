"""The stopwatch: what is timed, in which order, and what is written down."""

from __future__ import annotations

import json
import time

import pytest
import torch

from fsvd_compile import bench


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


@pytest.mark.parametrize("wrong", [{"variants": {}}, {"rounds": 0}, {"calls": 0}])
def test_refuses_nothing_to_measure(wrong):
    with pytest.raises(ValueError, match="at least 1"):
        bench.measure(**{"variants": {"x": lambda: None}} | wrong)
