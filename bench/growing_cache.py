"""Decode steps whose KV cache grows (transformers' DynamicCache): milliseconds a token of a loop as one writes it.

    python bench/growing_cache.py --model llama-7b --keep 0.5 --context 512 --json bench/results/growing_cache_h200.json

Every peer has a process of its own, as lengths that a process has seen are faster to attend to the next time (cuDNN
keeps a plan for each). Given tokens follow one another; what follows after the first eight is timed, by the wall clock,
eight tokens at a time between idle devices. `fsvd-compile bench decode` measures steps at a fixed length.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import statistics
import time

import torch
from transformers import DynamicCache

from fsvd_compile import bench
from fsvd_compile.bench import decode, models
from fsvd_compile.kept_cache import argument

BLOCK = 8
# Name to arguments of torch.compile, and whether torch may attend by cuDNN.
PEERS = {
    "eager": ({}, True),
    "eager-no-cudnn": ({}, False),
    "inductor": ({"backend": "inductor"}, True),
    "inductor-no-cudnn": ({"backend": "inductor"}, False),
    "flashsvd": ({"backend": "flashsvd"}, True),
    "flashsvd-off": ({"backend": "flashsvd", "options": {"cuda_graphs": "off"}}, True),
}


def main() -> None:
    args = _arguments()
    setting = decode.Setting(
        model=args.model, keep=args.keep, batch=args.batch, context=args.context,
        cache=args.context + args.tokens, peers=("eager",), device=args.device, calls=1,
    )  # fmt: skip
    rows = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for name in args.peers:
            row = pool.apply(measured, (setting, name, args.tokens))
            rows.append(row)
            print(
                f"{name:<18} first calls {row.extra['first_calls_s']} s, "
                f"relative RMS to fp32 {row.extra['error']:.3e}, {row.median_ms:.2f} ms a token",
                flush=True,
            )
            if args.json:
                bench.add([row], args.json)
    print(bench.table(rows))


@torch.no_grad()
def measured(setting: decode.Setting, name: str, tokens: int) -> bench.Row:
    """A peer's time a step; `extra` has the seconds of its first two calls, which compile, and its logits' error."""
    torch.manual_seed(0)
    how, cudnn = PEERS[name]
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    model = models.build(setting, setting.keep)
    vocabulary = model.config.get_text_config().vocab_size
    size = (setting.batch, setting.context + tokens)
    ids = torch.randint(0, vocabulary, size, device=model.device)
    prompt, following = ids[:, : setting.context], ids[:, setting.context :].split(1, dim=1)
    expected = walk(copy.deepcopy(model).float(), prompt, following[:BLOCK])[0]
    forward = torch.compile(model, **how) if how else model
    logits, seconds = walk(model, prompt, following, forward)
    blocks = [sum(block) for block in zip(*[iter(seconds[BLOCK:])] * BLOCK, strict=False)]
    times = sorted(1e3 * block / BLOCK for block in blocks)
    fifths = statistics.quantiles(times, n=5)
    where = bench.conditions(
        setting.device, timer="wall", block=BLOCK, phase="decode", model=setting.model, keep=setting.keep,
        batch=setting.batch, context=setting.context, tokens=tokens, kv="growing", dtype=setting.dtype,
    )  # fmt: skip
    return bench.Row(
        name, statistics.median(times), fifths[0], fifths[-1], len(times) * BLOCK, setting.batch, where,
        {
            "first_calls_s": [round(s, 3) for s in seconds[:2]],
            "error": decode.rel_rms(logits[:, :BLOCK], expected),
        },
    )  # fmt: skip


def walk(model, prompt, following, forward=None) -> tuple[torch.Tensor, list[float]]:
    """Logits `[batch, steps, vocabulary]` of tokens that follow a prompt, and each step's share of its block's time.

    The prompt goes through the model itself. The first tokens are blocks of their own.
    """
    cache = DynamicCache(config=model.config)
    given = {argument(model): cache, "use_cache": True}
    model(prompt, logits_to_keep=1, **given)
    step = model if forward is None else forward
    logits, seconds = [], []
    waiting = 0
    decode.synchronize(prompt.device)
    started = time.perf_counter()
    for i, token in enumerate(following):
        logits.append(step(token, **given).logits)
        waiting += 1
        if i < BLOCK or waiting == BLOCK:
            decode.synchronize(prompt.device)
            seconds += [(time.perf_counter() - started) / waiting] * waiting
            waiting, started = 0, time.perf_counter()
    return torch.cat(logits, 1).float(), seconds


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", help="as for fsvd-compile bench decode")
    add("--keep", type=float, default=0.5)
    add("--batch", type=int, default=1)
    add("--context", type=int, default=512, help="tokens before the first step (default 512)")
    add("--tokens", type=int, default=128, help=f"steps, a multiple of {BLOCK} (default 128)")
    add("--peers", nargs="+", choices=list(PEERS), default=list(PEERS), metavar="PEER")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--json", metavar="FILE")
    args = parser.parse_args()
    # The first block is not counted, and fifths are of two at least.
    if args.tokens < 3 * BLOCK or args.tokens % BLOCK:
        parser.error(
            f"--tokens {args.tokens}: it takes a multiple of {BLOCK}, at least {3 * BLOCK}"
        )
    return args


if __name__ == "__main__":
    main()
