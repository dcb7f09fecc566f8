"""Block refinement: a layer's factors are trained until the layer gives what the dense layer gave."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Sequence

import torch
from torch import nn

from fsvd_compile.errors import FactorizeError
from fsvd_compile.factorize.calibration import tokens_of
from fsvd_compile.factorized import LowRankLinear


@dataclasses.dataclass(frozen=True)
class Refine:
    """How `factorize` refines each layer; see `refine_layer`.

    Attributes:
        steps: Of AdamW per layer, each on one calibration batch.
        lr: Of the first step; it falls to a tenth along a cosine.
        held_out: The share of calibration batches, at least one, that is not trained on and decides whether
            the refined factors are kept.
        seed: Of the order of batches.

    Raises:
        FactorizeError: a value is out of range.
    """

    steps: int = 200
    lr: float = 3e-4
    held_out: float = 0.125
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise FactorizeError(
                f"Refine: steps={self.steps!r}; it has to be an int of at least 1."
            )
        if not isinstance(self.lr, numbers.Real) or not 0 < self.lr < math.inf:
            raise FactorizeError(f"Refine: lr={self.lr!r}; it has to be a finite number above 0.")
        if not isinstance(self.held_out, numbers.Real) or not 0 < self.held_out < 1:
            raise FactorizeError(
                f"Refine: held_out={self.held_out!r} is a share of the batches, between 0 and 1."
            )


def refine_layer(
    layer: nn.Module,
    run: Callable[[Callable, int], torch.Tensor],
    expected: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor | None],
    refine: Refine,
    *,
    seed: int,
) -> tuple[float, float]:
    """Trains the factors of a layer, in place, towards the outputs of the dense layer.

    The recipe of AA-SVD (Anchored and adaptive SVD, 2026) in its code: AdamW on the mean square error of the
    block's output, cosine to a tenth of the rate, gradients clipped to norm 1. Ours differ: the error of
    a token is relative to its own size, as what follows in a transformer is a norm, and the few tokens
    whose hidden states are hundreds of times larger would else be all that counts; only factors are
    trained, not norms, biases and what is left dense; and the better of before and after on held-out batches stays.

    Args:
        layer: With `LowRankLinear` inside.
        run: `(callable in the layer's place, batch) -> hidden states`.
        expected: What the dense layer gives, by batch.
        masks: Of the batches; padding does not count.
        refine: The settings.
        seed: Added to theirs.

    Returns:
        The held-out error before and of what is kept: the root of the mean of |y - y'|^2 / |y|^2 over tokens.
    """
    # A batch that is padding alone has no error, neither to train on nor to measure.
    batches = [i for i, mask in enumerate(masks) if mask is None or mask.any()]
    if len(batches) < 2:
        raise FactorizeError(
            f"refine= needs at least 2 calibration batches with tokens, one of them to measure; of {len(expected)} "
            f"given {len(batches)} have any. Leave empty texts out, or split the batch."
        )
    count = min(max(1, round(refine.held_out * len(batches))), len(batches) - 1)
    training, held_out = batches[:-count], batches[-count:]
    parameters = _factors(layer)

    def error(batch: int, masters: dict[str, torch.Tensor]) -> torch.Tensor:
        state = {name: master.to(parameters[name].dtype) for name, master in masters.items()}

        def call(*args, **kwargs):
            return torch.func.functional_call(layer, state, args, kwargs)

        return _relative(run(call, batch), expected[batch], masks[batch])

    @torch.no_grad()
    def measured(masters: dict[str, torch.Tensor]) -> float:
        return (sum(error(batch, masters).item() for batch in held_out) / count) ** 0.5

    # In fp32 whatever the model's dtype: bf16 would round most steps away.
    masters = {
        name: parameter.detach().float().clone().requires_grad_()
        for name, parameter in parameters.items()
    }
    before = measured(masters)
    optimizer = torch.optim.AdamW(masters.values(), lr=refine.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, refine.steps, eta_min=refine.lr / 10
    )
    generator = torch.Generator().manual_seed(refine.seed * 10_007 + seed)
    order: list[int] = []
    with torch.enable_grad():
        for _ in range(refine.steps):
            order = order or torch.randperm(len(training), generator=generator).tolist()
            # Of the factors alone: what they share the layer with belongs to the model as it is.
            loss = error(training[order.pop()], masters)
            gradients = torch.autograd.grad(loss, list(masters.values()), allow_unused=True)
            for master, gradient in zip(masters.values(), gradients, strict=True):
                master.grad = gradient
            torch.nn.utils.clip_grad_norm_(masters.values(), 1.0)
            optimizer.step()
            schedule.step()
    after = measured(masters)
    if not after < before:
        return before, before
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(masters[name])
    return before, after


def _factors(layer: nn.Module) -> dict[str, nn.Parameter]:
    found: dict[str, nn.Parameter] = {}
    for name, module in layer.named_modules():
        if isinstance(module, LowRankLinear):
            found[f"{name}.v.weight"] = module.v.weight
            found[f"{name}.u.weight"] = module.u.weight
    return found


def _relative(
    output: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """The mean over tokens of |y - y'|^2 / |y|^2, in fp32."""
    output = tokens_of(output, mask).float()
    expected = tokens_of(expected.to(output.device), mask).float()
    square = expected.square().sum(-1)
    return ((output - expected).square().sum(-1) / square.clamp_min(1e-12)).mean()
