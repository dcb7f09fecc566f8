"""What is in a checkpoint, as a table."""

from __future__ import annotations

import dataclasses
import pathlib
from collections import Counter
from typing import TYPE_CHECKING

from fsvd_compile.table import aligned, folded, pattern, span

if TYPE_CHECKING:
    from fsvd_compile.families.assemble import Assembly
    from fsvd_compile.families.source import Source


@dataclasses.dataclass(frozen=True)
class Row:
    """One factorized module: its sizes, dtype, and whether its first factor is another module's."""

    name: str
    out_features: int
    in_features: int
    rank: int
    bias: bool
    dtype: str
    shared: bool


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What a checkpoint holds; `print` it for a table with repeated layers folded into one line.

    Attributes:
        path: The checkpoint.
        family: Whose layout it is, and where that comes from.
        architecture: The transformers class it factorizes.
        rows: The factorized modules.
        dense: Names of linear modules that are dense.
        parameters: Parameters of the model as stored, shared factors once.
        dense_parameters: What the same model has without factorization.
        bytes: Of all tensors of the model, shared factors once.
    """

    path: pathlib.Path
    family: str
    source: str
    architecture: str
    rows: tuple[Row, ...]
    dense: tuple[str, ...]
    parameters: int
    dense_parameters: int
    bytes: int

    @classmethod
    def of(cls, source: Source, assembly: Assembly) -> Inspection:
        rows = tuple(
            Row(
                name,
                module.u.shape[0],
                module.v.shape[1],
                module.v.shape[0],
                module.bias is not None,
                str(module.u.dtype).removeprefix("torch."),
                module.owner is not None,
            )
            for name, module in assembly.modules.items()
        )
        state = assembly.state.values()
        dense = sum(row.out_features * (row.in_features + row.bias) for row in rows)
        return cls(
            source.path,
            assembly.family.name,
            assembly.family.source,
            assembly.model_class.__name__,
            rows,
            assembly.dense,
            sum(t.numel() for t in state),
            sum(t.numel() for t in assembly.rest.values()) + dense,
            sum(t.numel() * t.element_size() for t in state),
        )

    def __str__(self) -> str:
        share = self.parameters / max(self.dense_parameters, 1)
        lines = [
            f"{self.path}: {self.family} ({self.source}), {self.architecture}",
            f"{len(self.rows)} factorized modules, {len(self.dense)} dense; parameters "
            f"{self.dense_parameters:,} -> {self.parameters:,} ({share:.3f}), {self.bytes / 1e6:,.1f} MB",
        ]
        cells = [("module", "count", "in", "out", "rank", "bias", "dtype", "shared v")]
        for name, group in folded(self.rows).items():
            fields = ("in_features", "out_features", "rank", "bias", "dtype")
            columns = [span([getattr(row, field) for row in group]) for field in fields]
            cells.append((name, str(len(group)), *columns, str(sum(row.shared for row in group))))
        lines += aligned(cells)
        lines += [f"dense: {name} (x{n})" for name, n in Counter(map(pattern, self.dense)).items()]
        return "\n".join(lines)

    __repr__ = __str__
