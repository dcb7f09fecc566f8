"""What `factorize` did, module by module."""

from __future__ import annotations

import dataclasses
import statistics

from fsvd_compile.table import aligned, folded, pattern, span


@dataclasses.dataclass(frozen=True)
class ModuleReport:
    """One factorized module.

    Attributes:
        name: Dotted name in the model.
        in_features: n of the weight `[m, n]`.
        out_features: m of the weight.
        rank: r of the factors `[m, r]` and `[r, n]`.
        keep: The share of parameters that was asked for.
        error: ||(W - U V) X||_F / ||W X||_F on the calibration tokens, before the factors are
            rounded to the module's dtype; X = I without calibration. With feedback ||W X - U V X'||_F
            / ||W X||_F, X' being what the module is called with in the factorized model.
        tokens: Calibration tokens the module saw; 0 means plain SVD.
        feedback: Fitted to the factorized model's own inputs.
        damping: Of the correction that feedback makes, see `feedback.corrected`; None without one.
    """

    name: str
    in_features: int
    out_features: int
    rank: int
    keep: float
    error: float
    tokens: int
    feedback: bool = False
    damping: float | None = None


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One refined layer.

    Attributes:
        name: Dotted name in the model.
        before: Relative error of its output on held-out calibration batches, see `refine.refine_layer`.
        after: The same of what was kept; equal to `before` where refinement did not help.
    """

    name: str
    before: float
    after: float


@dataclasses.dataclass(frozen=True)
class FactorizeReport:
    """The result of `factorize`; `print` it for a table with repeated layers folded into one line.

    Attributes:
        modules: The factorized modules, in model order.
        dense: Linear modules that were left alone: name to reason.
        uncalibrated: Names of factorized modules that no calibration token reached; plain SVD was
            used.
        parameters_before: Distinct parameters of the whole model before.
        parameters_after: The same after.
        seconds: Wall-clock time of the call.
        layers: The refined layers, in model order.
    """

    modules: tuple[ModuleReport, ...]
    dense: dict[str, str]
    uncalibrated: tuple[str, ...]
    parameters_before: int
    parameters_after: int
    seconds: float
    layers: tuple[LayerReport, ...] = ()

    def __str__(self) -> str:
        rows = [("module", "count", "in", "out", "rank", "keep", "error", "tokens")]
        for name, group in folded(self.modules).items():
            columns = [
                [module.in_features for module in group],
                [module.out_features for module in group],
                [module.rank for module in group],
                [f"{module.keep:g}" for module in group],
                [f"{module.error:.4f}" for module in group],
                [module.tokens for module in group],
            ]
            rows.append((name, str(len(group)), *map(span, columns)))
        lines = [
            f"factorized {len(self.modules)} modules in {self.seconds:.1f} s; parameters "
            f"{self.parameters_before:,} -> {self.parameters_after:,} "
            f"({self.parameters_after / max(self.parameters_before, 1):.3f})"
        ]
        if self.modules:
            lines += aligned(rows)
        if behind := [module for module in self.modules if module.feedback]:
            damped = [module.damping for module in behind if module.damping is not None]
            lines.append(
                f"feedback: {len(behind)} of {len(self.modules)} modules fitted to inputs of the "
                f"factorized model, {len(damped)} weights corrected"
                + (f" (damping {min(damped):g} to {max(damped):g})" if damped else "")
            )
        if self.layers:
            before, after = (
                statistics.median(getattr(layer, key) for layer in self.layers)
                for key in ("before", "after")
            )
            kept = sum(layer.after < layer.before for layer in self.layers)
            lines.append(
                f"refined: {kept} of {len(self.layers)} layers; held-out error of the outputs, "
                f"median: {before:.4f} -> {after:.4f}"
            )
        if self.uncalibrated:
            names = ", ".join(sorted({pattern(name) for name in self.uncalibrated}))
            lines.append(
                f"plain SVD, no calibration token reached them ({len(self.uncalibrated)}): {names}"
            )
        reasons: dict[tuple[str, str], int] = {}
        for name, reason in self.dense.items():
            key = (pattern(name), reason)
            reasons[key] = reasons.get(key, 0) + 1
        for (name, reason), count in reasons.items():
            lines.append(f"dense: {name}" + (f" (x{count})" if count > 1 else "") + f": {reason}")
        return "\n".join(lines)

    __repr__ = __str__
