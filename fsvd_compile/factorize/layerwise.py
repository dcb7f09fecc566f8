"""Factors layer by layer: in closed form in the dense model, or fitted behind the layers that are factorized already.

In memory at a time: the hidden states of all calibration tokens before one layer, for feedback also behind it and
before it in the factorized model, and the covariances of one layer or the moments of the modules that read one tensor.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from fsvd_compile.factorize.calibration import Covariances, arguments, observing
from fsvd_compile.factorize.chain import Chain
from fsvd_compile.factorize.closed_form import best_factors
from fsvd_compile.factorize.feedback import (
    Moments,
    accumulate,
    corrected,
    error_of,
    inputs_of,
)
from fsvd_compile.factorize.refine import Refine, refine_layer
from fsvd_compile.factorize.report import LayerReport, ModuleReport
from fsvd_compile.factorize.resume import Finished
from fsvd_compile.factorize.select import Target
from fsvd_compile.factorize.swap import computed, decomposed, low_rank
from fsvd_compile.factorized import LowRankLinear


class Layerwise:
    """What is needed to go through a model's layers with its calibration batches.

    Args:
        model: In evaluation mode.
        chain: Recorded with the batches.
        calibration: The batches.
        dtype: Of moments and decompositions.
        progress: Show progress bars.
    """

    def __init__(
        self,
        model: nn.Module,
        chain: Chain,
        calibration: Sequence[Any],
        *,
        dtype: torch.dtype,
        progress: bool,
    ) -> None:
        self.chain, self.dtype, self.progress = chain, dtype, progress
        self.masks = [arguments(model, batch, 0, False)[2] for batch in calibration]
        self.device = next(model.parameters()).device

    def covariances(self, targets: Sequence[Target]) -> Iterator[tuple[list[Target], Covariances]]:
        """The covariances of the dense model, one layer after the other."""
        hidden = self._starts(1)
        for index, layer in self._layers("calibrate"):
            inside = self._inside(targets, index)
            yield inside, self._observed(index, layer, inside, hidden)

    def _observed(
        self, index: int, layer: nn.Module, inside: list[Target], hidden: list[torch.Tensor]
    ) -> Covariances:
        """Covariances of a layer's targets; `hidden` is then behind the layer."""
        found = Covariances(self.dtype)
        with observing(found, {target.name: target.module for target in inside}):
            for batch, mask in enumerate(self.masks):
                with found.batch(batch, mask):
                    hidden[batch] = self._run(index, layer, hidden[batch], batch)
        return found

    def compute(
        self, targets: Sequence[Target], finished: Finished | None = None
    ) -> tuple[dict[nn.Module, LowRankLinear], list[ModuleReport]]:
        """The closed form for every target that lies in a layer, from the dense model's covariances.

        To be called once, as it takes the hidden states of the chain. Layers that are in `finished` are
        taken from there, others are added to it.
        """
        replacements: dict[nn.Module, LowRankLinear] = {}
        reports: list[ModuleReport] = []
        hidden = self._starts(1)
        self.chain.starts.clear()
        for index, layer in self._layers("factorize"):
            inside = [t for t in self._inside(targets, index) if t.module not in replacements]
            done = None if finished is None or not inside else finished.layer(index)
            found = self._observed(index, layer, [] if done else inside, hidden)
            if done is not None:
                made, entries, _ = self._restored(inside, done)
            else:
                made, entries = computed(inside, found, self.dtype, False)
                if finished is not None and inside:
                    finished.save_layer(index, _tensors(inside, made), entries, None)
            replacements |= made
            reports += entries
        return replacements, _ordered(reports, targets)

    def fit(
        self, targets: Sequence[Target], refine: Refine | None, finished: Finished | None = None
    ) -> tuple[dict[nn.Module, LowRankLinear], list[ModuleReport], list[LayerReport]]:
        """Factors of every target that lies in a layer, and reports of modules and refined layers.

        To be called once, as it takes the hidden states of the chain. Layers that are in `finished`
        are taken from there, others are added to it.
        """
        replacements: dict[nn.Module, LowRankLinear] = {}
        reports: list[ModuleReport] = []
        layers: list[LayerReport] = []
        dense = self._starts(3)
        ours = list(dense)
        self.chain.starts.clear()
        for index, layer in self._layers("factorize"):
            inside = [t for t in self._inside(targets, index) if t.module not in replacements]
            student = _copied(layer, replacements)
            after = self._advanced(index, layer, dense)
            done = None if finished is None or not inside else finished.layer(index)
            if done is not None:
                made, entries, entry = self._restored(inside, done)
                for target in inside:
                    self._put(student, index, target, made[target.module])
            else:
                made, entries = self._factors(index, layer, student, inside, dense, ours)
                entry = None
                if refine is not None and inside:
                    entry = self._refined(refine, index, student, ours, after)
                if finished is not None and inside:
                    finished.save_layer(index, _tensors(inside, made), entries, entry)
            replacements |= made
            reports += entries
            layers += [] if entry is None else [entry]
            # Before the first factors both models are one.
            ours = self._advanced(index, student, ours) if replacements else list(after)
            dense = after
        return replacements, _ordered(reports, targets), layers

    def _factors(
        self,
        index: int,
        layer: nn.Module,
        student: nn.Module,
        inside: list[Target],
        dense: list[torch.Tensor],
        ours: list[torch.Tensor],
    ) -> tuple[dict[nn.Module, LowRankLinear], list[ModuleReport]]:
        """Fits the modules of a layer and puts them into `student`, each behind the ones before it."""
        replacements, reports = {}, []
        for group, once in self._rounds(index, layer, inside, dense[0]):
            moments = self._moments(index, layer, student, group, dense, ours, once)
            for target in group:
                made, report = self._fitted(target, moments.pop(target.name))
                replacements[target.module] = made
                reports.append(report)
                self._put(student, index, target, made)
        return replacements, reports

    def _put(self, student: nn.Module, index: int, target: Target, made: LowRankLinear) -> None:
        place, _, child = self._relative(target, index).rpartition(".")
        setattr(student.get_submodule(place), child, made)

    def _restored(
        self,
        inside: list[Target],
        done: tuple[dict[str, torch.Tensor], list[ModuleReport], LayerReport | None],
    ) -> tuple[dict[nn.Module, LowRankLinear], list[ModuleReport], LayerReport | None]:
        tensors, reports, entry = done
        made = {}
        for target in inside:
            u, v = (tensors[f"{target.name}.{key}"].to(target.weight.device) for key in "uv")
            made[target.module] = low_rank(target.module, u, v)
        return made, reports, entry

    def _layers(self, title: str) -> Iterator[tuple[int, nn.Module]]:
        bar = tqdm(self.chain.layers, title, disable=not self.progress, unit="layer")
        yield from enumerate(bar)

    def _inside(self, targets: Sequence[Target], index: int) -> list[Target]:
        return [target for target in targets if self.chain.owner(target.name) == index]

    def _relative(self, target: Target, index: int) -> str:
        return target.name[len(self.chain.name(index)) + 1 :]

    def _starts(self, copies: int) -> list[torch.Tensor]:
        device = self.chain.store(copies)
        return [start.to(device) for start in self.chain.starts]

    def _run(self, index: int, layer: Callable, hidden: torch.Tensor, batch: int) -> torch.Tensor:
        """One layer on one batch; the result lies where the hidden states are kept."""
        with torch.no_grad():
            return self.chain.run(index, layer, hidden, batch).to(hidden.device)

    def _advanced(
        self, index: int, layer: nn.Module, hidden: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        return [self._run(index, layer, states, batch) for batch, states in enumerate(hidden)]

    def _rounds(
        self, index: int, layer: nn.Module, inside: list[Target], hidden: torch.Tensor
    ) -> Iterator[tuple[list[Target], bool]]:
        """Targets that are called with the same tensor, in the order of calls, and whether just once each.

        What the first batch does not reach comes last.
        """
        modules = {target.name: target.module for target in inside}
        by_name = {target.name: target for target in inside}
        seen = inputs_of(modules, lambda: self._run(index, layer, hidden, 0), stop=False)
        groups: dict[tuple[int, ...], list[Target]] = {}
        for name, inputs in seen.items():
            groups.setdefault(tuple(map(id, inputs)), []).append(by_name[name])
        for key, group in groups.items():
            yield group, len(key) == 1
        if rest := [target for target in inside if target.name not in seen]:
            yield rest, False

    @torch.no_grad()
    def _moments(
        self,
        index: int,
        layer: nn.Module,
        student: nn.Module,
        group: list[Target],
        dense: list[torch.Tensor],
        ours: list[torch.Tensor],
        once: bool,
    ) -> dict[str, Moments]:
        before = {target.name: target.module for target in group}
        after = {t.name: student.get_submodule(self._relative(t, index)) for t in group}
        weights = {target.name: target.weight for target in group}
        moments = {target.name: Moments() for target in group}
        for batch, mask in enumerate(self.masks):
            old, new = (
                inputs_of(m, lambda r=r, h=h, b=batch: self._run(index, r, h, b), stop=once)
                for m, r, h in ((before, layer, dense[batch]), (after, student, ours[batch]))
            )
            with torch.autocast(self.device.type, enabled=False):
                accumulate(
                    moments,
                    weights,
                    old,
                    new,
                    shape=dense[batch].shape,
                    mask=mask,
                    dtype=self.dtype,
                    batch=batch,
                    batches=len(self.masks),
                )
        return moments

    @torch.no_grad()
    def _fitted(self, target: Target, moments: Moments) -> tuple[LowRankLinear, ModuleReport]:
        weight = target.weight.to(self.dtype)
        damping, paired = None, moments.shift is not None and moments.tokens > 0
        with decomposed(target, self.dtype):
            if moments.tokens:
                better, damping = corrected(weight, moments)
                u, v, _ = best_factors(better, moments.covariance(), target.rank, moments.tokens)
                error = error_of(weight, u @ v, moments)
            else:
                u, v, error = best_factors(weight, None, target.rank)
        m, n = weight.shape
        report = ModuleReport(
            target.name, n, m, target.rank, target.keep, error, moments.tokens, paired, damping
        )
        return low_rank(target.module, u, v), report

    def _refined(
        self,
        refine: Refine,
        index: int,
        student: nn.Module,
        ours: list[torch.Tensor],
        expected: list[torch.Tensor],
    ) -> LayerReport:
        def run(layer: Callable, batch: int) -> torch.Tensor:
            return self.chain.run(index, layer, ours[batch], batch)

        before, after = refine_layer(student, run, expected, self.masks, refine, seed=index)
        return LayerReport(self.chain.name(index), before, after)


def _ordered(reports: list[ModuleReport], targets: Sequence[Target]) -> list[ModuleReport]:
    order = {target.name: place for place, target in enumerate(targets)}
    return sorted(reports, key=lambda report: order[report.name])


def _tensors(
    targets: list[Target], made: Mapping[nn.Module, LowRankLinear]
) -> dict[str, torch.Tensor]:
    found = {}
    for target in targets:
        found[f"{target.name}.u"] = made[target.module].u.weight
        found[f"{target.name}.v"] = made[target.module].v.weight
    return found


def _copied(layer: nn.Module, replacements: Mapping[nn.Module, LowRankLinear]) -> nn.Module:
    """A layer with the same parameters, not copies, and factors where its modules have them already."""
    memo: dict[int, Any] = {id(old): new for old, new in replacements.items()}
    memo |= {id(tensor): tensor for tensor in (*layer.parameters(), *layer.buffers())}
    return copy.deepcopy(layer, memo)
