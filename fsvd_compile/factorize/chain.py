"""A model as a chain of layers that are run one at a time, so that only one layer's activations are alive."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fsvd_compile.errors import FactorizeError

_NO_CHAIN = (
    "layerwise=True and feedback=True go through the model layer by layer, which takes layers that are entries of one "
    "nn.ModuleList, called once each, in order, every one with the output of the one before as its "
    "first argument; {}. Leave them out."
)


class Chain:
    """The layers of a model, and what each of them is called with beside the hidden states.

    Filled by running the model's calibration batches inside `recording`.

    Args:
        model: Any module.
        names: Modules that should lie in the layers: the nn.ModuleList that holds most of them is taken.

    Attributes:
        prefix: Name of the nn.ModuleList, such as "model.layers".
        layers: Its entries.
        starts: By batch, the hidden states that enter the first layer.

    Raises:
        FactorizeError: no nn.ModuleList holds any of the modules inside its entries.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        inside = {
            prefix: sum(_within(name, prefix) for name in names)
            for prefix, module in model.named_modules()
            if isinstance(module, nn.ModuleList)
        }
        # The first of equals is the outermost.
        self.prefix = max(inside, key=inside.__getitem__, default="")
        if not inside.get(self.prefix):
            raise FactorizeError(_NO_CHAIN.format("this model has none around the chosen modules"))
        self.layers: list[nn.Module] = list(model.get_submodule(self.prefix))
        self.starts: list[torch.Tensor] = []
        self._rest: list[list[_Rest]] = [[] for _ in self.layers]  # by layer and batch
        self._expected = 0  # the layer that has to be called next
        self._output: torch.Tensor | None = None

    def name(self, index: int) -> str:
        return f"{self.prefix}.{index}"

    def owner(self, name: str) -> int | None:
        """The layer a module lies in."""
        if not _within(name, self.prefix):
            return None
        return int(name[len(self.prefix) + 1 :].partition(".")[0])

    @contextlib.contextmanager
    def recording(self, batches: int) -> Iterator[None]:
        """While it lasts every forward of the model is one batch, of so many.

        Raises:
            FactorizeError: the layers are not called as a chain.
        """
        handles = []
        try:
            for index, layer in enumerate(self.layers):
                enter, leave = self._enter(index), self._leave
                handles.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
                handles.append(layer.register_forward_hook(leave))
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._output = None
        if any(len(rest) != batches for rest in self._rest):
            raise FactorizeError(
                _NO_CHAIN.format("here not every layer was called once in every batch")
            )

    def _enter(self, index: int) -> Callable:
        def hook(layer: nn.Module, args: tuple, kwargs: dict) -> None:
            hidden, rest = _Rest.split(args, kwargs)
            if index != self._expected:
                raise FactorizeError(
                    _NO_CHAIN.format(
                        f"here {self.name(index)} was called after {self._expected - 1}"
                    )
                )
            if hidden is None or (index and hidden is not self._output):
                raise FactorizeError(
                    _NO_CHAIN.format(f"here {self.name(index)} was called with something else")
                )
            if index == 0:
                self.starts.append(hidden.detach().clone())
            seen = self._rest[index]
            # Masks and rotary tables are the same for all layers and most batches: kept once.
            known = self._rest[index - 1][-1:] if index else []
            seen.append(rest.shared(seen[:1] + known))
            self._expected = (index + 1) % len(self.layers)

        return hook

    def _leave(self, layer: nn.Module, args: tuple, output: Any) -> None:
        self._output = first_of(output)

    def run(self, index: int, layer: nn.Module, hidden: torch.Tensor, batch: int) -> torch.Tensor:
        """The output of `layer`, in the place of the one at `index`, for the hidden states of a batch."""
        # An nn.Identity among the layers has no parameters.
        own = next(self.layers[index].parameters(), hidden)
        # A copy, for a layer may add to its input in place.
        with torch.compiler.set_stance("force_eager"):
            output = first_of(self._rest[index][batch](layer, hidden.to(own.device, copy=True)))
        if output is None or output.shape != hidden.shape:
            raise FactorizeError(_NO_CHAIN.format(f"here {self.name(index)} changes the shape"))
        return output

    def store(self, copies: int) -> torch.device:
        """Where hidden states of all batches are kept, so many times: with the layer or on the CPU."""
        device = self.starts[0].device
        if device.type != "cuda":
            return device
        needed = copies * sum(start.numel() * start.element_size() for start in self.starts)
        free, _ = torch.cuda.mem_get_info(device)
        return device if needed < free / 4 else torch.device("cpu")


def _within(name: str, prefix: str) -> bool:
    """Whether a module lies below an entry of the list `prefix`, and is not the entry itself."""
    return name.startswith(f"{prefix}.") and "." in name[len(prefix) + 1 :]


class _Rest:
    """The arguments of a call without the hidden states."""

    def __init__(self, args: tuple, kwargs: dict[str, Any], place: str | None) -> None:
        self.args, self.kwargs, self.place = args, kwargs, place

    @classmethod
    def split(cls, args: tuple, kwargs: dict[str, Any]) -> tuple[torch.Tensor | None, _Rest]:
        if args:
            hidden, rest = args[0], cls(tuple(args[1:]), dict(kwargs), None)
        else:
            place = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs), None)
            hidden = kwargs.get(place)
            rest = cls((), {k: v for k, v in kwargs.items() if k != place}, place)
        return (hidden if isinstance(hidden, torch.Tensor) else None), rest

    def shared(self, others: list[_Rest]) -> _Rest:
        """The same arguments, with tensors of `others` in the place of equal ones."""
        known = [tensor for other in others for tensor in _tensors((other.args, other.kwargs))]
        args, kwargs = _mapped((self.args, self.kwargs), lambda t: _known(t, known))
        return _Rest(args, kwargs, self.place)

    def __call__(self, layer: nn.Module, hidden: torch.Tensor) -> Any:
        # Lists and dicts of its own for every call: a layer may add to them, and is called again.
        args, kwargs = _mapped((self.args, self.kwargs), lambda tensor: tensor)
        if self.place is None:
            return layer(hidden, *args, **kwargs)
        return layer(**kwargs, **{self.place: hidden})


def _known(tensor: torch.Tensor, known: list[torch.Tensor]) -> torch.Tensor:
    for other in known:
        same = other.shape == tensor.shape and other.dtype == tensor.dtype
        if other is tensor or (
            same and other.device == tensor.device and torch.equal(other, tensor)
        ):
            return other
    # What the model is handed to change, such as a buffer of its own, must not change here.
    return tensor.detach().clone()


def _mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(_mapped(item, change) for item in value)
    if type(value) is dict:
        return {key: _mapped(item, change) for key, item in value.items()}
    return value


def _tensors(value: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    _mapped(value, lambda tensor: found.append(tensor) or tensor)
    return found


def first_of(output: Any) -> torch.Tensor | None:
    """The hidden states among what a layer returns: the tensor, or the first of a tuple or mapping."""
    if isinstance(output, (tuple, list)):
        output = output[0] if output else None
    elif isinstance(output, Mapping):
        output = next(iter(output.values()), None)
    return output if isinstance(output, torch.Tensor) else None
