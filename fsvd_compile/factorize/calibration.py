"""Second moments of the inputs of linear modules, accumulated by hooks during calibration."""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from fsvd_compile.errors import FactorizeError


class Covariances:
    """C = sum of x x^T over the tokens that reach each module, one matrix per distinct input.

    Modules that are always handed the same tensor object (q/k/v, gate/up) share one matrix: the
    first of them computes it, the others only confirm that they saw the same tensor. A module whose
    calls turn out to differ takes a copy of the history it shares and goes on alone, so sharing is
    never an assumption.

    Args:
        dtype: Of the matrices. `factorize` takes fp64: a few channels dominate the inputs of
            language models, which spreads the eigenvalues of C over eight decades (SmolLM2-135M),
            the whole precision of fp32. There fp32 throughout raised the error of a module by up to
            1 %.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._groups: list[_Group] = []
        self._of: dict[str, _Group] = {}
        self._newest: dict[int, _Group] = {}
        self._mask: torch.Tensor | None = None
        self._batch = 0

    def pop(self, name: str) -> tuple[torch.Tensor | None, int]:
        """C `[in, in]` (`None` when no token reached the module) and its tokens; forgets `name`."""
        group = self._of.pop(name, None)
        if group is None:
            return None, 0
        group.members.remove(name)
        if not group.members:
            self._groups.remove(group)
            self._newest.clear()
        return (group.gram, group.tokens) if group.tokens else (None, 0)

    def get(self, name: str) -> torch.Tensor | None:
        """C of a module as `pop` gives it, kept."""
        group = self._of.get(name)
        return group.gram if group is not None and group.tokens else None

    @property
    def matrices(self) -> int:
        """How many distinct matrices are held."""
        return len(self._groups)

    @contextlib.contextmanager
    def batch(self, index: int, mask: torch.Tensor | None) -> Iterator[None]:
        """Around one forward; `mask` `[B, T]` is False at tokens to leave out."""
        self._batch, self._mask = index, mask
        yield
        for group in list(self._groups):
            if group.pending is not None:
                self._settle(group)

    def observe(self, name: str, x: torch.Tensor) -> None:
        """The module `name` is called with `x` `[..., in]`."""
        group = self._of.get(name)
        if group is None:
            group = self._newest.get(id(x))
            if group is not None and group.calls == 1 and group.saw(x):
                group.members.append(name)
                self._of[name] = group
                return
            self._lead(self._new(name), name, x)
        elif name == group.members[0]:
            self._settle(group)
            self._lead(group, name, x)
        elif name in group.waiting and group.saw(x):
            group.waiting.discard(name)
            if not group.waiting:
                group.fold()
        else:
            self._lead(self._leave(group, name), name, x)

    def _new(self, name: str) -> _Group:
        group = self._of[name] = _Group(name)
        self._groups.append(group)
        return group

    def _lead(self, group: _Group, name: str, x: torch.Tensor) -> None:
        group.pending = self._gram(name, x)
        group.calls += 1
        group.input, group.version = weakref.ref(x), _version(x)
        group.waiting = set(group.members[1:])
        self._newest[id(x)] = group
        if not group.waiting:
            group.fold()

    def _settle(self, group: _Group) -> None:
        """Members that did not follow the first one's last call leave without it."""
        for name in sorted(group.waiting):
            self._leave(group, name)
        group.fold()

    def _leave(self, group: _Group, name: str) -> _Group:
        """`name` in a group of its own, with what it saw so far."""
        confirmed = name not in group.waiting
        group.members.remove(name)
        own = self._new(name)
        own.calls = group.calls
        own.gram = None if group.gram is None else group.gram.clone()
        own.tokens = group.tokens
        if group.pending is not None and confirmed:
            own.pending = (group.pending[0].clone(), group.pending[1])
            own.fold()
        group.waiting.discard(name)
        if not group.waiting:
            group.fold()
        return own

    def _gram(self, name: str, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        x = tokens_of(x.detach(), self._mask).to(self.dtype)
        with torch.autocast(x.device.type, enabled=False):
            gram = x.T @ x
        # A diagonal entry is a sum of squares: finite exactly when its channel is (and does not
        # overflow).
        if not torch.isfinite(gram.diagonal()).all():
            raise FactorizeError(
                f"Calibration batch {self._batch} gives NaN or inf at the input of {name!r}. Check "
                "that the model answers this batch with finite numbers, leave the batch out, or "
                "run the model in a dtype with more range (bfloat16 or float32)."
            )
        return gram, x.shape[0]


def tokens_of(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """`[..., in]` to `[tokens, in]`; no padding where the leading sizes are those of `mask` `[B, T]`."""
    if mask is not None and x.shape[:-1] == mask.shape:
        return x[mask.to(x.device)]
    x = x.reshape(-1, x.shape[-1])
    if mask is not None and x.shape[0] == mask.numel():
        return x[mask.to(x.device).reshape(-1)]
    return x


class _Group:
    """Modules with one common history of inputs."""

    def __init__(self, name: str) -> None:
        self.members = [name]  # the first one computes
        self.gram: torch.Tensor | None = None
        self.tokens = 0
        self.calls = 0
        self.pending: tuple[torch.Tensor, int] | None = None  # seen by the first, not yet by all
        self.waiting: set[str] = set()
        # Weak, so that activations die as they would without hooks; a reused id is then never a
        # match.
        self.input: weakref.ref[torch.Tensor] | None = None
        self.version = 0

    def saw(self, x: torch.Tensor) -> bool:
        """Whether `x` is the very tensor of the last call, unmodified since."""
        return self.input is not None and self.input() is x and self.version == _version(x)

    def fold(self) -> None:
        if self.pending is not None:
            gram, tokens = self.pending
            self.gram = gram if self.gram is None else self.gram.add_(gram)
            self.tokens += tokens
            self.pending = None


def _version(x: torch.Tensor) -> int:
    return 0 if x.is_inference() else x._version


def check_calibration(calibration: object) -> None:
    """Raises FactorizeError for what is one batch, or text, instead of an iterable of batches."""
    if calibration is None:
        return
    if isinstance(calibration, (torch.Tensor, Mapping)):
        kind = "one tensor" if isinstance(calibration, torch.Tensor) else "one batch (a mapping)"
        raise FactorizeError(
            f"calibration is {kind}; it has to be an iterable of batches: calibration=[batch]."
        )
    if isinstance(calibration, (str, bytes)) or not isinstance(calibration, Iterable):
        raise FactorizeError(
            f"calibration is a {type(calibration).__name__}; it has to be an iterable of batches, "
            "each a token tensor [B, T] or a dict of the model's keyword arguments."
        )


def collect(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    calibration: Iterable[Any],
    *,
    dtype: torch.dtype,
    progress: bool,
    skip_logits: bool,
) -> tuple[Covariances, Any]:
    """Runs the batches and returns the covariances and the first batch.

    Args:
        model: In evaluation mode; run under `no_grad`, never compiled.
        modules: Name to linear module: whose inputs are collected.
        calibration: See `factorize`.
        dtype: Of the covariances.
        progress: Show a progress bar.
        skip_logits: The output layer is not among `modules`, so language models need no logits.

    Raises:
        FactorizeError: no batch, a batch of a wrong kind, one the model rejects, NaN or inf.
    """
    covariances = Covariances(dtype)
    first = None
    count = 0
    with observing(covariances, modules):
        total = len(calibration) if hasattr(calibration, "__len__") else None
        batches = tqdm(calibration, "calibrate", total, disable=not progress, unit="batch")
        for index, batch in enumerate(batches):
            first = batch if index == 0 else first
            args, kwargs, mask = arguments(model, batch, index, skip_logits)
            with covariances.batch(index, mask):
                _run_batch(model, args, kwargs, index)
            count += 1
    if not count:
        raise FactorizeError(
            "calibration is empty: it gave no batch. Give at least one, calibration=None for plain "
            "SVD, and a list instead of a generator that was read before."
        )
    return covariances, first


def _run_batch(model: nn.Module, args: tuple, kwargs: dict, index: int) -> None:
    """One forward; whatever the model raises becomes a FactorizeError."""
    try:
        _forward(model, args, kwargs)
    except FactorizeError:
        raise
    except Exception as error:
        given = {f"argument {i}": a for i, a in enumerate(args)} | kwargs
        shapes = ", ".join(
            f"{name} {list(value.shape)} {value.dtype}"
            for name, value in given.items()
            if isinstance(value, torch.Tensor)
        )
        raise FactorizeError(
            f"The model rejects calibration batch {index} ({shapes}): {type(error).__name__}: "
            f"{error}. A batch is a token tensor [B, T] or a dict of the model's keyword arguments."
        ) from error


def replay(model: nn.Module, batch: Any) -> None:
    """Runs one batch again; whatever the model raises comes through."""
    args, kwargs, _ = arguments(model, batch, 0, skip_logits=False)
    _forward(model, args, kwargs)


def _forward(model: nn.Module, args: tuple, kwargs: dict) -> None:
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        model(*args, **kwargs)


@contextlib.contextmanager
def observing(covariances: Covariances, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """While it lasts the covariances see what the modules are called with."""
    handles = []
    try:
        for name, module in modules.items():
            hook = _hook(covariances, name)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(covariances: Covariances, name: str):
    def pre_hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        covariances.observe(name, args[0] if args else next(iter(kwargs.values())))

    return pre_hook


def is_encoder_decoder(model: nn.Module) -> bool:
    return getattr(getattr(model, "config", None), "is_encoder_decoder", False) is True


@contextlib.contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """While it lasts, no part of a model fills a KV cache by its config's default, also where no caller can say so.

    A layer that is run again, as `layerwise` and `feedback` do, would attend to what it wrote the first time.
    """
    configs = {id(c): c for m in model.modules() if (c := m.__dict__.get("config")) is not None}
    filling = [config for config in configs.values() if getattr(config, "use_cache", None) is True]
    try:
        for config in filling:
            config.use_cache = False
        yield
    finally:
        for config in filling:
            config.use_cache = True


def arguments(
    model: nn.Module, batch: Any, index: int, skip_logits: bool
) -> tuple[tuple, dict[str, Any], torch.Tensor | None]:
    """(positional arguments, keyword arguments, mask of tokens or None) of a calibration batch."""
    device = next(model.parameters()).device
    if isinstance(batch, torch.Tensor):
        args, kwargs = (batch.to(device),), {}
    elif isinstance(batch, Mapping):
        args = ()
        kwargs = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
        }
    else:
        raise FactorizeError(
            f"Calibration batch {index} is a {type(batch).__name__}; it has to be a token tensor "
            "[B, T] or a dict of the model's keyword arguments (tokenize text first, with "
            "return_tensors='pt')."
        )
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        mask = None
    if is_encoder_decoder(model):
        # Which half an activation belongs to does not show, and both may be equally long.
        masks = (kwargs.get(name) for name in ("attention_mask", "decoder_attention_mask"))
        if any(isinstance(m, torch.Tensor) and not m.bool().all() for m in masks):
            raise FactorizeError(
                f"Calibration batch {index} has padding, and {type(model).__name__} is an encoder and a decoder with "
                "masks of their own; give texts of one length, or one text a batch."
            )
        mask = None
    accepted = inspect.signature(model.forward).parameters
    if "use_cache" in accepted:
        kwargs.setdefault("use_cache", False)
    if skip_logits and "logits_to_keep" in accepted and "labels" not in kwargs:
        kwargs.setdefault("logits_to_keep", 1)
    return args, kwargs, None if mask is None else mask.bool()
