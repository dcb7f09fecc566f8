"""Ranks under one budget for all modules: where a column of a factor saves the most loss for its parameters."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import NamedTuple

import torch


class Spectrum(NamedTuple):
    """What a module's ranks are worth.

    Attributes:
        values: Squared error that each direction saves, falling: the eigenvalues of W C W^T, `[min(m, n)]`.
        weight: Loss per squared error of an output, see `sensitivity`.
        out_features: m.
        in_features: n.
        least: The rank it has in any case.
    """

    values: torch.Tensor
    weight: float
    out_features: int
    in_features: int
    least: int


def allocate(spectra: Mapping[str, Spectrum], budget: int, multiple: int) -> dict[str, int | None]:
    """The rank of every module, or None for those that stay dense.

    To second order in a module's error, with the same curvature in every direction of its output, dropping
    direction i costs the loss `weight * values[i]`. Directions are taken in the order of what they save
    per parameter, `multiple` of a module at a time, until the budget is spent: greedy, and best for falling
    values up to the last block that fits. At its break-even rank a module becomes dense, which costs
    m n and loses nothing.

    Args:
        spectra: By module name.
        budget: Parameters of all modules together.
        multiple: Ranks are multiples of it (the last block of a module may be shorter).

    Returns:
        Ranks of at least `least`, or None; the sum of their parameters is at most the budget if the
        least ranks fit into it.
    """
    ranks: dict[str, int | None] = {}
    heap: list[tuple[float, str]] = []
    left = budget
    for name, spectrum in spectra.items():
        ranks[name] = spectrum.least
        left -= ranks[name] * (spectrum.out_features + spectrum.in_features)
        _offer(heap, name, spectrum, ranks[name], multiple)
    while heap:
        _, name = heapq.heappop(heap)
        spectrum = spectra[name]
        grown, cost, _ = _step(spectrum, ranks[name], multiple)
        if cost > max(left, 0):
            continue  # a smaller module may still grow
        left -= cost
        ranks[name] = grown
        if grown is not None:
            _offer(heap, name, spectrum, grown, multiple)
    return ranks


def _step(spectrum: Spectrum, rank: int, multiple: int) -> tuple[int | None, int, float]:
    """(rank after the next block, or None for dense; its parameters; the loss it saves)."""
    m, n = spectrum.out_features, spectrum.in_features
    grown = min((rank // multiple + 1) * multiple, len(spectrum.values))
    if grown * (m + n) < m * n:
        saved = spectrum.values[rank:grown].sum().item()
        return grown, (grown - rank) * (m + n), spectrum.weight * saved
    return None, m * n - rank * (m + n), spectrum.weight * spectrum.values[rank:].sum().item()


def _offer(
    heap: list[tuple[float, str]], name: str, spectrum: Spectrum, rank: int, multiple: int
) -> None:
    grown, cost, saved = _step(spectrum, rank, multiple)
    if grown != rank:
        heapq.heappush(heap, (-saved / max(cost, 1), name))
