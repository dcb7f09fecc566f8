"""A model directory in, its factorized form out: what `fsvd-compile factorize` does."""

from __future__ import annotations

import os
import pathlib

import torch

from fsvd_compile.errors import FactorizeError
from fsvd_compile.factorize import (
    FactorizeReport,
    Keep,
    Refine,
    calibration_windows,
    factorize,
)
from fsvd_compile.families import check_free, save


def factorize_checkpoint(
    source: str | os.PathLike,
    out: str | os.PathLike,
    keep: Keep,
    *,
    calibration: str | os.PathLike | None,
    length: int = 512,
    count: int = 64,
    allocation: str = "uniform",
    layerwise: bool = False,
    feedback: bool = False,
    refine: Refine | None = None,
    resume: str | os.PathLike | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    overwrite: bool = False,
) -> FactorizeReport:
    """Loads a dense causal language model, factorizes it and saves it in the common format.

    Args:
        source: A directory that `AutoModelForCausalLM` and `AutoTokenizer` load; nothing is downloaded.
        out: The directory to write, see `families.save`.
        keep: See `factorize`.
        calibration: A UTF-8 text file, or None for plain SVD.
        length: Tokens of a calibration window.
        count: Windows at the most.
        allocation: See `factorize`; so are `layerwise`, `feedback`, `refine` and `resume`.
        dtype: Of the model; by default its own.
        device: Where it is factorized.
        overwrite: Replace what is in `out`.

    Raises:
        FactorizeError: the model, its tokenizer or the text cannot be read, or `factorize` says no.
        CheckpointError: as `families.save` raises it.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ModuleNotFoundError as error:
        raise FactorizeError(
            "transformers is not installed: pip install 'fsvd-compile[transformers]'."
        ) from error
    check_free(out, overwrite)
    if not pathlib.Path(source).is_dir():
        raise FactorizeError(f"{source} is no directory; name one that save_pretrained wrote.")
    try:
        kind = torch.device(device).type
    except (RuntimeError, TypeError) as error:
        raise FactorizeError(f"device={device!r} is none that torch knows: {error}") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise FactorizeError(f"device={device}: torch sees no GPU. Use the device cpu.")
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype or "auto", local_files_only=True, output_loading_info=True
        )
        model = model.to(device)
        tokenizer = None
        if calibration is not None:
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    except Exception as error:  # files and models are of many hands
        raise FactorizeError(
            f"{source} cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    if missing := sorted(loading["missing_keys"]):
        raise FactorizeError(
            f"{source} has no {', '.join(missing[:4])}{' ...' if len(missing) > 4 else ''} of a "
            f"{type(model).__name__}, which would be random. If it is a model of another kind, load it with its own "
            "class and call fsvd_compile.factorize and fsvd_compile.save."
        )
    batches = None
    if calibration is not None:
        try:
            text = pathlib.Path(calibration).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise FactorizeError(f"calibration: {calibration} cannot be read: {error}") from error
        batches = calibration_windows(text, tokenizer, length, count)
        # Known before the run: on a GPU a token without an embedding ends the process.
        most = model.get_input_embeddings().num_embeddings
        if (last := max(int(batch.max()) for batch in batches)) >= most:
            raise FactorizeError(
                f"{source}: its tokenizer gives token {last} and the model embeds {most}; the tokenizer belongs to "
                "another model. Put the model's own into the directory."
            )
    model.eval().requires_grad_(False)
    report = factorize(
        model,
        keep,
        calibration=batches,
        allocation=allocation,
        layerwise=layerwise,
        feedback=feedback,
        refine=refine,
        resume=resume,
    )
    save(model, out, beside=source, overwrite=overwrite)
    return report
