"""Tables as text: columns aligned, and the modules of repeated layers folded into one line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any


def aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """One line per row of cells, all rows of the same length: the first column to the left, the rest to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]


def pattern(name: str) -> str:
    """A module's name with layer numbers replaced: the same for all layers."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", name)


def folded(modules: Iterable[Any]) -> dict[str, list[Any]]:
    """Things with a `name`, by the pattern of the name."""
    groups: dict[str, list[Any]] = {}
    for module in modules:
        groups.setdefault(pattern(module.name), []).append(module)
    return groups


def span(values: list) -> str:
    """The value, or the least and the greatest."""
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low}..{high}"
