"""`factorize`: a dense model becomes a factorized one, in place and in closed form."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from fsvd_compile.errors import FactorizeError
from fsvd_compile.factorize.allocate import Spectrum, allocate
from fsvd_compile.factorize.calibration import Covariances, check_calibration, collect, replay
from fsvd_compile.factorize.closed_form import best_factors, spectrum
from fsvd_compile.factorize.report import FactorizeReport, ModuleReport
from fsvd_compile.factorize.select import Keep, Select, Target, check_keep, select_targets
from fsvd_compile.factorize.sensitivity import Loss, sensitivities
from fsvd_compile.factorized import LowRankLinear

__all__ = ["FactorizeReport", "ModuleReport", "factorize"]


def factorize(
    model: nn.Module,
    keep: Keep = 0.5,
    *,
    calibration: Iterable[torch.Tensor | Mapping[str, Any]] | None = None,
    select: Select = None,
    allocation: str = "uniform",
    loss: Loss | None = None,
    progress: bool = True,
    dtype: torch.dtype = torch.float64,
) -> FactorizeReport:
    """Replaces linear modules by `LowRankLinear`, in place, with the best factors for given data.

    For each weight W `[m, n]` and the inputs X its module sees, the rank-r factors minimise
    ||(W - U V) X||_F (see `closed_form.best_factors`; the optimum of SVD-LLM, arXiv 2403.07378).
    Without calibration, and for modules no calibration token reaches, this is the
    truncated SVD of W.

    All factors are computed before the first module is swapped: whatever goes wrong, also an
    interrupt, leaves the model as it was. Held in memory meanwhile: one n x n matrix of `dtype` per
    distinct input of the selected modules, and the factors.

    Args:
        model: Any module; runs on the device and in the dtype it has, in evaluation mode, without
            gradients.
        keep: The share of parameters the selected weights keep, in (0, 1], or a mapping of glob
            pattern to share: the first pattern that matches a module's name decides, modules
            without one stay dense. r = int(m n keep / (m + n)); where that saves nothing the module
            stays dense, and keep = 1 always means dense.
        calibration: Batches: token tensors `[B, T]` (the model's first argument) or dicts of
            keyword arguments. Tokens with a 0 in a `[B, T]` `attention_mask` do not count. `None`:
            plain SVD.
        select: A predicate `(name, module) -> bool` or glob patterns of module names. By default
            every nn.Linear and transformers Conv1D except the output embeddings. Modules whose
            weight is tied to another stay dense in any case.
        allocation: "uniform" gives every module its own `keep`. "loss" takes the parameters that this
            would leave as one budget and gives ranks, multiples of 8, where they save the most loss:
            modules that matter stay dense, others go far below. It runs the calibration batches
            once more, forward and backward, and decomposes each weight twice. See
            `allocate.allocate` and `sensitivity.sensitivities`.
        loss: For "loss": `(model, batch) -> scalar`. By default the model's own, from `labels` in a
            batch or, for language models, from its tokens.
        progress: Show progress bars on stderr.
        dtype: Of covariances and decompositions: float64, or float32 for half the memory, which
            loses small eigenvalues (and more with TF32 enabled).

    Returns:
        Ranks, errors, what stayed dense and why; `print` it.

    Raises:
        FactorizeError: an argument is wrong, a weight or activation is NaN or inf, nothing is
            selected, the model rejects a batch before or after the change, or a decomposition
            fails. Nothing has changed.
    """
    start = time.perf_counter()
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    check_keep(keep)
    check_calibration(calibration)
    if dtype not in (torch.float64, torch.float32):
        raise FactorizeError(f"dtype={dtype} is not supported; use torch.float64 or torch.float32.")
    if allocation not in ("uniform", "loss"):
        raise FactorizeError(f'allocation={allocation!r}; it has to be "uniform" or "loss".')
    if allocation == "loss":
        if calibration is None:
            raise FactorizeError(
                "allocation='loss' needs calibration: the loss is computed on its batches."
            )
        calibration = list(calibration)  # read twice
    chosen, dense = select_targets(model, keep, select)
    targets = [target for target in chosen if target.rank is not None]
    for target in chosen:
        if target.rank is None:
            m, n = target.weight.shape
            dense[target.name] = f"no rank saves parameters at keep={target.keep:g} ([{m}, {n}])"
        else:
            _check_weights(target)

    before = _count(model)
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        covariances, first = None, None
        if calibration is not None and targets:
            modules = {target.name: target.module for target in targets}
            covariances, first = collect(
                model,
                modules,
                calibration,
                dtype=dtype,
                progress=progress,
                skip_logits=_output_layer(model) not in modules.values(),
            )
            if allocation == "loss":
                weights = sensitivities(model, modules, calibration, loss, progress=progress)
                targets = _allocated(targets, weights, covariances, dtype, dense)
        replacements, reports = _compute(targets, covariances, dtype, progress)
        _swap(model, replacements, training, first)
    finally:
        for module, mode in training.items():
            module.training = mode
    return FactorizeReport(
        modules=tuple(reports),
        dense=dense,
        uncalibrated=tuple(r.name for r in reports if not r.tokens and calibration is not None),
        parameters_before=before,
        parameters_after=_count(model),
        seconds=time.perf_counter() - start,
    )


MULTIPLE = 8  # of allocated ranks: rows of 16 bytes in 16 bits, which the kernels load at once


@torch.no_grad()
def _allocated(
    targets: list[Target],
    weights: Mapping[str, float],
    covariances: Covariances,
    dtype: torch.dtype,
    dense: dict[str, str],
) -> list[Target]:
    """The targets with ranks under the budget of their own; what is better left dense goes to `dense`.

    Modules that no token or gradient reached, such as an expert that was not chosen, keep their rank.
    """
    spectra, budget = {}, 0
    for target in targets:
        covariance, weight = covariances.get(target.name), weights[target.name]
        if covariance is not None and weight > 0:
            m, n = target.weight.shape
            with _decomposed(target, dtype):
                values = spectrum(target.weight.to(dtype), covariance)
            least = min(MULTIPLE, target.rank)
            spectra[target.name] = Spectrum(values.cpu(), weight, m, n, least)
            budget += target.rank * (m + n)
    ranks = allocate(spectra, budget, MULTIPLE)
    kept = []
    for target in targets:
        rank = ranks.get(target.name, target.rank)
        if rank is None:
            dense[target.name] = "allocated: below break-even it would cost more loss than others"
            covariances.pop(target.name)
        else:
            m, n = target.weight.shape
            share = rank * (m + n) / (m * n)
            kept.append(dataclasses.replace(target, rank=rank, keep=round(share, 4)))
    return kept


# Inference tensors would be refused by autograd ever after.
@torch.inference_mode(False)
@torch.no_grad()
def _compute(
    targets: list[Target], covariances: Covariances | None, dtype: torch.dtype, progress: bool
) -> tuple[dict[nn.Module, LowRankLinear], list[ModuleReport]]:
    replacements: dict[nn.Module, LowRankLinear] = {}
    reports: list[ModuleReport] = []
    for target in tqdm(targets, "factorize", disable=not progress, unit="module"):
        covariance, tokens = covariances.pop(target.name) if covariances else (None, 0)
        weight = target.weight.to(dtype)
        with _decomposed(target, dtype):
            u, v, error = best_factors(weight, covariance, target.rank)
        replacements[target.module] = _low_rank(target.module, u, v)
        m, n = weight.shape
        reports.append(ModuleReport(target.name, n, m, target.rank, target.keep, error, tokens))
    return replacements, reports


@contextlib.contextmanager
def _decomposed(target: Target, dtype: torch.dtype) -> Iterator[None]:
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


def _low_rank(module: nn.Module, u: torch.Tensor, v: torch.Tensor) -> LowRankLinear:
    old = module.weight
    made = LowRankLinear.from_factors(u.to(old.dtype), v.to(old.dtype), module.bias)
    made.u.weight.requires_grad_(old.requires_grad)
    made.v.weight.requires_grad_(old.requires_grad)
    return made.train(module.training)


def _swap(
    model: nn.Module,
    replacements: dict[nn.Module, LowRankLinear],
    training: dict[nn.Module, bool],
    batch: Any,
) -> None:
    """Puts the factors in place of every occurrence of the old modules, or changes nothing."""
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
            replay(model, batch)
    except BaseException as error:
        for parent, key, child in places:
            setattr(parent, key, child)
        if isinstance(error, Exception):
            raise FactorizeError(
                "The model ran with its dense modules but does not run with the factorized ones: "
                f"{type(error).__name__}: {error}. Where a model reads an attribute of a linear "
                "module directly (`.weight` in the traceback above), leave that module out with "
                "select=."
            ) from error
        raise
    for old, new in replacements.items():
        new.train(training[old])


def _check_weights(target: Target) -> None:
    for key, parameter in target.module.named_parameters(recurse=False):
        name = f"{target.name}.{key}"
        if parameter.device.type == "meta":
            raise FactorizeError(
                f"{name} is on the meta device, it has no values; load the weights before "
                "factorize."
            )
        if not torch.isfinite(parameter).all():
            raise FactorizeError(
                f"{name} holds NaN or inf; reload the checkpoint, or leave the module out with "
                "select=."
            )


def _output_layer(model: nn.Module) -> nn.Module | None:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
