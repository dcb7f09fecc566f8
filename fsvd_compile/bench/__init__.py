"""Measurements: the stopwatch, and the benchmarks behind `fsvd-compile bench`.

`decode`, `generate`, `models` and `tune` are sub-modules, imported where they are used: the stopwatch
needs nothing but torch.
"""

from fsvd_compile.bench.stopwatch import (
    Row,
    add,
    check_folder,
    conditions,
    load,
    measure,
    save,
    table,
)

__all__ = ["Row", "add", "check_folder", "conditions", "load", "measure", "save", "table"]
