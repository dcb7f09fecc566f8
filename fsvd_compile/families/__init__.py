"""Checkpoints of the public SVD families, read into one format: `load`, `save`, `inspect`."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch

from fsvd_compile.errors import CheckpointError
from fsvd_compile.factorized import LowRankLinear
from fsvd_compile.families.assemble import (
    Assembly,
    assemble,
    disguises,
    dtype_of,
    out_in,
)
from fsvd_compile.families.hub import register
from fsvd_compile.families.lora import read_adapter
from fsvd_compile.families.native import BRANCH, check_free, save
from fsvd_compile.families.report import Inspection
from fsvd_compile.families.source import Source, read

__all__ = ["Inspection", "check_free", "convert", "inspect", "load", "register", "save"]

log = logging.getLogger(__name__)


def load(
    path: str | os.PathLike,
    *,
    adapter: str | os.PathLike | None = None,
    merge: bool = True,
    refactor: bool = False,
    dtype: torch.dtype | None = None,
    device_map: Any = None,
) -> Any:
    """A transformers model with `LowRankLinear` inside, from a checkpoint of any known family.

    No code of the checkpoint runs: pickles are harvested for tensors, `auto_map` is ignored. Which tensor
    is which factor is decided by shapes. Before the model is returned each factorized module is run on
    a random input against the factors that were read. Tensors are mapped from the file where the format
    allows, so it must not be overwritten while the model is in use.

    Args:
        path: A directory or file; see `families.source.read`.
        adapter: A PEFT LoRA adapter directory, for the plain model or for the factorized one. On a factorized
            module it becomes further ranks of the factors, exactly; for dense weights `merge` decides
            (`families.lora`). The base may then be dense altogether.
        merge: Add the adapter to dense weights, rounded to their dtype. Otherwise it is kept exactly, as the
            branch of a `BranchedLinear` beside each; weights beside which that cannot be (tied to another, or a
            factor that the adapter names itself) are then an error. Whole tensors of an adapter
            (`modules_to_save`) replace the base's either way.
        refactor: Look for dense weights that are products of two factors (`families.disguise`), and hold
            them as factors again. On the CPU: of a 4096 x 4096 weight the look takes a second or so on two
            cores, taking it apart a minute or two.
        dtype: Of all parameters; by default what the config names, else that of most parameters.
            Families mix dtypes (SVD-LLM writes fp32 factors into fp16 models).
        device_map: As in transformers' `from_pretrained`.

    Returns:
        The model in evaluation mode. Nothing in it is factorized if all factors of the checkpoint are no
        smaller than the weights (`families.storage`), or an adapter was merged into a dense base.

    Raises:
        CheckpointError: the checkpoint cannot be read, is of no known family, contradicts its config,
            nothing in it is factorized, or the adapter does not fit it.
    """
    return _built(*_factorized(path, adapter, merge, refactor), dtype, device_map)


def _assembled(
    path: str | os.PathLike, adapter: str | os.PathLike | None = None, merge: bool = True
) -> tuple[Source, Assembly]:
    if adapter is None and not merge:
        raise CheckpointError(
            "merge=False says how an adapter is held; name its directory (adapter=)."
        )
    source = read(path)
    return source, assemble(source, None if adapter is None else read_adapter(adapter), merge)


def _factorized(
    path: str | os.PathLike, adapter: str | os.PathLike | None, merge: bool, refactor: bool
) -> tuple[Source, Assembly]:
    source, assembly = _assembled(path, adapter, merge)
    if refactor:
        assembly = assembly.refactored(disguises(assembly))
    if not assembly.modules and not assembly.multiplied and adapter is None:
        searched = f", and none of {len(assembly.dense)} dense weights is of low rank" * refactor
        raise CheckpointError(
            f"{source.path}: no factor pair is found for any linear module of "
            f"{assembly.model_class.__name__}{searched}. A dense checkpoint is loaded with transformers "
            "and factorized with fsvd_compile.factorize"
            + ("." if refactor else "; one that is low-rank in disguise, with refactor=True.")
        )
    return source, assembly


def _built(source: Source, assembly: Assembly, dtype: torch.dtype | None, device_map: Any) -> Any:
    register()
    config = assembly.config
    if assembly.modules:
        config.quantization_config = assembly.described()
    dtype = dtype or dtype_of(source, assembly)
    try:
        model = assembly.model_class.from_pretrained(
            None, config=config, state_dict=dict(assembly.state), dtype=dtype, device_map=device_map
        )
        if (source.folder / "generation_config.json").is_file():
            model.generation_config = type(model.generation_config).from_pretrained(source.folder)
        # What transformers keeps of its table is what it used, and these names were half the model's already. Without
        # it a save goes by the whole table, and gives the names of published files.
        vars(model).pop("_weight_conversions", None)
    except Exception as error:  # models are built by code of many hands
        raise CheckpointError(
            f"{source.path}: transformers cannot build the model: {type(error).__name__}: {error}"
        ) from error
    _verify(model, assembly)
    if log.isEnabledFor(logging.INFO):
        log.info("%s", Inspection.of(source, assembly))
    return model.eval()


def inspect(path: str | os.PathLike, *, spectra: bool = True) -> Inspection:
    """What a checkpoint holds: family, ranks, sizes, what is dense, also in disguise; `print` it.

    Args:
        path: As for `load`; a plain dense model is looked at too.
        spectra: Look for dense weights of low rank, as `refactor` of `load` does.

    Raises:
        CheckpointError: as for `load`; nothing is built.
    """
    source, assembly = _assembled(path)
    return Inspection.of(source, assembly, disguises(assembly) if spectra else None)


def convert(
    path: str | os.PathLike,
    out: str | os.PathLike,
    *,
    adapter: str | os.PathLike | None = None,
    merge: bool = True,
    refactor: bool = False,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Inspection:
    """`load`, then `save`; a tokenizer and generation settings that lie beside the weights go along.

    Returns:
        What was written, as it was in the checkpoint.

    Raises:
        CheckpointError: as for `load` and `save`; `out` is then as it was.
    """
    check_free(out, overwrite)
    source, assembly = _factorized(path, adapter, merge, refactor)
    save(_built(source, assembly, dtype, None), out, overwrite=overwrite, beside=source.folder)
    return Inspection.of(source, assembly)


@torch.no_grad()
def _verify(model: Any, assembly: Assembly) -> None:
    """Every factorized module on a random input against the factors as they were stored, in fp64; a branch with
    the dense weight that it lies beside.

    Raises:
        CheckpointError: one is further off than its dtype allows.
    """
    generator = torch.Generator().manual_seed(0)
    hosts = {f"{name}{BRANCH}": name for name in assembly.branches}
    for name, stored in assembly.modules.items():
        module = model.get_submodule(name)
        if not isinstance(module, LowRankLinear):
            raise CheckpointError(f"{name} is a {type(module).__name__} after loading.")
        u, v = module.u.weight, module.v.weight
        host = model.get_submodule(hosts[name]).base if name in hosts else None
        if "meta" in {w.device.type for w in (u, v, v if host is None else host.weight)}:
            continue  # offloaded
        x = torch.randn(3, v.shape[1], generator=generator, dtype=torch.float64)
        expected = x @ stored.v.double().T @ stored.u.double().T
        actual = x @ v.double().cpu().T @ u.double().cpu().T
        if host is not None:
            # A small branch alone may lose more digits in a 16-bit type; what counts is the sum.
            expected = expected + x @ assembly.dense[hosts[name]].double().T
            actual = actual + x @ out_in(host, host.weight).double().cpu().T
        if stored.bias is not None:
            expected, actual = (
                expected + stored.bias.double(),
                actual + module.u.bias.double().cpu(),
            )
        error = (actual - expected).norm() / expected.norm().clamp_min(1e-30)
        if not error <= 4 * torch.finfo(u.dtype).eps:
            raise CheckpointError(
                f"{name} differs from the factors in the checkpoint by {error:.1e} after loading."
            )
