"""A real language model, factorized, compiled and timed on this machine; run by `make demo`."""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import sys
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything needed is on disk

import smollm2
import torch
import transformers
from transformers import StaticCache

import fsvd_compile
from fsvd_compile import bench
from fsvd_compile.kept_cache import argument

STEPS = 6

# A model of 135 M parameters has little to spare, and not everywhere the same. Perplexity on eight
# held-out windows, dense 16.0, after 16384 calibration tokens: with one kind of module at keep 0.5,
# q 16.5, o 17.2, k 17.7, v 32, gate 41, down 54, up 147; with the shares below (85 % of the linear
# weights) 24.4; with one share for all, 49 at 0.9, 73 at 0.8, 117 at 0.7 and 508 at 0.5.
KEEP = {"*.q_proj": 0.5, "*.k_proj": 0.8, "*.o_proj": 0.5, "*.gate_proj": 0.8}


def main() -> None:
    args = arguments()
    device = torch.device(args.device)
    started = time.perf_counter()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()

    with step(1, "SmolLM2-135M-Instruct and Wikipedia leads"):
        dense, tokenizer = smollm2.load()
        dense.to(device)
        calibration = smollm2.windows(tokenizer, args.windows, 512)
        held_out = smollm2.windows(tokenizer, 4, 512, held_out=True)
        prompt = smollm2.windows(tokenizer, 1, args.prompt, held_out=True, first=300).to(device)

    with step(2, f"Factorize, keep {args.keep}"):
        factorized = copy.deepcopy(dense)
        print(fsvd_compile.factorize(factorized, args.keep, calibration=calibration.split(1)))

    with step(3, "What it costs: perplexity on held-out leads"):
        for name, model in {"dense": dense, "factorized": factorized}.items():
            print(f"{name:<12}{smollm2.perplexity(model, held_out):8.2f}")

    with step(4, 'Text (greedy, float32), with torch.compile(backend="flashsvd") at the end'):
        decoders = make_decoders(dense, factorized, prompt, args)
        print("prompt:", repr(tokenizer.decode(prompt[0])))
        tokens = {name: decoders[name].generate(args.tokens) for name in (DENSE, EAGER, OURS)}
        for name, ids in tokens.items():
            print(f"{name}: {tokenizer.decode(ids)!r}")
        check_agreement(tokens[EAGER], tokens[OURS], decoders[EAGER], tokenizer)

    with step(5, "What was matched in one decode step"):
        ours = decoders[OURS]
        ours.prefill()
        print(fsvd_compile.explain(ours.forward, **ours.inputs()))

    with step(6, "Speed, batch 1"):
        if device.type == "cuda":
            dense.to(torch.bfloat16)
            factorized.to(torch.bfloat16)
            decoders = make_decoders(dense, factorized, prompt, args)
        rows = time_all(decoders, dense.dtype, args)
    if args.json:
        bench.save(rows, args.json)
    print(f"\nTotal {time.perf_counter() - started:.0f} s.")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=float, help="one share of parameters for all modules")
    parser.add_argument("--tokens", type=int, default=40, help="tokens to generate (default 40)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="worse text, no Inductor baseline")
    parser.add_argument("--json", metavar="FILE", help="write the timings there")
    args = parser.parse_args()
    args.keep = args.keep or KEEP
    args.windows = 4 if args.quick else 16
    args.rounds = 2 if args.quick else 5
    args.calls = 8
    args.prompt = 512 if args.device.startswith("cuda") else 64
    return args


@contextlib.contextmanager
def step(number: int, title: str):
    print(f"\n[{number}/{STEPS}] {title}", flush=True)
    start = time.perf_counter()
    yield
    print(f"({time.perf_counter() - start:.1f} s)", flush=True)


class Decoder:
    """Greedy decoding with a static KV cache: one prefill, then one token per step.

    Args:
        model: The language model.
        prompt: Token ids `[1, T]`.
        length: Size of the KV cache in tokens.
        how: Arguments of `torch.compile`; eager without.
    """

    def __init__(self, model, prompt: torch.Tensor, length: int, **how: str):
        self.forward = torch.compile(model, dynamic=False, **how) if how else model
        self.prompt = self.token = prompt
        self.name = argument(model)  # transformers 5.24 has renamed it
        config = model.config
        self.cache = StaticCache(config, max_cache_len=length)
        # Allocated now: a cache that appears inside a compiled prefill has no static address.
        self.cache.early_initialization(
            1, config.num_key_value_heads, config.head_dim, model.dtype, prompt.device
        )

    def inputs(self) -> dict:
        return {"input_ids": self.token, self.name: self.cache, "logits_to_keep": 1}

    @torch.no_grad()
    def step(self) -> torch.Tensor:
        """Logits `[vocabulary]` of the next token, which becomes the next input."""
        logits = self.forward(**self.inputs()).logits[0, -1]
        self.token = logits.argmax().view(1, 1)
        return logits

    def prefill(self) -> torch.Tensor:
        self.rewind()
        return self.step()

    def rewind(self) -> None:
        self.cache.reset()
        self.token = self.prompt

    def generate(self, count: int) -> list[int]:
        tokens = []
        for i in range(count):
            self.step() if i else self.prefill()
            tokens.append(self.token.item())
        return tokens


DENSE, EAGER = "dense, eager", "factorized, eager"
INDUCTOR, OURS = "factorized, inductor", "factorized, flashsvd"


def make_decoders(dense, factorized, prompt: torch.Tensor, args) -> dict[str, Decoder]:
    length = args.prompt + max(args.tokens, args.calls + 8)
    # CUDA graphs, as ours: without them a small model waits for the host. On a CPU the mode changes nothing.
    inductor = {"backend": "inductor", "mode": "reduce-overhead"}
    decoders = {
        DENSE: Decoder(dense, prompt, length),
        EAGER: Decoder(factorized, prompt, length),
        INDUCTOR: Decoder(factorized, prompt, length, **inductor),
        OURS: Decoder(factorized, prompt, length, backend="flashsvd"),
    }
    if args.quick:
        del decoders[INDUCTOR]  # compiling 30 layers takes it minutes on a small CPU
    return decoders


def check_agreement(a: list[int], b: list[int], eager: Decoder, tokenizer) -> None:
    """Ends the program with 1 unless eager (a) and compiled (b) gave the same tokens."""
    if a == b:
        print(f"Compiled and eager agree in all {len(a)} tokens.")
        return
    at = next(i for i in range(len(a)) if a[i] != b[i])
    eager.rewind()
    logits = [eager.step() for _ in range(at + 1)][-1]
    first, second = logits.topk(2).values.tolist()
    sys.exit(
        f"WRONG: compiled and eager differ from token {at} on: {tokenizer.decode(b[at:])!r} "
        f"instead of {tokenizer.decode(a[at:])!r}. The eager model's two best logits there are "
        f"{first:.5f} and {second:.5f}."
    )


def time_all(decoders: dict[str, Decoder], dtype: torch.dtype, args) -> list[bench.Row]:
    for name, decoder in decoders.items():
        start = time.perf_counter()
        decoder.generate(2)
        print(f"first prefill and decode, {name}: {time.perf_counter() - start:.1f} s", flush=True)
    steps = {name: decoder.step for name, decoder in decoders.items()}
    common = {
        "device": args.device,
        "rounds": args.rounds,
        "dtype": dtype,
        "batch": 1,
        "context": args.prompt,
    }
    prefill = bench.measure(
        steps,
        before={name: decoder.rewind for name, decoder in decoders.items()},
        tokens=args.prompt,
        calls=1,
        warmup=1,
        phase="prefill",
        **common,
    )
    decode = bench.measure(
        steps,
        before={name: decoder.prefill for name, decoder in decoders.items()},
        calls=args.calls,
        phase="decode",
        **common,
    )
    print(bench.table(prefill), bench.table(decode), sep="\n")
    return [*prefill, *decode]


if __name__ == "__main__":
    main()
