"""Perplexity after a calibration on few tokens: what they leave open comes from the weight itself.

    make demo                      # gets the model
    python bench/few_samples.py    # --tokens 0: plain SVD

Calibrated on bench/NOTES.md, measured on the first 768 tokens of README.md, every linear layer but the head.
"""

from __future__ import annotations

import argparse
import copy
import pathlib

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fsvd_compile import factorize

ROOT = pathlib.Path(__file__).parent.parent
MEASURED = 768


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default=ROOT / ".demo" / "SmolLM2-135M-Instruct", help="a directory"
    )
    parser.add_argument("--keep", type=float, default=0.95)
    parser.add_argument("--tokens", type=int, nargs="+", default=[0, 64, 256, 1024])
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()

    def ids(name: str) -> torch.Tensor:
        text = (ROOT / name).read_text("utf-8")
        return tokenizer(text, return_tensors="pt", verbose=False).input_ids

    calibration, measured = ids("bench/NOTES.md"), ids("README.md")[:, :MEASURED]
    print(f"dense: {perplexity(model, measured):.1f}", flush=True)
    for tokens in args.tokens:
        factorized = copy.deepcopy(model)
        given = [calibration[:, :tokens]] if tokens else None
        factorize(factorized, args.keep, calibration=given, progress=False)
        print(
            f"keep {args.keep:g}, {tokens} tokens: {perplexity(factorized, measured):.1f}",
            flush=True,
        )


@torch.no_grad()
def perplexity(model: torch.nn.Module, ids: torch.Tensor) -> float:
    return model(ids, labels=ids).loss.exp().item()


if __name__ == "__main__":
    main()
