"""What is in a checkpoint, as a table."""

from __future__ import annotations

import dataclasses
import pathlib
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fsvd_compile.families.native import BRANCH
from fsvd_compile.table import aligned, folded, pattern, span

if TYPE_CHECKING:
    from fsvd_compile.families.assemble import Assembly, Module
    from fsvd_compile.families.disguise import Disguised
    from fsvd_compile.families.lora import Adapted
    from fsvd_compile.families.source import Source


@dataclasses.dataclass(frozen=True)
class Row:
    """One factorized module or branch: its sizes, dtype, and whether its first factor is another module's."""

    name: str
    out_features: int
    in_features: int
    rank: int
    bias: bool
    dtype: str
    shared: bool


@dataclasses.dataclass(frozen=True)
class Recovered:
    """A dense weight that is the product of two factors, see `disguise.undisguised`."""

    name: str
    rank: int
    error: float


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What a checkpoint holds; `print` it for a table with repeated layers folded into one line.

    Attributes:
        path: The checkpoint.
        family: Whose layout it is, and where that comes from.
        architecture: The transformers class it factorizes.
        rows: The factorized modules.
        branches: The low-rank pairs that lie beside dense weights, named `<module>.branch`.
        dense: Names of linear modules that are dense, also with a branch.
        multiplied: The ranks of those of `dense` that the checkpoint holds as factors, which were multiplied
            out as they are no smaller as a pair.
        adapted: What became of a LoRA adapter, None without one.
        disguised: Those of `dense` whose weights are of low rank; empty where that was not looked for.
        recovered: Those of `rows` whose factors come from a dense weight.
        parameters: Parameters of the model as stored, shared factors once.
        dense_parameters: What the same model has without factorization and branches.
        bytes: Of all tensors of the model, shared factors once.
    """

    path: pathlib.Path
    family: str
    source: str
    architecture: str
    rows: tuple[Row, ...]
    branches: tuple[Row, ...]
    dense: tuple[str, ...]
    multiplied: dict[str, int]
    adapted: Adapted | None
    disguised: tuple[Recovered, ...]
    recovered: tuple[Recovered, ...]
    parameters: int
    dense_parameters: int
    bytes: int

    @classmethod
    def of(
        cls, source: Source, assembly: Assembly, disguised: Mapping[str, Disguised] | None = None
    ) -> Inspection:
        """Of an assembly, and what `assemble.disguises` found in it."""
        beside = {f"{name}{BRANCH}" for name in assembly.branches}
        found = {name: _row(name, module) for name, module in assembly.modules.items()}
        rows = tuple(row for name, row in found.items() if name not in beside)
        state = assembly.state.values()
        dense = sum(row.out_features * (row.in_features + row.bias) for row in rows)
        return cls(
            source.path,
            assembly.family.name,
            assembly.family.source,
            assembly.model_class.__name__,
            rows,
            tuple(row for name, row in found.items() if name in beside),
            tuple(assembly.dense),
            dict(assembly.multiplied),
            assembly.adapted,
            tuple(Recovered(name, f.rank, f.error) for name, f in (disguised or {}).items()),
            tuple(Recovered(name, f.rank, f.error) for name, f in assembly.recovered.items()),
            sum(t.numel() for t in state),
            sum(t.numel() for t in assembly.rest.values()) + dense,
            sum(t.numel() * t.element_size() for t in state),
        )

    def __str__(self) -> str:
        share = self.parameters / max(self.dense_parameters, 1)
        branched = f", {len(self.branches)} of them with a branch" if self.branches else ""
        lines = [
            f"{self.path}: {self.family} ({self.source}), {self.architecture}",
            f"{len(self.rows)} factorized modules, {len(self.dense)} dense{branched}; parameters "
            f"{self.dense_parameters:,} -> {self.parameters:,} ({share:.3f}), {self.bytes / 1e6:,.1f} MB",
        ]
        cells = [("module", "count", "in", "out", "rank", "bias", "dtype", "shared v")]
        for name, group in folded((*self.rows, *self.branches)).items():
            fields = ("in_features", "out_features", "rank", "bias", "dtype")
            columns = [span([getattr(row, field) for row in group]) for field in fields]
            cells.append((name, str(len(group)), *columns, str(sum(row.shared for row in group))))
        lines += aligned(cells) if len(cells) > 1 else []
        lines += [] if self.adapted is None else [str(self.adapted)]
        lines += _recovered("recovered from a dense weight", self.recovered)
        told = {*self.multiplied, *(r.name for r in self.disguised)}
        dense = (name for name in self.dense if name not in told)
        lines += [f"dense: {name} (x{n})" for name, n in Counter(map(pattern, dense)).items()]
        lines += _multiplied(self.multiplied)
        lines += _recovered("dense in disguise", self.disguised)
        return "\n".join(lines)

    __repr__ = __str__


def _row(name: str, module: Module) -> Row:
    return Row(
        name,
        module.u.shape[0],
        module.v.shape[1],
        module.v.shape[0],
        module.bias is not None,
        str(module.u.dtype).removeprefix("torch."),
        module.owner is not None,
    )


def _recovered(what: str, modules: tuple[Recovered, ...]) -> list[str]:
    return [
        f"{what}: {name} (x{len(group)}), rank {span([r.rank for r in group])}, relative error up to "
        f"{max(r.error for r in group):.1e}"
        for name, group in folded(modules).items()
    ]


def _multiplied(modules: Mapping[str, int]) -> list[str]:
    ranks: dict[str, list[int]] = {}
    for name, rank in modules.items():
        ranks.setdefault(pattern(name), []).append(rank)
    return [
        f"multiplied out, as a pair of factors is no smaller: {name} (x{len(group)}), rank {span(group)}"
        for name, group in ranks.items()
    ]
