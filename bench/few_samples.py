"""Perplexity after a calibration on few tokens: what they leave open comes from the weight itself.

    make demo                      # gets the model and the texts
    python bench/few_samples.py    # --tokens 0: plain SVD

SmolLM2-135M-Instruct in fp32, every linear layer but the head; calibrated on the first tokens of one half of the
Wikipedia leads, measured on windows of the other.
"""

from __future__ import annotations

import argparse
import copy
import pathlib
import sys

from fsvd_compile import factorize

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "examples"))

import smollm2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=float, default=0.95)
    parser.add_argument("--tokens", type=int, nargs="+", default=[0, 64, 256, 1024])
    parser.add_argument(
        "--windows", type=int, default=4, help="of 512 tokens (default %(default)s)"
    )
    args = parser.parse_args()
    model, tokenizer = smollm2.load()
    calibration = smollm2.windows(tokenizer, 1, max(args.tokens))
    measured = smollm2.windows(tokenizer, args.windows, 512, held_out=True)
    print(f"dense: {smollm2.perplexity(model, measured):.1f}", flush=True)
    for tokens in args.tokens:
        factorized = copy.deepcopy(model)
        given = [calibration[:, :tokens]] if tokens else None
        factorize(factorized, args.keep, calibration=given, progress=False)
        found = smollm2.perplexity(factorized, measured)
        print(f"keep {args.keep:g}, {tokens} tokens: {found:.1f}", flush=True)


if __name__ == "__main__":
    main()
