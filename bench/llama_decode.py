"""One decode step of a factorized LLaMA shape, logits out: ours beside eager and Inductor, and the read limit.

    python bench/llama_decode.py --model llama-7b --keep 0.5 --context 512 --json bench/results/decode.json

Random weights: a step's time does not depend on their values. Correctness comes first: every variant's logits are
compared with an fp32 copy of the model, and the run ends with 1 if ours is worse than 1.1x eager's error.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time

import torch
import transformers
from torch import nn
from transformers import StaticCache

from fsvd_compile import LowRankLinear, bench

MODELS = {
    "llama-7b": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32,
    },
    "llama3-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "rope_theta": 500000.0, "max_position_embeddings": 65536,
    },
    "smollm2-135m": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4,
    },
}  # fmt: skip

PEERS = {
    "eager": {},
    "inductor": {"backend": "inductor", "mode": "reduce-overhead"},
    "inductor-max": {"backend": "inductor", "mode": "max-autotune"},
    "flashsvd-step": {"backend": "flashsvd", "options": {"cuda_graphs": "step"}},
    "flashsvd-layer": {"backend": "flashsvd", "options": {"cuda_graphs": "layer"}},
    "flashsvd-off": {"backend": "flashsvd", "options": {"cuda_graphs": "off"}},
}


def main() -> None:
    args = arguments()
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = random_model(MODELS[args.model], args.keep, args.round, device, dtype)
    weights = sum(
        p.numel() * p.element_size() for n, p in model.named_parameters() if "embed" not in n
    )
    if model.config.tie_word_embeddings:
        weights += model.lm_head.weight.numel() * model.lm_head.weight.element_size()
    kv = kv_bytes(model.config, args.batch, args.context, dtype)
    limit = read_limit(device)
    print(f"read limit {limit / 1e12:.2f} TB/s; a step reads {(weights + kv) / 1e9:.3f} GB")

    token = torch.randint(0, model.config.vocab_size, (args.batch, 1), device=device)
    prompt = torch.randint(0, model.config.vocab_size, (args.batch, args.context), device=device)
    filled = fill(model, prompt, args.context + args.room)
    reference = fp32_logits(model, token, filled) if not args.skip_check else None
    steps, before, errors = {}, {}, {}
    for name in args.peers.split(","):
        cache = copy.deepcopy(filled)
        steps[name] = Step(model, token, cache, PEERS[name])
        before[name] = lambda c=cache: rewind(c, args.context)
        started = time.perf_counter()
        for _ in range(4):  # warm-up, capture, replay, replay
            before[name]()
            logits = steps[name]()
        first = time.perf_counter() - started
        if reference is not None:
            errors[name] = rel_rms(logits, reference)
            print(
                f"{name:<16} first calls {first:6.1f} s   relative RMS to fp32 {errors[name]:.3e}",
                flush=True,
            )
    allowed = max(1.1 * errors.get("eager", 0.0), 1e-5)
    wrong = [n for n, e in errors.items() if n.startswith("flashsvd") and not e <= allowed]
    if wrong:
        sys.exit(f"WRONG: {', '.join(wrong)} off by more than {allowed:.3e}; nothing is timed.")

    rows = bench.measure(
        steps, before=before, device=device, tokens=args.batch, rounds=args.rounds, calls=args.calls,
        phase="decode", model=args.model, keep=args.keep, batch=args.batch, context=args.context,
        cache=args.context + args.room, dtype=dtype, bytes=weights + kv,
        read_limit_tb_s=round(limit / 1e12, 3), limit_ms=round(1e3 * (weights + kv) / limit, 4),
        rank_multiple=args.round, pdl=os.environ.get("FSVD_PDL", "1"),
    )  # fmt: skip
    print(bench.table(rows))
    for row in rows:
        rate = (weights + kv) / row.median_ms * 1e3
        print(
            f"{row.name:<16} {rate / 1e12:6.2f} TB/s  {100 * rate / limit:5.1f} % of the read limit"
        )
    if args.json:
        bench.save(rows, args.json)


def arguments() -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="llama-7b" if gpu else "tiny")
    parser.add_argument(
        "--keep", type=float, default=0.5, help="share of parameters; 1 leaves all dense"
    )
    parser.add_argument(
        "--round", type=int, default=16, help="ranks are rounded down to this multiple"
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=512, help="tokens in the cache")
    parser.add_argument("--room", type=int, default=512, help="cache positions beyond them")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument(
        "--peers", default=",".join(PEERS) if gpu else "eager,inductor,flashsvd-off"
    )
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--skip-check", action="store_true", help="no fp32 reference (for memory)")
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args()


def random_model(
    sizes: dict, keep: float, multiple: int, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """A causal LM of that shape with random weights, every linear but the head factorized."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
        for path, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and path != "lm_head" and keep < 1:
                m, n = module.weight.shape
                rank = int(keep * m * n / (m + n)) // multiple * multiple
                parent, _, child = path.rpartition(".")
                setattr(model.get_submodule(parent), child, LowRankLinear(n, m, rank, bias=False))
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    model.tie_weights()
    # The frequencies are computed, not stored: allocating the weights left them unset.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    for name, parameter in model.named_parameters():
        nn.init.ones_(parameter) if "norm" in name else nn.init.normal_(parameter, std=0.03)
    return model


class Step:
    """One decode step as a callable without arguments."""

    def __init__(self, model: nn.Module, token: torch.Tensor, cache: StaticCache, how: dict):
        self.forward = torch.compile(model, dynamic=False, **how) if how else model
        self.inputs = {"input_ids": token, "past_key_values": cache, "use_cache": True}

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        return self.forward(**self.inputs).logits


@torch.no_grad()
def fill(model: nn.Module, prompt: torch.Tensor, length: int) -> StaticCache:
    config = model.config
    cache = StaticCache(config=config, max_cache_len=length)
    head = config.hidden_size // config.num_attention_heads
    cache.early_initialization(
        len(prompt), config.num_key_value_heads, head, model.dtype, prompt.device
    )
    model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def rewind(cache: StaticCache, length: int) -> None:
    for layer in cache.layers:
        layer.cumulative_length.fill_(length)


def fp32_logits(model: nn.Module, token: torch.Tensor, filled: StaticCache) -> torch.Tensor:
    wide = copy.deepcopy(model).float()
    cache = copy.deepcopy(filled)
    for layer in cache.layers:
        layer.keys, layer.values, layer.dtype = (
            layer.keys.float(),
            layer.values.float(),
            torch.float32,
        )
    with torch.no_grad():
        return wide(token, past_key_values=cache, use_cache=True).logits


def rel_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).square().mean() / expected.square().mean()).sqrt().item()


def kv_bytes(config, batch: int, context: int, dtype: torch.dtype) -> int:
    head = config.hidden_size // config.num_attention_heads
    return (
        2
        * batch
        * config.num_hidden_layers
        * config.num_key_value_heads
        * head
        * context
        * dtype.itemsize
    )


def read_limit(device: torch.device) -> float:
    """Bytes a second of a reduction over data far larger than the caches."""
    data = torch.ones((8 if device.type == "cuda" else 1) << 28, dtype=torch.int32, device=device)
    rows = bench.measure({"read": data.sum}, device=device, rounds=3, calls=5)
    return data.numel() * data.element_size() / rows[0].p20_ms * 1e3


if __name__ == "__main__":
    main()
