"""Tensor parallelism of factorized modules: transformers' plan for a dense model, split onto the factors.

Of y = U (V x) a "colwise" module shards U by rows and keeps V whole; a "rowwise" one shards V by columns and sums what
is as long as the rank, not as the output, over the devices.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping

import torch
from torch import nn

from fsvd_compile.factorized import BranchedLinear, LowRankLinear
from fsvd_compile.table import pattern

log = logging.getLogger(__name__)

COLWISE = ("colwise", "colwise_gather_output", "colwise_rep")


def split_factors(model: nn.Module, plan: Mapping[str, str]) -> dict[str, str]:
    """A tensor-parallel plan with the factors in it.

    A plan names modules of all layers alike ("model.layers.*.mlp.up_proj"), so it has to suit those layers where a
    module is factorized and those where it is dense. Where it cannot, all of it goes, with a warning if there are
    processes to share the work: each of them then holds the whole model. That is for a factorized module under
    another style than the column- and row-wise ones, one with a branch, a row-wise one that is factorized with a
    bias in some layers only, or that shares its V; and, in some layers only, a row-wise one with transformers
    that lack the style "local_params" (5.17).

    Args:
        model: With its factorized modules in place, without values.
        plan: Style by name of a module or parameter, numbers between dots replaced by `*`.
    """
    styles = sys.modules.get("transformers.distributed.parallel_utils") or sys.modules.get(
        "transformers.distributed.tensor_parallel"
    )
    known = getattr(styles, "ALL_PARALLEL_STYLES", ())
    kinds: dict[str, list[nn.Module]] = {}
    for name, module in model.named_modules():
        kinds.setdefault(pattern(name), []).append(module)
    first_factors = [m.v for m in model.modules() if isinstance(m, LowRankLinear)]
    added: dict[str, str] = {}
    removed: list[str] = []
    for name, style in plan.items():
        modules = kinds.get(name, [])
        if any(isinstance(m, BranchedLinear) for m in modules):
            return _none(f"{name} has a branch")
        pairs = [m for m in modules if isinstance(m, LowRankLinear)]
        if not pairs:
            continue
        if style in COLWISE:
            # The entry of the pair itself stays: transformers reads the number of heads off it.
            added[f"{name}.u"] = "colwise"
        elif style != "rowwise":
            return _none(f"{name} is {style}")
        elif any(first_factors.count(m.v) > 1 for m in pairs):
            return _none(f"{name} is rowwise and shares its first factor")
        elif len(pairs) == len(modules):
            removed.append(name)
            added[f"{name}.v"] = "rowwise"
        elif any(m.u.bias is not None for m in pairs):
            return _none(f"{name} is rowwise, with a bias, and dense in some layers")
        elif "local_params" not in known:
            return _none(f"{name} is rowwise and dense in some layers")
        else:
            # The pair's own entry sums its outputs, as it does a dense module's.
            added[f"{name}.v"] = "local_params"
            added[f"{name}.v.weight"] = "rowwise"
        for pair in pairs:
            # Into a pair and out of it pass plain tensors, as with a module that transformers quantized.
            pair._hf_quantized_needs_local_tp = True
    return {name: style for name, style in plan.items() if name not in removed} | added


def _none(why: str) -> dict[str, str]:
    asked = torch.distributed.is_available() and torch.distributed.is_initialized()
    level = logging.WARNING if asked else logging.DEBUG
    log.log(level, "no tensor-parallel plan for this model: %s", why)
    return {}
