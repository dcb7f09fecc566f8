"""Error feedback: a weight is fitted to what the dense module gave, from what reaches the factorized one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import nn

from fsvd_compile.errors import FactorizeError
from fsvd_compile.factorize.calibration import tokens_of

# Of the mean of the diagonal, as GPTQ's damping is given (arXiv 2210.17323, section 3.3).
DAMPING = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)


class Moments:
    """Sums over the calibration tokens that reach one module, in two folds.

    x is the input in the dense model, x' that behind the layers that are factorized already.

    Attributes:
        gram: sum x' x'^T by fold, `[in, in]`.
        shift: sum (x - x') x'^T by fold, `[in, in]`; `None` where x and x' are not the same tokens, as
            behind a router that decides differently.
        output: sum |W x|^2.
        drift: sum |W (x - x')|^2.
        tokens: How many.
    """

    def __init__(self) -> None:
        self.gram: list[torch.Tensor] = []
        self.shift: list[torch.Tensor] | None = []
        self.output = 0.0
        self.drift = 0.0
        self.tokens = 0

    def add(self, fold: int, gram: torch.Tensor, shift: torch.Tensor | None) -> None:
        _add(self.gram, fold, gram)
        if shift is None:
            self.shift = None
        elif self.shift is not None:
            _add(self.shift, fold, shift)

    def covariance(self) -> torch.Tensor | None:
        """sum x' x'^T; `None` without tokens."""
        return sum(self.gram[1:], start=self.gram[0]) if self.tokens else None


class Corrected(NamedTuple):
    """What `corrected` returns.

    Attributes:
        weight: `[out, in]`.
        damping: What was chosen of `DAMPING`; `None` for the weight as it was.
    """

    weight: torch.Tensor
    damping: float | None


def corrected(weight: torch.Tensor, moments: Moments) -> Corrected:
    """The weight that gives, of the inputs x', nearest to what W gives of x: W + W E (H + d I)^-1.

    min ||W X - B X'||_F has the solution B = W X X'^T H^-1 with H = X'X'^T, and among rank-r matrices that of
    `closed_form.best_factors` for this B and the covariance H: objective 4 of AA-SVD (Anchored and adaptive
    SVD, 2026), whose text has it with a Cholesky factor of H and its inverse. Written with E = (X - X')X'^T
    instead, what is estimated from the data is the correction alone. H is badly conditioned: a few channels
    dominate it, and directions without tokens are left to chance. So the correction is damped (ridge
    regression), and by how much is measured: each fold's correction is judged on the other fold, and
    if none of `DAMPING` helps there W stays as it is.

    On the calibration tokens a damped correction never makes the error of a full-rank B greater than that
    of W; that the rank-r matrix gains too is measured, not guaranteed.

    Args:
        weight: W of shape `[out, in]`; its dtype is that of the computation and of the moments.
        moments: Of the module.
    """
    if moments.shift is None or len(moments.shift) < 2:
        return Corrected(weight, None)
    drifts = [weight @ shift for shift in moments.shift]
    best, damping = 0.0, None
    for candidate in DAMPING:
        gain = 0.0
        for fold in (0, 1):
            change = _solved(moments.gram[fold], drifts[fold], candidate)
            if change is None:
                break
            other, gram = drifts[1 - fold], moments.gram[1 - fold]
            gain += ((change @ gram - 2 * other) * change).sum().item()
        else:
            if gain < best:
                best, damping = gain, candidate
    if damping is not None:
        change = _solved(moments.gram[0] + moments.gram[1], drifts[0] + drifts[1], damping)
        if change is not None:
            return Corrected(weight + change, damping)
    return Corrected(weight, None)


def _solved(gram: torch.Tensor, drift: torch.Tensor, damping: float) -> torch.Tensor | None:
    """drift (gram + d I)^-1; `None` where that cannot be inverted in its dtype."""
    damped = gram.clone()
    damped.diagonal().add_(damping * gram.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed.item():
        return None
    change = torch.cholesky_solve(drift.T, factor).T
    return change if torch.isfinite(change).all() else None


def error_of(weight: torch.Tensor, approximation: torch.Tensor, moments: Moments) -> float:
    """||W X - A X'||_F / ||W X||_F."""
    if not moments.output > 0:
        return 0.0
    missing = weight - approximation
    square = moments.drift + ((missing @ moments.covariance()) * missing).sum().item()
    if moments.shift is not None:
        square += 2 * ((weight @ sum(moments.shift)) * missing).sum().item()
    return (max(square, 0.0) / moments.output) ** 0.5


def _add(sums: list[torch.Tensor], fold: int, value: torch.Tensor) -> None:
    while len(sums) <= fold:
        sums.append(torch.zeros_like(value))
    sums[fold] += value


class _Reached(Exception):
    """Nothing behind the modules that are watched needs to run."""


def inputs_of(
    modules: Mapping[str, nn.Module], run: Callable[[], object], *, stop: bool
) -> dict[str, list[torch.Tensor]]:
    """What each module is called with while `run` runs, by name, in the order of first calls.

    Args:
        modules: By name.
        run: Runs a layer.
        stop: Leave `run` as soon as every module was called.
    """
    seen: dict[str, list[torch.Tensor]] = {}

    def watch(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            seen.setdefault(name, []).append(args[0] if args else next(iter(kwargs.values())))
            if stop and len(seen) == len(modules):
                raise _Reached

        return hook

    handles = [
        module.register_forward_pre_hook(watch(name), with_kwargs=True)
        for name, module in modules.items()
    ]
    try:
        with contextlib.suppress(_Reached):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def accumulate(
    moments: Mapping[str, Moments],
    weights: Mapping[str, torch.Tensor],
    dense: Mapping[str, list[torch.Tensor]],
    factorized: Mapping[str, list[torch.Tensor]],
    *,
    shape: torch.Size,
    mask: torch.Tensor | None,
    dtype: torch.dtype,
    batch: int,
    batches: int,
) -> None:
    """Adds one batch to the moments of modules.

    Args:
        moments: By name; what is added to.
        weights: Of the dense modules, `[out, in]`.
        dense: What the dense modules were called with, see `inputs_of`.
        factorized: What their counterparts were called with.
        shape: Of the layer's hidden states, `[B, T, ...]`.
        mask: `[B, T]`, False at tokens to leave out.
        dtype: Of the sums.
        batch: Its number, which decides its fold; a single batch is split between the folds.
        batches: How many there are.

    Raises:
        FactorizeError: an input holds NaN or inf.
    """
    done: dict[tuple[int, ...], list[tuple[torch.Tensor, torch.Tensor | None]]] = {}
    for name, seen in factorized.items():
        before = dense.get(name, [])
        paired = _same_tokens(before, seen, shape)
        new = _joined(seen, mask)
        old = _joined(before, mask) if paired else None
        key = tuple(map(id, (*seen, *before)))
        if key not in done:  # siblings are called with the same tensor
            done[key] = [_products(*part, dtype, name, batch) for part in _folds(new, old, batches)]
        for part, (gram, shift) in enumerate(done[key]):
            moments[name].add(batch % 2 if batches > 1 else part, gram, shift)
        moments[name].tokens += len(new)
        output = _energy(new if old is None else old, weights[name])
        moments[name].output += output
        moments[name].drift += 0.0 if old is None else _energy(old - new, weights[name])


def _same_tokens(
    dense: list[torch.Tensor], factorized: list[torch.Tensor], shape: torch.Size
) -> bool:
    """Whether both were called with a row for each token of the layer: what a router picks is not paired."""
    everything = (tuple(shape[:2]), (shape[0] * shape[1],))
    return [x.shape for x in dense] == [x.shape for x in factorized] and all(
        tuple(x.shape[:-1]) in everything for x in dense
    )


def _joined(inputs: list[torch.Tensor], mask: torch.Tensor | None) -> torch.Tensor:
    return torch.cat([tokens_of(x, mask) for x in inputs])


def _folds(
    new: torch.Tensor, old: torch.Tensor | None, batches: int
) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    if batches > 1:
        return [(new, old)]
    half = len(new) // 2
    return [
        (new[part], None if old is None else old[part]) for part in (slice(half), slice(half, None))
    ]


def _products(
    new: torch.Tensor, old: torch.Tensor | None, dtype: torch.dtype, name: str, batch: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    new = new.to(dtype)
    gram = new.T @ new
    shift = None if old is None else (old.to(dtype) - new).T @ new
    if not torch.isfinite(gram.diagonal()).all() or (
        shift is not None and not torch.isfinite(shift).all()
    ):
        raise FactorizeError(
            f"Calibration batch {batch} gives NaN or inf at the input of {name!r} once the layers "
            "before it are factorized. Leave the batch out, keep more, or run the model in a dtype "
            "with more range (bfloat16 or float32)."
        )
    return gram, shift


def _energy(x: torch.Tensor, weight: torch.Tensor) -> float:
    return (x.float() @ weight.float().T).double().square().sum().item()
