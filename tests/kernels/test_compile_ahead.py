"""Every kernel variant compiles for GPUs that are not here (see compile_ahead.py)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fsvd_compile.kernels import _stream_attention, _stream_few

pytest.importorskip("triton.backends.nvidia")

HERE = Path(__file__).parent


def compiled(*arguments: str, script: str = "compile_ahead.py") -> list[dict]:
    """The lines of a script beside this file, run without the interpreter."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), env.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, HERE / script, *arguments],
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def hopper() -> list[dict]:
    looked_at = (
        "^table-(qkv|gate).*m1",
        "table-o.*m8",
        "carried.*m32",
        "shrink-bf16",
        "gate-bf16-m8",
        "attention-bf16.*-[Nn]one",
        "decode-attention-d80",
        "rope-bf16",
        "shrink-layer",
    )
    return compiled("--capability", "90", "--pdl", "--sass", "|".join(looked_at))


@pytest.mark.slow
def test_hopper(hopper):
    assert {kernel["kernel"] for kernel in hopper} == {
        "_gemv",
        "_stream",
        "_stream_few",
        "_stream_attention",
        "_skinny",
        "_norm_rows",
        "_rope_append",
        "_attention",
        "_combine",
        "_decode_attention",
    }
    for kernel in hopper:
        assert kernel["shared"] <= 227 * 1024, kernel
        if kernel["kernel"] == "_stream_attention":  # the tile of all cases but D = 64
            assert kernel["shared"] <= _stream_attention.shared_bytes(64, 128, 128, 3), kernel
        if kernel["case"] == "table-qkv-shrink-m8":
            used = _stream_few.shared_bytes(16, 512, 8, 2, 3, False, normed=4096)
            assert used - 1024 <= kernel["shared"] <= used, kernel
        assert_no_spills(kernel)


@pytest.mark.slow
def test_dependent_launch_is_in_order(hopper):
    """Dependents are launched first, and the wait comes before all else but static reads.

    Static are the weights, biases and norm parameters of the linear kernels, and the rows of a cache
    that are older than the step. The letters are explained in compile_ahead.order; the machine code is
    held to the same order as the PTX.
    """
    streamed = ("_stream", "_stream_few", "_stream_attention")
    ahead = (*streamed, "_gemv", "_skinny", "_decode_attention")
    for kernel in hopper:
        wanted = f"L{'R' if kernel['kernel'] in ahead else ''}W(RS)+"
        assert re.fullmatch(wanted, kernel["order_ptx"]), kernel
        if kernel["order_sass"]:
            assert re.fullmatch(wanted, kernel["order_sass"]), kernel
        attention = kernel["kernel"] == "_decode_attention" and kernel["async_copies"]
        if attention or kernel["kernel"] == "_stream_attention":
            # Triton starts loads of a loop early, and the wait is in the loop: a mask, q or table that
            # it moved along with K and V would be read before it is written. One load is the position.
            assert kernel["early_loads"] == 1, kernel
    looked_at = [kernel["kernel"] for kernel in hopper if kernel["order_sass"]]
    assert len(looked_at) > 15 and set(looked_at) == {kernel["kernel"] for kernel in hopper}
    assert sum(kernel["async_copies"] > 0 for kernel in hopper) > 20


@pytest.mark.slow
def test_loads_are_wide_and_products_on_tensor_cores(hopper):
    for kernel in hopper:
        if kernel["kernel"] in ("_stream", "_stream_few", "_stream_attention"):
            assert kernel["bulk_copies"] and not kernel["narrow_weight_loads"], kernel
        if "expand-odd-ranks" in kernel["case"] and kernel["kernel"] == "_gemv":
            assert kernel["wide_loads"] >= 2, kernel
            assert kernel["narrow_weight_loads"] == 0, kernel
        if "shrink-odd-rank" in kernel["case"] and kernel["kernel"] == "_gemv":  # 1234 in a row
            assert kernel["narrow_weight_loads"] > 0, "the pattern finds none where all are narrow"
        if (
            kernel["kernel"]
            in ("_stream_few", "_stream_attention", "_skinny", "_attention", "_decode_attention")
            and "fp32" not in kernel["case"]
        ):
            assert kernel["tensor_cores"], kernel


@pytest.mark.slow
def test_ampere():
    """No instruction of Hopper, and within the 99 KB of the GPUs of compute capability 8.6."""
    some = "table.*m[12]|bf16|layer|col|any|odd|attention"
    kernels = compiled("--capability", "80", "--only", some)
    tables = [k for k in kernels if k["case"].startswith("table-") and k["kernel"] == "_gemv"]
    assert {k["case"][-2:] for k in tables} == {"m1", "m2"}
    for kernel in tables:
        assert kernel["wide_loads"] >= 2 and kernel["narrow_weight_loads"] == 0, kernel
    for kernel in kernels:
        assert re.fullmatch("(RS)+", kernel["order_ptx"]), kernel
        assert kernel["shared"] <= 99 * 1024, kernel
        assert_no_spills(kernel)


def assert_no_spills(kernel: dict) -> None:
    """Spills live on the stack. A few bytes of it are no loop's spill; a weight stream has none.

    Triton 3.7.1 puts 136 bytes of the unrolled eleven blocks of down shrink there, 3.6 nothing.
    """
    most = {
        "_gemv": 0,
        "_stream": 136 if "down-shrink" in kernel["case"] else 0,
        # Gate and up of 64 tokens take all 255 registers and 16 bytes.
        # So do the tiles of a cache for 8 and more sequences, with up to 32, and grouped heads in fp32.
        "_decode_attention": 32,
        "_stream_few": 16 if kernel["case"].startswith("gate-") else 0,
        # One value waits in front of the loop until behind it, in some variants and versions.
        "_stream_attention": 8,
    }
    assert kernel["stack"] <= most.get(kernel["kernel"], 16), f"spills: {kernel}"


def test_kernels_compiled_for_fake_tensors_are_those_that_are_launched():
    (line,) = compiled(script="check_ahead.py")
    # Two of decode attention: in a capture it reads ahead. The odd address of a weight makes no `_gemv` of its own,
    # ranks that are no multiple of 8 do. Four of `_stream_few`: the norm is inside or, in fp16, in front; and
    # two that carry one.
    assert sorted(line["ahead"]) == [
        "_attention",
        "_combine",
        "_gemv",
        "_gemv",
        "_gemv",
        "_norm_rows",
        "_rope_append",
        "_stream",
        "_stream_attention",
        "_stream_attention",
        "_stream_few",
        "_stream_few",
        "_stream_few",
        "_stream_few",
    ]
    assert not line["later"]
    # And not what stands in for one that is being compiled.
    assert line["given out"] == ["CompiledKernel"]
    assert line["block as ever"]


def test_the_folder_of_the_cache_is_chosen_before_kernels_compile(monkeypatch):
    """The one that Inductor would choose; what the user chose stays."""
    import torch
    from torch._inductor.runtime.cache_dir_utils import triton_cache_dir

    from fsvd_compile.kernels import ahead

    monkeypatch.setenv("TRITON_CACHE_DIR", "mine")
    ahead._choose_folder(torch.device("cuda", 1))
    assert os.environ["TRITON_CACHE_DIR"] == "mine"
    monkeypatch.delenv("TRITON_CACHE_DIR")
    wanted = triton_cache_dir(1)
    ahead._choose_folder(torch.device("cpu"))
    assert "TRITON_CACHE_DIR" not in os.environ
    ahead._choose_folder(torch.device("cuda", 1))
    assert os.environ["TRITON_CACHE_DIR"] == wanted


@pytest.mark.gpu
def test_kernels_are_loaded_when_the_block_ends(monkeypatch):
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from triton.compiler import CompiledKernel

    from fsvd_compile.kernels import ahead

    loaded, load = [], CompiledKernel._init_handles

    def counted(kernel):
        if kernel.module is None:
            loaded.append(kernel.name)
        return load(kernel)

    monkeypatch.setattr(CompiledKernel, "_init_handles", counted)

    def call():
        x = torch.randn(5, 1, 1208, device="cuda", dtype=torch.bfloat16)
        w = torch.randn(72, 1208, device="cuda", dtype=torch.bfloat16)
        return x, [w], [None], "rms", None, None, 1e-5, 0.0

    with FakeTensorMode():
        fake = call()
    with ahead.compiling_ahead([(torch.ops.fsvd.shrink.default, fake)], captured=False):
        pass
    assert loaded
    early = len(loaded)
    torch.ops.fsvd.shrink(*call())
    assert len(loaded) == early
