"""Tiles of the decode kernels in the whole step of a model: what a layer of `tune_layer.py` gains, a step may lose.

    python bench/tune_step.py --model llama-7b --attention 32,12,2,2 --linear expand,1024,12288=16,256,8,4 --json FILE

Every tile is captured beside those that are kept, on a copy of the KV cache, and both are timed by turns in one
process, once the logits are as close to those of an fp32 copy of the model as `fsvd-compile bench decode` wants.
Prints two lines for each tile.
"""

from __future__ import annotations

import argparse
import copy
import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from fsvd_compile import bench
from fsvd_compile.backend import _pool, reset
from fsvd_compile.bench import decode, models
from fsvd_compile.kernels import _tuning
from fsvd_compile.kernels._tuning import AttentionTile, Launch, Tile


class Trial(NamedTuple):
    """A tile of decode attention, or of the linears of which `linear` is (op, K, rows); nothing is what is kept.

    A linear's is the tile of `_stream` or `_stream_few`. What a kernel wants of its tile beyond the numbers (rows of a
    carried norm, columns for every warp) is not looked at: it raises, which is printed.
    """

    name: str
    attention: AttentionTile | None = None
    linear: tuple[str, int, int] | None = None
    tile: tuple[int, int, int, int] | None = None


KEPT = Trial("kept")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama-7b", help="as in `fsvd-compile bench decode`")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--cache", type=int)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument(
        "--attention",
        type=attention,
        action="extend",
        nargs="+",
        default=[],
        metavar="ROWS,SPLITS,WARPS,STAGES",
    )
    parser.add_argument(
        "--linear",
        type=linear,
        action="extend",
        nargs="+",
        default=[],
        metavar="OP,K,OUT=ROWS,COLUMNS,WARPS,STAGES",
    )
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tune_step: tiles are timed on a GPU and there is none.")
    setting = decode.Setting(
        model=args.model, keep=args.keep, batch=args.batch, context=args.context, cache=args.cache,
        peers=("flashsvd-step",), device="cuda", rounds=args.rounds,
    )  # fmt: skip
    if args.json:
        bench.load(args.json)  # which says what is wrong with it
    run(setting, [*args.attention, *args.linear], args.json)


def attention(text: str) -> Trial:
    rows, splits, warps, stages = numbers(text)
    return Trial(f"attention {text}", AttentionTile(1, rows, splits, warps, stages))


def linear(text: str) -> Trial:
    of, _, tile = text.partition("=")
    op, _, sizes = of.partition(",")
    if op not in ("shrink", "expand"):
        raise argparse.ArgumentTypeError(f"{text!r}: {op!r} is neither shrink nor expand")
    k, rows = numbers(sizes, 2)
    return Trial(text, linear=(op, k, rows), tile=tuple(numbers(tile)))


def numbers(text: str, count: int = 4) -> list[int]:
    found = text.split(",")
    if len(found) != count or not all(n.isdecimal() and int(n) for n in found):
        raise argparse.ArgumentTypeError(f"{text!r} are not {count} positive integers with commas")
    return [int(n) for n in found]


def run(setting: decode.Setting, trials: list[Trial], path: str | None) -> None:
    torch.manual_seed(0)
    limit = decode.read_limit(torch.device("cuda", 0))
    subject = decode.Subject(setting, setting.keep)
    print(
        f"read limit {limit / 1e12:.3f} TB/s, eager's error {subject.eager_error:.3e}", flush=True
    )
    forward = torch.compile(subject.model, dynamic=False, **decode.PEERS["flashsvd-step"].how)
    cache = subject.cache
    for trial in [KEPT, *trials]:
        reset()  # a capture of the trial before would answer for this one
        other = trial._replace(name=trial.name + " again" * (trial is KEPT))
        steps, before, errors = {}, {}, {}
        for each, subject.cache in ((KEPT, cache), (other, copied(cache))):
            given = {decode.argument(subject.model): subject.cache}
            step = functools.partial(decode._logits, forward, subject.token, given)
            captures = sum(_pool.captures.values())
            try:
                with taking(each) as asked:
                    subject.walk(step)
            except Exception as error:
                if each is KEPT:
                    raise
                print(f"{each.name}: {type(error).__name__}: {error}", flush=True)
                break
            if not asked and each is not KEPT:
                sys.exit(f"tune_step: {each.name}: no launch of this step asks for such a tile.")
            if sum(_pool.captures.values()) == captures:
                # Uncaptured it would be timed with the tiles that are kept.
                sys.exit(f"tune_step: {each.name}: no CUDA graph was captured.")
            errors[each.name] = decode.rel_rms(subject.logits, subject.reference)
            steps[each.name] = step
            before[each.name] = functools.partial(models.rewind, subject.cache, setting.context)
        if len(steps) < 2:
            continue
        most = decode.allowed(subject.eager_error)
        wrong = {n: e for n, e in errors.items() if not e <= most}  # also NaN
        if wrong:
            print(f"{trial.name}: wrong, not timed; relative RMS to fp32 {wrong}", flush=True)
            continue
        times = {
            timer: bench.measure(
                steps, before=before, device="cuda", tokens=setting.batch, rounds=setting.rounds,
                calls=setting.calls, warmup=1, timer=timer, phase="decode", model=setting.model, keep=setting.keep,
                batch=setting.batch, context=setting.context, cache=setting.cache, dtype=setting.dtype,
                trial=trial.name,
            )
            for timer in ("event", "wall")
        }  # fmt: skip
        for event, wall in zip(*times.values(), strict=True):
            print(
                f"{event.name:<44} event {event.median_ms:.3f} ms, wall {wall.median_ms:.3f}",
                flush=True,
            )
            for row in (event, wall):
                row.extra.update(error=errors[row.name], read_limit_tb_s=round(limit / 1e12, 6))
            if path:
                bench.add([event, wall], path)


@contextmanager
def taking(trial: Trial) -> Iterator[list]:
    """Launches take the trial's tile; collects those that did."""
    asked: list[Any] = []
    rule = _tuning.decode_attention_tile

    def attention_tile(**question: Any) -> AttentionTile:
        if trial.linear is None:
            asked.append(question)
        return trial.attention or rule(**question)

    def linear_tile(launch: Launch) -> Tile:
        found = _tuning._linear_tile(launch, torch.device("cuda", 0))
        if (launch.op, launch.k, launch.rows) != trial.linear:
            return found
        asked.append(launch)
        rows, columns, warps, stages = trial.tile
        return found._replace(block_r=rows, block_k=columns, num_warps=warps, num_stages=stages)

    _tuning.decode_attention_tile = attention_tile
    try:
        with _tuning.forced(linear_tile):
            yield asked
    finally:
        _tuning.decode_attention_tile = rule


def copied(cache: Any) -> Any:
    """The same tokens at other addresses."""
    made = copy.copy(cache)
    made.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in made.layers:
        for name in ("keys", "values", "cumulative_length"):
            setattr(layer, name, getattr(layer, name).clone())
    return made


if __name__ == "__main__":
    main()
