"""Perplexity of SmolLM2-135M-Instruct factorized in several ways, on texts that the calibration does not contain.

    python bench/quality.py --text web=web.txt --json bench/results/quality_smollm2.json

Every way keeps the same share of the parameters of all linear layers but the head. Calibration: windows of Wikipedia
leads; evaluation: leads that were held out ("wiki"), and every `--text NAME=FILE`, a UTF-8 file of at least `--windows`
windows, of which windows are taken evenly from all over the file. `sword_text.py` writes one, the World English
Bible. Needs the packages of the demo (`make .venv/.demo`).
"""

from __future__ import annotations

import argparse
import copy
import json
import pathlib
import sys
import time

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "examples"))

import smollm2

import fsvd_compile
from fsvd_compile import bench

LENGTH = 512
WAYS = {
    "plain SVD": (),
    "closed form": ("calibration",),
    "+ allocation": ("calibration", "allocation"),
    "+ feedback": ("calibration", "allocation", "feedback"),
    "+ refinement": ("calibration", "allocation", "feedback", "refine"),
}


def main() -> None:
    args = _arguments()
    device = torch.device(args.device)
    dense, tokenizer = loaded(device)
    calibration = smollm2.windows(tokenizer, args.calibration, LENGTH).split(args.batch)
    texts = {"wiki": smollm2.windows(tokenizer, args.windows, LENGTH, held_out=True)}
    for name, path in args.text:
        texts[name] = spread(pathlib.Path(path).read_text("utf-8"), tokenizer, args.windows)
    if len(texts) == 1:
        print(
            "NOTE: one evaluation text only. The second is the World English Bible: see bench/sword_text.py, "
            "then --text web=web.txt\n",
            flush=True,
        )
    where = bench.conditions(
        device, windows=args.windows, length=LENGTH, calibration=args.calibration, batch=args.batch,
        steps=args.steps, lr=args.lr, dtype=dense.dtype,
    )  # fmt: skip
    rows: list[dict] = []
    print(f"{'':<15}{'keep':>6}" + "".join(f"{name:>12}" for name in texts) + f"{'s':>8}")
    report(rows, args.json, where, "dense", 1.0, dense, texts, {"factorize_s": 0.0})
    for keep in args.keep:
        for way in args.ways:
            model = copy.deepcopy(dense)
            started = time.perf_counter()
            done = fsvd_compile.factorize(
                model, keep, progress=False, **options(WAYS[way], calibration, args)
            )
            found = {
                "factorize_s": round(time.perf_counter() - started, 1),
                "parameters": done.parameters_after,
            }
            report(rows, args.json, where, way, keep, model, texts, found)


def loaded(device: torch.device):
    """The dense model in fp32 on its device, and the tokenizer."""
    dense, tokenizer = smollm2.load()
    # Gradients and moments in the precision they are meant to have, on every GPU.
    torch.backends.cuda.matmul.allow_tf32 = False
    return dense.to(device), tokenizer


def options(stages: tuple[str, ...], calibration: tuple, args: argparse.Namespace) -> dict:
    """The arguments of `factorize` for some stages of the compressor."""
    values = {
        "calibration": calibration,
        "allocation": "loss",
        "feedback": True,
        "refine": fsvd_compile.Refine(steps=args.steps, lr=args.lr),
    }
    return {stage: values[stage] for stage in stages}


def report(
    rows: list[dict], path: str | None, where: dict, way: str, keep: float, model, texts: dict, found: dict
) -> None:  # fmt: skip
    """Measures, prints and stores one row; the file is complete after every row."""
    perplexities = {name: smollm2.perplexity(model, windows) for name, windows in texts.items()}
    rows.append({"way": way, "keep": keep, "perplexity": perplexities} | found)
    cells = "".join(f"{value:12.2f}" for value in perplexities.values())
    print(f"{way:<15}{keep:6.2f}{cells}{found['factorize_s']:8.1f}", flush=True)
    store(rows, path, where)


def store(rows: list[dict], path: str | None, where: dict) -> None:
    """All rows so far with their conditions, if there is a path."""
    if path:
        text = json.dumps([row | {"conditions": where} for row in rows], indent=1)
        pathlib.Path(path).write_text(text + "\n")


def spread(text: str, tokenizer, count: int) -> torch.Tensor:
    """`count` windows of a text, `[count, LENGTH]`, evenly spread over it."""
    ids = tokenizer(text, verbose=False).input_ids
    whole = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)
    if len(whole) < count:
        sys.exit(f"a --text has {len(ids):,} tokens, fewer than {count} windows of {LENGTH}")
    return whole[torch.arange(count) * len(whole) // count]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add_stages(parser)
    add("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), metavar="WAY")
    add("--text", type=_text, action="append", default=[], metavar="NAME=FILE")
    add("--windows", type=int, default=200, help=f"of {LENGTH} tokens, a text (default 200)")
    add("--calibration", type=int, default=128, help="windows (default 128)")
    add("--batch", type=int, default=8, help="calibration windows in a batch (default 8)")
    return parser.parse_args()


def add_stages(parser: argparse.ArgumentParser) -> None:
    """The arguments that the stages of the compressor have for every model."""
    add = parser.add_argument
    add("--keep", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.6])
    add("--steps", type=int, default=200, help="of refinement, a layer (default 200)")
    add("--lr", type=float, default=3e-4, help="of refinement (default 3e-4)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--json", metavar="FILE")


def _text(argument: str) -> tuple[str, str]:
    name, equals, path = argument.partition("=")
    if not equals or not pathlib.Path(path).is_file():
        raise argparse.ArgumentTypeError(f"{argument!r} is not NAME=FILE with a file that exists")
    return name, path


if __name__ == "__main__":
    main()
