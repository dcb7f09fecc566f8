"""Measurements: the stopwatch, and the benchmarks behind `fsvd-compile bench`.

`decode` is a sub-module, imported where it is used: the stopwatch needs nothing but torch.
"""

from fsvd_compile.bench.stopwatch import Row, add, conditions, load, measure, save, table

__all__ = ["Row", "add", "conditions", "load", "measure", "save", "table"]
