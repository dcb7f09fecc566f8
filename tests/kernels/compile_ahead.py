"""Compiles every kernel variant for a GPU that is not there, through the launchers themselves.

Run as a script, without TRITON_INTERPRET, by test_compile_ahead.py: under the interpreter
`triton.jit` gives functions that cannot be compiled. A stand-in driver names the target; the
launchers run on CPU tensors that are never read, and each launch becomes a `warmup`, with Triton's
own specialization of the arguments. One JSON line per kernel: registers, stack bytes (spills live
there) and what the PTX holds.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

from fsvd_compile.kernels import (
    _triton,
    attention_triton,
    decode_attention_triton,
    expand_rms_triton,
    expand_triton,
    rope_append_triton,
    shrink_rms_triton,
    shrink_triton,
)

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BF16 = torch.bfloat16
WIDE_LOAD = re.compile(r"ld\.global\S*\.v4\.b32|cp\.async\.c[ag].*, 0x10")
# Weights are what is loaded to be evicted first.
EARLY_LOAD = re.compile(r"ld\.(?:volatile\.)?global")
NARROW_WEIGHT_LOAD = re.compile(r"ld\.global\S*evict_first(?!\S*\.v4\.b32)")


class Driver:
    """The three questions `JITFunction.warmup` asks a driver."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)


def weights(rows, k, dtype, layout="row"):
    made = []
    for r in rows:
        if layout == "col":
            made.append(torch.empty(k, r, dtype=dtype).t())
        elif layout == "any":
            made.append(torch.empty(r, 2 * k, dtype=dtype)[:, ::2])
        else:
            made.append(torch.empty(r, k, dtype=dtype))
    return made


def shrink(
    tokens, rows, k, dtype=BF16, bias=False, norm="none", norm_weight=True, layout="row", phase=None
):
    def run(pdl):
        w = weights(rows, k, dtype, layout)
        has = norm != "none" and norm_weight
        shrink_triton(
            torch.empty(tokens, k, dtype=dtype),
            w,
            [torch.empty(r, dtype=dtype) if bias else None for r in rows],
            norm,
            torch.empty(k, dtype=dtype) if has else None,
            torch.empty(k, dtype=dtype) if has and norm == "layer" else None,
            1e-5,
            0.0,
            pdl=pdl,
            phase=phase,
        )

    return run


def expand(tokens, rows, ranks, dtype=BF16, bias=False, residual=False, act="none", layout="row"):
    def run(pdl):
        w = [weights([n], r, dtype, layout)[0] for n, r in zip(rows, ranks, strict=True)]
        offsets = [sum(ranks[:i]) for i in range(len(ranks))]
        n = rows[0] if act.endswith("_mul") else sum(rows)
        expand_triton(
            torch.empty(tokens, sum(ranks), dtype=dtype),
            w,
            [torch.empty(n, dtype=dtype) if bias else None for n in rows],
            offsets,
            torch.empty(tokens, n, dtype=dtype) if residual else None,
            act,
            pdl=pdl,
        )

    return run


def rope(tokens, dim=128, dtype=BF16, table=torch.float32):
    def run(pdl):
        q = torch.empty(1, tokens, 32, dim, dtype=dtype).transpose(1, 2)
        k = torch.empty(1, tokens, 8, dim, dtype=dtype).transpose(1, 2)
        cache = torch.empty(1, 8, 1024, dim, dtype=dtype)
        cos = torch.empty(1, tokens, dim, dtype=table)
        at = torch.empty(tokens, dtype=torch.int64)
        rope_append_triton(q, k, k, cos, cos, cache, torch.empty_like(cache), at, pdl=pdl)

    return run


def attention(tokens, dim, dtype=BF16, mask=None, splits=None, group=4, dv=None):
    def run(pdl):
        q = torch.empty(1, 8 * group, tokens, dim, dtype=dtype)
        k = torch.empty(1, 8, 4096, dim, dtype=dtype)
        v = torch.empty(1, 8, 4096, dv or dim, dtype=dtype)
        m = None if mask is None else torch.empty(1, 1, tokens, 4096, dtype=mask)
        attention_triton(q, k, v, m, 0.1, pdl=pdl, splits=splits)

    return run


def decode_attention(
    heads, kv_heads, dim, dtype=BF16, mask=torch.bool, splits=None, dv=None, batch=1, length=4096
):
    def run(pdl):
        q = torch.empty(batch, heads, 1, dim, dtype=dtype)
        k = torch.empty(batch, kv_heads, 1, dim, dtype=dtype)
        v = torch.empty(batch, kv_heads, 1, dv or dim, dtype=dtype)
        caches = [torch.empty(batch, kv_heads, length, t.shape[3], dtype=dtype) for t in (k, v)]
        table = torch.empty(1, 1, dim)
        m = None if mask is None else torch.empty(1, 1, 1, length, dtype=mask)
        at = torch.empty(1, dtype=torch.int64)
        reach = torch.empty((), dtype=torch.int64) if mask is torch.bool else None
        decode_attention_triton(
            q,
            k,
            v,
            table,
            table,
            *caches,
            at,
            m,
            0.1,
            reach,
            pdl=pdl,
            read_ahead=pdl,
            splits=splits,
        )

    return run


def carried(tokens, rows, n, rank):
    def run(pdl):
        if _triton.capability(None) != (9, 0):
            return  # no kernel carries a norm
        x, g = torch.empty(tokens, rank, dtype=BF16), torch.empty(n, dtype=BF16)
        (w,), residual = weights((n,), rank, BF16), torch.empty(tokens, n, dtype=BF16)
        _, scaled, squares = expand_rms_triton(x, w, None, 0, residual, g, pdl=pdl)
        shrink_rms_triton(
            scaled, squares, weights(rows, n, BF16), [None] * len(rows), 1e-5, pdl=pdl
        )

    return run


def cases() -> Iterator[tuple[str, Callable[[bool], None]]]:
    """(name, launcher) of what is compiled; LLaMA-7B and Llama-3-8B shapes, and odd ones."""
    for t in (1, 2, 8):
        # The rows of configs/sm90.json, with what the model puts around them.
        yield f"table-qkv-shrink-m{t}", shrink(t, (1024, 1024, 1024), 4096, norm="rms")
        yield f"table-o-shrink-m{t}", shrink(t, (1024,), 4096)
        yield f"table-gate-up-shrink-m{t}", shrink(t, (1488, 1488), 4096, norm="rms")
        yield f"table-down-shrink-m{t}", shrink(t, (1488,), 11008)
        yield f"table-qkv-expand-m{t}", expand(t, (4096,) * 3, (1024,) * 3)
        yield f"table-o-expand-m{t}", expand(t, (4096,), (1024,), residual=True)
        yield (
            f"table-gate-up-expand-m{t}",
            expand(t, (11008,) * 2, (1488,) * 2, act="silu_mul"),
        )
        yield f"table-down-expand-m{t}", expand(t, (4096,), (1488,), residual=True)
    for t in (8, 32):
        yield f"carried-o-m{t}", carried(t, (1488, 1488), 4096, 1024)
        yield f"carried-down-m{t}", carried(t, (1024,) * 3, 4096, 1488)
    for name, dtype in TYPES.items():
        for t in (1, 2, 8, 48):
            yield f"shrink-{name}-m{t}", shrink(t, (512, 128, 128), 2048, dtype, True, "rms")
            yield f"gate-{name}-m{t}", expand(t, (2816,) * 2, (512,) * 2, dtype, act="silu_mul")
        yield f"rope-{name}", rope(1, dtype=dtype)
        for heads in (8, 32):
            for kind in (None, torch.bool, dtype):
                yield (
                    f"decode-attention-{name}-{heads}-{kind}",
                    decode_attention(heads, 8, 128, dtype, kind),
                )
        yield f"attention-{name}-none", attention(1, 128, dtype)
        yield f"attention-{name}-bool", attention(1, 128, dtype, torch.bool)
        yield f"attention-{name}-float", attention(1, 128, dtype, dtype)
    for count in (1, 2, 3, 4, 5):
        for t in (1, 8):
            yield f"shrink-{count}-weights-m{t}", shrink(t, (256,) * count, 576)
            yield f"expand-{count}-weights-m{t}", expand(t, (576,) * count, (256,) * count)
    for t in (1, 2, 8):
        yield f"shrink-stream-layer-m{t}", shrink(t, (512, 520), 4168, bias=True, norm="layer")
        yield f"shrink-layer-m{t}", shrink(t, (512,), 1280, bias=True, norm="layer")
        yield f"shrink-rms-no-weight-m{t}", shrink(t, (512,), 1280, norm="rms", norm_weight=False)
        yield f"shrink-odd-rank-m{t}", shrink(t, (819,), 1234, bias=True)
        yield f"shrink-long-k-m{t}", shrink(t, (1024,), 28672, norm="rms")
        yield f"gate-long-ranks-m{t}", expand(t, (512,) * 2, (20000,) * 2, act="silu_mul")
        yield f"expand-odd-ranks-m{t}", expand(t, (1000, 513), (819, 1791), bias=True)
        # LLaMA-7B at keep 0.6 and 0.8, ranks as they come.
        yield f"expand-ranks-of-4-m{t}", expand(t, (4096,) * 3, (1228,) * 3)
        yield f"gate-ranks-of-1-m{t}", expand(t, (11008,) * 2, (1791,) * 2, act="silu_mul")
        yield f"expand-ranks-of-2-m{t}", expand(t, (4096,), (1638,), residual=True)
        for layout in ("col", "any"):
            yield f"shrink-{layout}-m{t}", shrink(t, (512, 256), 1024, layout=layout)
            yield (
                f"gate-{layout}-m{t}",
                expand(t, (1024,) * 2, (384,) * 2, act="gelu_tanh_mul", layout=layout),
            )
        for act in ("relu", "gelu", "gelu_tanh", "silu"):
            yield f"expand-{act}-m{t}", expand(t, (1024,), (256,), residual=True, act=act)
        for act in ("relu_mul", "gelu_mul"):
            yield f"gate-{act}-m{t}", expand(t, (1024,) * 2, (256,) * 2, bias=True, act=act)
    for tokens, dim in ((1, 64), (17, 80), (3, 96)):
        yield f"rope-d{dim}-m{tokens}", rope(tokens, dim, table=BF16)
    for dim in (64, 80, 96, 256, 100):
        yield f"attention-d{dim}", attention(1, dim, mask=torch.bool)
        yield f"decode-attention-d{dim}", decode_attention(8, 8, dim)
        yield f"decode-attention-gqa-d{dim}", decode_attention(32, 8, dim)
    for batch in (8, 16):
        yield f"decode-attention-batch-{batch}", decode_attention(32, 32, 128, batch=batch)
    yield "expand-many-rows-m64", expand(64, (49152,), (1024,))
    for mask in (None, torch.bool, BF16):
        yield f"decode-attention-long-{mask}", decode_attention(32, 8, 128, mask=mask, length=8320)
    yield "decode-attention-one-split", decode_attention(8, 8, 128, splits=1)
    yield "decode-attention-dv", decode_attention(16, 8, 192, dv=128)
    yield "attention-one-split", attention(1, 128, mask=torch.bool, splits=1)
    yield "attention-one-split-none", attention(1, 128, splits=1)
    yield "attention-m5", attention(5, 128, mask=BF16)
    yield "attention-m64", attention(64, 128, mask=torch.bool)
    yield "attention-mha", attention(1, 128, mask=torch.bool, group=1)
    yield "attention-dv", attention(1, 192, mask=torch.bool, dv=128)


def cuobjdump(cubin: bytes, *flags: str) -> str:
    """What the cuobjdump inside Triton's wheel says of a kernel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, *flags, file.name], capture_output=True, text=True, check=True)
    return done.stdout


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers, stack bytes) of a kernel."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", cuobjdump(cubin, "--dump-resource-usage"))
    return int(found[1]), int(found[2])


def order(text: str, letters: dict[str, str]) -> str:
    """The sequence of events in a listing, one letter each, repetitions collapsed.

    L launches dependents, W waits for the kernel before, R reads and S stores global memory.
    """
    events = re.findall("|".join(f"(?P<{name}>{what})" for name, what in letters.items()), text)
    names = list(letters)
    sequence = "".join(next(n for n, hit in zip(names, e, strict=True) if hit) for e in events)
    return re.sub(r"(.)\1+", r"\1", sequence)


PTX_EVENTS = {
    "L": r"griddepcontrol\.launch_dependents",
    "W": r"griddepcontrol\.wait",
    "R": r"ld\.global|cp\.async\.(?:c[ag]|bulk\.tensor\S*\.global)",
    "S": r"st\.global",
}
SASS_EVENTS = {"L": r"PREEXIT", "W": r"ACQBULK", "R": r"LDG|UTMALDG", "S": r"STG"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--capability", type=int, required=True)
    parser.add_argument("--pdl", action="store_true")
    parser.add_argument("--only", default="", help="a regular expression of case names")
    parser.add_argument("--sass", help="the cases whose machine code is looked at too (slow)")
    args = parser.parse_args()

    triton.runtime.driver.set_active(Driver(args.capability))
    _triton.capability = lambda device: divmod(args.capability, 10)
    _triton.multiprocessors = lambda device: 132
    if args.capability == 90:
        _triton.shared_memory = lambda device: 232448
    _triton.require_triton = lambda tensor: None
    compiled: list = []
    seen: set[str] = set()

    def compile_only(kernel, grid, device, pdl, **kwargs):
        if pdl:
            kwargs["launch_pdl"] = True
        compiled.append(kernel.warmup(USE_PDL=pdl, grid=grid, **kwargs))

    _triton.launch = compile_only
    for name, run in cases():
        if not re.search(args.only, name):
            continue
        compiled.clear()
        run(args.pdl)
        for kernel in compiled:
            if kernel.hash in seen:
                continue
            seen.add(kernel.hash)
            ptx = kernel.asm["ptx"]
            registers, stack = resources(kernel.asm["cubin"])
            wanted = args.sass and re.search(args.sass, name)
            sass = cuobjdump(kernel.asm["cubin"], "-sass") if wanted else ""
            line = {
                "case": name,
                "kernel": kernel.metadata.name,
                "warps": kernel.metadata.num_warps,
                "shared": kernel.metadata.shared,
                "registers": registers,
                "stack": stack,
                "order_ptx": order(ptx, PTX_EVENTS),
                "order_sass": order(sass, SASS_EVENTS),
                "early_loads": len(EARLY_LOAD.findall(ptx.split("griddepcontrol.wait")[0])),
                "async_copies": ptx.count("cp.async.c"),
                "bulk_copies": ptx.count("cp.async.bulk.tensor"),
                "wide_loads": len(WIDE_LOAD.findall(ptx)),
                "narrow_weight_loads": len(NARROW_WEIGHT_LOAD.findall(ptx)),
                "tensor_cores": "mma" in ptx,
            }
            sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
