"""The options of the backend: one frozen dataclass, validated key by key."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fsvd_compile.errors import OptionError

CUDA_GRAPHS = ("step", "layer", "off")
KERNELS = ("auto", "aten", "ops")

# What torch.compile's own modes mean here. `reduce-overhead` asks for CUDA graphs, which is the default
# already; transformers sends it when a CompileConfig names only the backend.
MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "reduce-overhead": {},
    "max-autotune": {"inductor": {"max_autotune": True}},
    "max-autotune-no-cudagraphs": {"inductor": {"max_autotune": True}, "cuda_graphs": "off"},
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of `torch.compile(model, backend="flashsvd", options={...})`.

    Attributes:
        cuda_graphs: What is captured in a CUDA graph: the whole `"step"`, each `"layer"`, or nothing
            (`"off"`). Ignored on devices without CUDA graphs. Of a graph with dynamic shapes what lies between them
            is captured if it reads most of the weights (a decode step whose KV cache grows), else nothing.
        max_captures: For how many address sets (KV caches, swapped weights) one compiled graph holds a
            capture at a time; the least recently used goes first.
        kernels: `"auto"` keeps our ops where their Triton kernels run (decode and few tokens on CUDA) and hands
            ATen to Inductor elsewhere; `"aten"` hands ATen to Inductor everywhere; `"ops"` keeps our ops
            everywhere, each with the implementation of its device.
        layers: Compile repeated layers once and reuse them. `False` hands the whole graph to Inductor.
        disable: Names of rewrites to leave out (see `fsvd_compile.passes.PIPELINE`).
        inductor: Inductor settings for everything that is left, as in `torch.compile(options=...)`.

    Raises:
        OptionError: an unknown key or a value outside the allowed ones.
    """

    cuda_graphs: str = "step"
    max_captures: int = 8
    kernels: str = "auto"
    layers: bool = True
    disable: tuple[str, ...] = ()
    inductor: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        _one_of("cuda_graphs", self.cuda_graphs, CUDA_GRAPHS)
        _one_of("kernels", self.kernels, KERNELS)
        if isinstance(self.max_captures, bool) or not isinstance(self.max_captures, int):
            raise _bad("max_captures", self.max_captures, "an int of at least 1")
        if self.max_captures < 1:
            raise _bad("max_captures", self.max_captures, "an int of at least 1")
        if not isinstance(self.layers, bool):
            raise _bad("layers", self.layers, "True or False")
        if not isinstance(self.disable, (list, tuple, set, frozenset)) or not all(
            isinstance(name, str) for name in self.disable
        ):
            raise _bad("disable", self.disable, "a list of rewrite names")
        object.__setattr__(self, "disable", tuple(self.disable))
        self._check_disable()
        if not isinstance(self.inductor, Mapping):
            raise _bad("inductor", self.inductor, "a dict of torch._inductor.config keys")
        self._check_inductor()

    def _check_inductor(self) -> None:
        if not self.inductor:
            return
        from torch._inductor import config as settings

        for key, value in self.inductor.items():
            if not hasattr(settings, key):  # which knows dotted keys and aliases
                raise _bad("inductor", {key: value}, "keys of torch._inductor.config, with _ for -")
            if key == "triton.cudagraphs" and value:
                raise _bad(
                    "inductor",
                    {key: value},
                    'no CUDA graphs of Inductor\'s; ours are options={"cuda_graphs": ...}',
                )

    def _check_disable(self) -> None:
        if not self.disable:
            return
        # Imported here: the pipeline imports torch, a Config without `disable` need not.
        from fsvd_compile.passes import PIPELINE

        names = [rewrite.name for rewrite in PIPELINE]
        for name in self.disable:
            if name not in names:
                raise _bad("disable", name, "any of " + ", ".join(names))

    @classmethod
    def of(cls, options: Mapping[str, Any] | None = None, mode: str | None = None) -> Config:
        """The config for what `torch.compile` hands to a backend; `options` win over `mode`."""
        mode = mode or "default"
        if mode not in MODES:
            raise OptionError(
                f'mode={mode!r} is not a mode of backend "flashsvd"; allowed: {", ".join(MODES)}.'
            )
        given = {**MODES[mode], **(options or {})}
        known = [field.name for field in dataclasses.fields(cls)]
        for key in given:
            if key not in known:
                raise OptionError(
                    f'options[{key!r}]={given[key]!r} is not an option of backend "flashsvd"; '
                    f"allowed keys: {', '.join(known)}. "
                    'Inductor settings go into options={"inductor": {...}}.'
                )
        return cls(**given)


def _one_of(key: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise _bad(key, value, " or ".join(repr(a) for a in allowed))


def _bad(key: str, value: Any, allowed: str) -> OptionError:
    return OptionError(
        f'options[{key!r}]={value!r} is not allowed for backend "flashsvd"; it takes {allowed}.'
    )
