"""Which linear modules are factorized, and at which rank."""

from __future__ import annotations

import dataclasses
import math
import numbers
import sys
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import nn

from fsvd_compile.errors import FactorizeError
from fsvd_compile.factorize.closed_form import rank_for
from fsvd_compile.factorized import BranchedLinear, LowRankLinear

Keep = float | Mapping[str, float]
Select = Callable[[str, nn.Module], bool] | Iterable[str] | None

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class Target:
    """A chosen module; `rank` None means that no rank saves parameters."""

    name: str
    module: nn.Module
    keep: float
    rank: int | None

    @property
    def weight(self) -> torch.Tensor:
        """The weight as `[out, in]` (a view; Conv1D stores the transpose)."""
        return oriented_weight(self.module)


def oriented_weight(module: nn.Module) -> torch.Tensor:
    """The weight of a linear module as `[out, in]`, detached, sharing memory."""
    weight = module.weight.detach()
    return weight.T if _is_conv1d(module) else weight


def check_keep(keep: Keep) -> None:
    """Raises FactorizeError unless `keep` is in (0, 1] or maps glob patterns to such numbers."""
    if isinstance(keep, Mapping):
        if not keep:
            raise FactorizeError(
                "keep={} selects nothing; give a number or at least one pattern, such as "
                "{'*': 0.5}."
            )
        for pattern, value in keep.items():
            if not isinstance(pattern, str):
                raise FactorizeError(
                    f"keep has the key {pattern!r}; keys are glob patterns of module names, such "
                    "as '*.q_proj'."
                )
            _check_share(value, f"keep[{pattern!r}]")
    else:
        _check_share(keep, "keep")


def _check_share(value: object, name: str) -> None:
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not 0 < value <= 1:
        raise FactorizeError(
            f"{name}={value!r} is not a share of parameters; it has to be a number above 0 and at "
            "most 1 (0.5 halves the selected weights)."
        )


def select_targets(
    model: nn.Module, keep: Keep, select: Select
) -> tuple[list[Target], dict[str, str]]:
    """The modules to factorize, in model order, and for every other linear module why it stays
    dense.

    Raises:
        FactorizeError: a pattern matches no linear module, or nothing is left to factorize.
    """
    candidates, dense = _candidates(model)
    chosen = _choose(model, candidates, dense, select)
    targets: list[Target] = []
    for name in chosen:
        module_keep = keep
        if isinstance(keep, Mapping):
            pattern = next((p for p in keep if fnmatchcase(name, p)), None)
            if pattern is None:
                dense[name] = "no pattern of keep matches"
                continue
            module_keep = keep[pattern]
        module = candidates[name]
        targets.append(
            Target(name, module, float(module_keep), rank_for(module_keep, *_shape(module)))
        )
    if isinstance(keep, Mapping):
        _check_patterns("keep", keep, [target.name for target in targets])
    if not targets:
        raise FactorizeError(_nothing_selected(dense))
    return targets, dense


def _candidates(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Linear modules that can be replaced, by name, and those that cannot, with the reason."""
    owners = _parameter_owners(model)
    candidates: dict[str, nn.Module] = {}
    dense: dict[str, str] = {}
    factorized: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in factorized:
            continue
        if isinstance(module, LowRankLinear):
            factorized.update(module.modules())
            dense[name] = "factorized already"
        elif isinstance(module, BranchedLinear):
            # The branch was trained beside the dense weight, not beside one that is compressed.
            factorized.update(module.modules())
            dense[name] = "it has a low-rank branch, to be merged first"
        elif _is_adapted(module):
            factorized.update(module.modules())
            dense[name] = "it has an adapter of PEFT, to be merged first"
        elif isinstance(module, nn.Linear) or _is_conv1d(module):
            reason = _why_not(name, module, owners)
            if reason is None:
                candidates[name] = module
            else:
                dense[name] = reason
    return candidates, dense


def _why_not(name: str, module: nn.Module, owners: dict[object, list[str]]) -> str | None:
    kind = type(module)
    if not name:
        return "it is the model itself; there is no parent to put the factors into"
    # A subclass may do more than a product, or have its weight read from outside
    # (nn.MultiheadAttention).
    if kind is not nn.Linear and not _is_conv1d(module) and not _is_falcons(module):
        return f"{kind.__name__} is not a plain nn.Linear"
    weight = module._parameters.get("weight")
    if weight is None or type(weight) is not nn.Parameter or weight.dim() != 2:
        return "its weight is not a plain 2-D parameter"
    if weight.dtype not in _DTYPES:
        return f"weights of dtype {weight.dtype} are not supported"
    others = [owner for owner in owners[_identity(weight)] if owner != name]
    if others:
        return f"its weight is tied to {', '.join(others)}"
    hooks = (
        module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    )  # fmt: skip
    if "forward" in module.__dict__ or any(hooks):
        return "it carries hooks that a replacement would lose"
    return None


def _choose(
    model: nn.Module, candidates: dict[str, nn.Module], dense: dict[str, str], select: Select
) -> list[str]:
    if select is None:
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        picked = []
        for name, module in candidates.items():
            if module is head or name.rpartition(".")[2] == "lm_head":
                dense[name] = "output embeddings"
            else:
                picked.append(name)
        return picked
    if callable(select):
        picked = [name for name, module in candidates.items() if select(name, module)]
    else:
        several = isinstance(select, Iterable) and not isinstance(select, str)
        patterns = list(select) if several else [select]
        if not all(isinstance(pattern, str) for pattern in patterns):
            raise FactorizeError(
                f"select={patterns!r} has to be a predicate (name, module) -> bool or a list of "
                "glob patterns of module names, such as ['*.q_proj']."
            )
        _check_patterns("select", patterns, [*candidates, *dense])
        picked = [name for name in candidates if any(fnmatchcase(name, p) for p in patterns)]
    dense.update({name: "not selected" for name in candidates if name not in set(picked)})
    return picked


def _check_patterns(argument: str, patterns: Iterable[str], names: list[str]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise FactorizeError(
                f"{argument}: the pattern {pattern!r} matches none of the {len(names)} linear "
                "modules it could apply to; patterns are matched against whole names, such as "
                f"{_examples(names)}."
            )


def _nothing_selected(dense: dict[str, str]) -> str:
    if not dense:
        return "Nothing to factorize: the model has no linear modules (nn.Linear or Conv1D)."
    reasons: dict[str, list[str]] = {}
    for name, reason in dense.items():
        reasons.setdefault(reason, []).append(name)
    listed = "; ".join(f"{reason}: {_examples(names)}" for reason, names in reasons.items())
    return (
        f"Nothing to factorize: all {len(dense)} linear modules of the model stay as they are "
        f"({listed}). Choose others with select=."
    )


def _examples(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:4])
    return shown + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _parameter_owners(model: nn.Module) -> dict[object, list[str]]:
    owners: dict[object, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(_identity(parameter), []).append(name)
    return owners


def _identity(parameter: torch.Tensor) -> object:
    """Equal for two parameters on the same memory, which ties them as much as being one object."""
    if parameter.device.type == "meta" or type(parameter) is not nn.Parameter:
        return id(parameter)
    return (parameter.device, parameter.data_ptr()) if parameter.numel() else id(parameter)


def class_of(module: str, name: str) -> type | tuple[()]:
    """A class of another package, () if that is not loaded. A model that has one has loaded it: nothing is imported."""
    return getattr(sys.modules.get(module), name, ())


def _is_conv1d(module: nn.Module) -> bool:
    return type(module) is class_of("transformers.pytorch_utils", "Conv1D")


def _is_adapted(module: nn.Module) -> bool:
    return isinstance(module, class_of("peft.tuners.tuners_utils", "BaseTunerLayer"))


def _is_falcons(module: nn.Module) -> bool:
    """Whether it is FalconLinear, the same function written as a product and a sum."""
    return type(module) is class_of("transformers.models.falcon.modeling_falcon", "FalconLinear")


def _shape(module: nn.Module) -> tuple[int, int]:
    out_features, in_features = oriented_weight(module).shape
    return out_features, in_features
