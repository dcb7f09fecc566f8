"""`factorize`: a dense model becomes a factorized one, in place and in closed form."""

from __future__ import annotations

import dataclasses
import itertools
import os
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from fsvd_compile.errors import FactorizeError
from fsvd_compile.factorize.allocate import Spectrum, allocate
from fsvd_compile.factorize.calibration import (
    Covariances,
    check_calibration,
    collect,
    without_cache,
)
from fsvd_compile.factorize.chain import Chain
from fsvd_compile.factorize.closed_form import spectrum
from fsvd_compile.factorize.layerwise import Layerwise
from fsvd_compile.factorize.refine import Refine
from fsvd_compile.factorize.report import FactorizeReport, LayerReport, ModuleReport
from fsvd_compile.factorize.resume import Finished, described
from fsvd_compile.factorize.select import Keep, Select, Target, check_keep, select_targets
from fsvd_compile.factorize.sensitivity import Loss, sensitivities
from fsvd_compile.factorize.swap import computed, decomposed, swapped
from fsvd_compile.factorize.windows import calibration_windows
from fsvd_compile.factorized import LowRankLinear
from fsvd_compile.families.hub import describe

__all__ = [
    "FactorizeReport",
    "LayerReport",
    "ModuleReport",
    "Refine",
    "calibration_windows",
    "factorize",
]


def factorize(
    model: nn.Module,
    keep: Keep = 0.5,
    *,
    calibration: Iterable[torch.Tensor | Mapping[str, Any]] | None = None,
    select: Select = None,
    allocation: str = "uniform",
    loss: Loss | None = None,
    layerwise: bool = False,
    feedback: bool = False,
    refine: Refine | None = None,
    resume: str | os.PathLike | None = None,
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
    distinct input of the selected modules (with `layerwise`, of those of one layer), and the factors.

    Args:
        model: Any module; runs on the device and in the dtype it has, in evaluation mode, without
            gradients.
        keep: The share of parameters the selected weights keep, in (0, 1], or a mapping of glob
            pattern to share: the first pattern that matches a module's name decides, modules
            without one stay dense. r = int(m n keep / (m + n)); where that saves nothing the module
            stays dense, and keep = 1 always means dense.
        calibration: Batches: token tensors `[B, T]` (the model's first argument) or dicts of
            keyword arguments. Tokens with a 0 in a `[B, T]` `attention_mask` do not count. `None`:
            plain SVD. Of text: `calibration_windows`.
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
        layerwise: Collect covariances layer by layer, so that those of one layer are in memory at a time, and
            beside them the hidden states of all calibration tokens, on the CPU where they would take more
            than a quarter of a GPU's free memory. The factors are those of the call without it. For a
            model whose layers are entries of one nn.ModuleList, called in order. A module of several layers
            sees the tokens of the first alone.
        feedback: Go through the model layer by layer and fit each weight to what the dense module gave,
            from what reaches it behind the layers that are factorized already, so that later layers
            make up for earlier ones (AA-SVD's objective, see `feedback.corrected`). For models as with `layerwise`;
            modules outside of the layers, and those a router calls with other tokens than before, are
            fitted without. Held in memory: the activations of
            one layer and batch, covariances of modules that read one tensor (for allocation: of one
            layer), and the hidden states of all calibration tokens three times, on the CPU where they
            would take more than a quarter of a GPU's free memory.
        refine: With feedback, train the factors of each layer after they are fitted, see `Refine`.
        resume: With layerwise or feedback, a directory for finished layers, which an interrupted call with the same
            model, batches and arguments takes from there (`loss` is not compared). Not deleted.
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
    if allocation == "loss" and calibration is None:
        raise FactorizeError(
            "allocation='loss' needs calibration: the loss is computed on its batches."
        )
    for name, given in (("feedback", feedback), ("layerwise", layerwise)):
        if given and calibration is None:
            raise FactorizeError(f"{name}=True needs calibration: it follows its batches.")
    if refine is not None and not feedback:
        raise FactorizeError("refine= needs feedback=True: both go through the model by layers.")
    if refine is not None and not isinstance(refine, Refine):
        raise FactorizeError(
            f"refine={refine!r} has to be a Refine, such as fsvd_compile.Refine(steps=200)."
        )
    layerwise = layerwise or feedback
    if resume is not None and not layerwise:
        raise FactorizeError(
            "resume= needs layerwise=True or feedback=True, which go through the model by layers."
        )
    if resume is not None and not isinstance(resume, (str, os.PathLike)):
        raise FactorizeError(f"resume={resume!r} has to be the path of a directory.")
    if calibration is not None and (layerwise or allocation == "loss"):
        calibration = list(calibration)  # read more than once
    if refine is not None and len(calibration) < 2:
        raise FactorizeError(
            f"refine= needs at least 2 calibration batches, one of them to measure; {len(calibration)} "
            "given. Split the batch."
        )
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
        first, layers = None, []
        if calibration is None or not targets:
            replacements, reports = computed(targets, None, dtype, progress)
        else:
            run = _Run(model, targets, calibration, allocation, loss, dtype, progress, dense)
            with torch.inference_mode(False), without_cache(model):
                replacements, reports, layers, first = (
                    run.by_layers(feedback, refine, resume) if layerwise else run.at_once()
                )
        with swapped(model, replacements, training, first):
            describe(model)
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
        layers=tuple(layers),
    )


MULTIPLE = 8  # of allocated ranks: rows of 16 bytes in 16 bits, which the kernels load at once


Result = tuple[dict[nn.Module, LowRankLinear], list[ModuleReport], list[LayerReport], Any]


@dataclasses.dataclass
class _Run:
    """One call of `factorize` with calibration."""

    model: nn.Module
    targets: list[Target]
    calibration: Iterable[Any]
    allocation: str
    loss: Loss | None
    dtype: torch.dtype
    progress: bool
    dense: dict[str, str]

    def at_once(self) -> Result:
        """All covariances are collected first."""
        covariances, first = self._collect(self.targets)
        targets = self._allocated([(self.targets, covariances)])
        for target in self.targets:
            if target.name in self.dense:
                covariances.pop(target.name)
        replacements, reports = computed(targets, covariances, self.dtype, self.progress)
        return replacements, reports, [], first

    def by_layers(
        self, feedback: bool, refine: Refine | None, resume: str | os.PathLike | None
    ) -> Result:
        """Layer by layer; with feedback behind the layers that are factorized already."""
        finished = None
        if resume is not None:
            options = {
                "allocation": self.allocation, "feedback": feedback, "refine": refine,
                "dtype": self.dtype,
            }  # fmt: skip
            run = described(self.model, self.targets, self.calibration, **options)
            finished = Finished(resume, run)
        chain = Chain(self.model, [target.name for target in self.targets])
        outside = [target for target in self.targets if chain.owner(target.name) is None]
        with chain.recording(len(self.calibration)):
            covariances, first = self._collect(outside)
        layerwise = Layerwise(
            self.model, chain, self.calibration, dtype=self.dtype, progress=self.progress
        )
        targets = self._allocated(
            itertools.chain(layerwise.covariances(self.targets), [(outside, covariances)]), finished
        )
        layers: list[LayerReport] = []
        if feedback:
            replacements, reports, layers = layerwise.fit(targets, refine, finished)
        else:
            replacements, reports = layerwise.compute(targets, finished)
        rest = [target for target in targets if chain.owner(target.name) is None]
        others, more = computed(rest, covariances, self.dtype, self.progress and bool(rest))
        return replacements | others, reports + more, layers, first

    def _collect(self, targets: list[Target]) -> tuple[Covariances, Any]:
        modules = {target.name: target.module for target in targets}
        return collect(
            self.model,
            modules,
            self.calibration,
            dtype=self.dtype,
            progress=self.progress,
            skip_logits=_output_layer(self.model) not in modules.values(),
        )

    def _allocated(
        self,
        parts: Iterable[tuple[list[Target], Covariances]],
        finished: Finished | None = None,
    ) -> list[Target]:
        """The targets with the ranks that the allocation gives; what is better left dense goes to `dense`.

        Modules that no token or gradient reached, such as an expert that was not chosen, keep their rank.

        Args:
            parts: Targets with covariances of them; not read for the uniform allocation, or where the
                ranks are known.
            finished: Where ranks are taken from or written to.
        """
        if self.allocation == "uniform":
            return self.targets
        ranks = None if finished is None else finished.ranks()
        if ranks is None:
            ranks = self._ranks(parts)
            if finished is not None:
                finished.save_ranks(ranks)
        kept = []
        for target in self.targets:
            rank = ranks.get(target.name, target.rank)
            if rank is None:
                self.dense[target.name] = (
                    "allocated: below break-even it would cost more loss than others"
                )
            else:
                m, n = target.weight.shape
                share = rank * (m + n) / (m * n)
                kept.append(dataclasses.replace(target, rank=rank, keep=round(share, 4)))
        return kept

    def _ranks(self, parts: Iterable[tuple[list[Target], Covariances]]) -> dict[str, int | None]:
        modules = {target.name: target.module for target in self.targets}
        weights = sensitivities(
            self.model, modules, self.calibration, self.loss, progress=self.progress
        )
        spectra: dict[str, Spectrum] = {}
        for targets, covariances in parts:
            spectra |= _spectra(targets, weights, covariances, self.dtype)
        budget = sum(t.rank * sum(t.weight.shape) for t in self.targets if t.name in spectra)
        return allocate(spectra, budget, MULTIPLE)


@torch.no_grad()
def _spectra(
    targets: list[Target],
    weights: Mapping[str, float],
    covariances: Covariances,
    dtype: torch.dtype,
) -> dict[str, Spectrum]:
    found = {}
    for target in targets:
        covariance, weight = covariances.get(target.name), weights[target.name]
        if covariance is not None and weight > 0:
            m, n = target.weight.shape
            with decomposed(target, dtype):
                values = spectrum(target.weight.to(dtype), covariance)
            least = min(MULTIPLE, target.rank)
            found[target.name] = Spectrum(values.cpu(), weight, m, n, least)
    return found


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
