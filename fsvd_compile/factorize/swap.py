"""Factors in the place of linear modules: built, put in, and taken out again if the model does not run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from fsvd_compile.errors import FactorizeError
from fsvd_compile.factorize.calibration import Covariances, replay
from fsvd_compile.factorize.closed_form import best_factors
from fsvd_compile.factorize.report import ModuleReport
from fsvd_compile.factorize.select import Target
from fsvd_compile.factorized import LowRankLinear


@contextlib.contextmanager
def decomposed(target: Target, dtype: torch.dtype) -> Iterator[None]:
    """Around a decomposition of a target's weight; whatever fails in it becomes a FactorizeError."""
    try:
        with torch.autocast(target.weight.device.type, enabled=False):
            yield
    except torch.linalg.LinAlgError as failure:
        raise FactorizeError(
            f"The eigendecomposition for {target.name!r} ({list(target.weight.shape)}, {dtype}) "
            f"failed: {failure}. Use dtype=torch.float64, more calibration tokens, or leave the "
            "module out with select=."
        ) from failure


def low_rank(module: nn.Module, u: torch.Tensor, v: torch.Tensor) -> LowRankLinear:
    old = module.weight
    made = LowRankLinear.from_factors(u.to(old.dtype), v.to(old.dtype), module.bias)
    made.u.weight.requires_grad_(old.requires_grad)
    made.v.weight.requires_grad_(old.requires_grad)
    return made.train(module.training)


# Inference tensors would be refused by autograd ever after.
@torch.inference_mode(False)
@torch.no_grad()
def computed(
    targets: Sequence[Target], covariances: Covariances | None, dtype: torch.dtype, progress: bool
) -> tuple[dict[nn.Module, LowRankLinear], list[ModuleReport]]:
    """The closed form for each target, with what stands in its place; its covariance is taken out and freed."""
    replacements: dict[nn.Module, LowRankLinear] = {}
    reports: list[ModuleReport] = []
    for target in tqdm(targets, "factorize", disable=not progress, unit="module"):
        covariance, tokens = covariances.pop(target.name) if covariances else (None, 0)
        weight = target.weight.to(dtype)
        with decomposed(target, dtype):
            u, v, error = best_factors(weight, covariance, target.rank, tokens)
        replacements[target.module] = low_rank(target.module, u, v)
        m, n = weight.shape
        reports.append(ModuleReport(target.name, n, m, target.rank, target.keep, error, tokens))
    return replacements, reports


@contextlib.contextmanager
def swapped(
    model: nn.Module,
    replacements: dict[nn.Module, LowRankLinear],
    training: dict[nn.Module, bool],
    batch: Any,
) -> Iterator[None]:
    """Puts the factors in place of every occurrence of the old modules, for good if the block ends without an error."""
    places = [
        (parent, key, child)
        for parent in model.modules()
        for key, child in parent._modules.items()
        if child in replacements
    ]
    try:
        for parent, key, child in places:
            setattr(parent, key, replacements[child])
        if batch is not None:
            # A model may read a linear's weight directly; better to hear of it now.
            try:
                replay(model, batch)
            except Exception as error:
                raise FactorizeError(
                    "The model ran with its dense modules but does not run with the factorized ones: "
                    f"{type(error).__name__}: {error}. Where a model reads an attribute of a linear "
                    "module directly (`.weight` in the traceback above), leave that module out with "
                    "select=."
                ) from error
        yield
    except BaseException:
        for parent, key, child in places:
            setattr(parent, key, child)
        raise
    for old, new in replacements.items():
        new.train(training[old])
