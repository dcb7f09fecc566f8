"""How much a model's loss minds an error in the output of each of its linear modules."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from fsvd_compile.errors import FactorizeError
from fsvd_compile.factorize.calibration import arguments, is_encoder_decoder

Loss = Callable[[nn.Module, Any], torch.Tensor]

# A mean over tokens has gradients that float16 rounds to zero; a power of two changes nothing else.
_SCALE = 1024.0


def sensitivities(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    calibration: Iterable[Any],
    loss: Loss | None,
    *,
    progress: bool,
) -> dict[str, float]:
    """The mean square of dloss/dy over tokens and outputs y of each module; 0 where no gradient arrives.

    It is the diagonal of the Fisher information of the outputs, averaged to one number a module (the
    K-FAC approximation of Martens and Grosse, arXiv 1503.05671, with a gradient factor that is a multiple
    of the identity). Parameters get no gradient and keep their `requires_grad`.

    Args:
        model: In evaluation mode.
        modules: Name to linear module.
        calibration: Batches, see `factorize`; the gradient is that of each batch's own loss.
        loss: `(model, batch) -> scalar`. By default the model's own, as transformers' models compute
            it from `labels`: the batch's, or for a model with a language-modelling head its tokens.
        progress: Show a progress bar.

    Raises:
        FactorizeError: there is no loss, it is not finite, it does not depend on the modules, or the
            model rejects a batch.
    """
    loss = loss or _own_loss
    squares = dict.fromkeys(modules, 0.0)
    outputs = dict.fromkeys(modules, 0)
    frozen = [p for p in model.parameters() if p.requires_grad]
    handles = [
        handle
        for name, module in modules.items()
        for handle in (
            module.register_forward_pre_hook(_start_graph, with_kwargs=True),
            module.register_forward_hook(_watch(name, squares, outputs)),
        )
    ]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        total = len(calibration) if hasattr(calibration, "__len__") else None
        batches = tqdm(calibration, "gradients", total, disable=not progress, unit="batch")
        for index, batch in enumerate(batches):
            _backward(model, batch, loss, index)
    finally:
        for handle in handles:
            handle.remove()
        for parameter in frozen:
            parameter.requires_grad_(True)
    broken = [name for name, square in squares.items() if not math.isfinite(square)]
    if broken:
        raise FactorizeError(
            f"allocation='loss': the gradient at {broken[0]!r} (of {len(broken)}) holds NaN or inf; run "
            "the model in float32 or bfloat16, or leave out the batch that does it."
        )
    if not any(squares.values()):
        raise FactorizeError(
            "allocation='loss': no gradient reached any of the selected modules; loss= has to return "
            "a scalar that depends on the model's output."
        )
    return {name: squares[name] / max(outputs[name], 1) for name in modules}


def _start_graph(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """The first module of a model reads what nothing has a gradient for: from here on there is one."""
    x = args[0] if args else next(iter(kwargs.values()), None)
    if not isinstance(x, torch.Tensor) or x.requires_grad:
        return None
    x = x.detach().requires_grad_()
    return ((x, *args[1:]), kwargs) if args else ((), kwargs | {next(iter(kwargs)): x})


def _watch(name: str, squares: dict[str, float], outputs: dict[str, int]) -> Callable:
    def seen(grad: torch.Tensor) -> None:
        squares[name] += (grad.detach().double() / _SCALE).square().sum().item()
        outputs[name] += grad.numel()

    def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(seen)

    return hook


def _backward(model: nn.Module, batch: Any, loss: Loss, index: int) -> None:
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.compiler.set_stance("force_eager"),
        ):
            value = loss(model, batch)
            if not isinstance(value, torch.Tensor) or value.numel() != 1:
                raise FactorizeError(
                    f"allocation='loss': loss= returned {type(value).__name__} for batch {index}; "
                    "it has to be a tensor of one element."
                )
            if not torch.isfinite(value):
                raise FactorizeError(
                    f"allocation='loss': the loss of calibration batch {index} is {value.item()}."
                )
            if value.requires_grad:
                (value * _SCALE).backward()
    except FactorizeError:
        raise
    except Exception as error:
        raise FactorizeError(
            f"allocation='loss': the loss of calibration batch {index} cannot be computed: "
            f"{type(error).__name__}: {error}."
        ) from error


def _own_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    args, kwargs, mask = arguments(model, batch, 0, skip_logits=False)
    accepted = inspect.signature(model.forward).parameters
    if "labels" in accepted and "labels" not in kwargs and not is_encoder_decoder(model):
        tokens = kwargs.get("input_ids", args[0] if args else None)
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if head is not None and isinstance(tokens, torch.Tensor):
            kwargs["labels"] = tokens if mask is None else tokens.masked_fill(~mask, -100)
    output = model(*args, **kwargs)
    found = getattr(output, "loss", None)
    if found is None:
        raise FactorizeError(
            f"allocation='loss': {type(model).__name__} gives no loss for the calibration batches. Give "
            "batches with `labels`, or loss=, a function (model, batch) -> scalar."
        )
    return found
