"""Perplexity of SmolLM2-135M-Instruct factorized in several ways, on Wikipedia leads that were held out.

    python bench/quality.py --windows 200 --json bench/results/quality_smollm2.json

Every way keeps the same share of the parameters of all linear layers but the head; the calibration is 24 windows
of 512 tokens of other leads. Needs the packages of the demo (`make .venv/.demo`).
"""

from __future__ import annotations

import argparse
import copy
import json
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "examples"))

import smollm2

import fsvd_compile
from fsvd_compile import bench

LENGTH = 512
WAYS = {
    "plain SVD": {},
    "closed form": {"calibration": True},
    "closed form, ranks by loss": {"calibration": True, "allocation": "loss"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.6])
    parser.add_argument("--windows", type=int, default=200, help="of held-out text (default 200)")
    parser.add_argument("--calibration", type=int, default=24, help="windows (default 24)")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    dense, tokenizer = smollm2.load()
    calibration = smollm2.windows(tokenizer, args.calibration, LENGTH).split(1)
    held_out = smollm2.windows(tokenizer, args.windows, LENGTH, held_out=True)
    where = bench.conditions(
        "cpu", windows=args.windows, length=LENGTH, calibration=args.calibration, dtype=dense.dtype
    )
    rows = [{"way": "dense", "keep": 1.0, "perplexity": smollm2.perplexity(dense, held_out)}]
    print(f"{'dense':<30}{rows[0]['perplexity']:10.2f}", flush=True)
    for keep in args.keep:
        for way, options in WAYS.items():
            options = dict(options)
            if options.pop("calibration", False):
                options["calibration"] = calibration
            model = copy.deepcopy(dense)
            started = time.perf_counter()
            report = fsvd_compile.factorize(model, keep, progress=False, **options)
            seconds = time.perf_counter() - started
            row = {
                "way": way,
                "keep": keep,
                "perplexity": smollm2.perplexity(model, held_out),
                "parameters": report.parameters_after,
                "factorize_s": round(seconds, 1),
            }
            rows.append(row)
            print(f"{way:<30}{keep:5.2f}{row['perplexity']:12.2f}{seconds:8.0f} s", flush=True)
    if args.json:
        pathlib.Path(args.json).write_text(
            json.dumps([row | {"conditions": where} for row in rows], indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
