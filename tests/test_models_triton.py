"""Whole models on our Triton kernels, through Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from decoding import check_decoder, static

OPS = ("shrink", "expand", "rope_append", "attention", "decode_attention")


@pytest.fixture
def triton_on_cpu():
    """Our ops run their Triton kernels on CPU tensors, through Triton's interpreter."""
    from fsvd_compile import kernels

    library = torch.library.Library("fsvd", "IMPL")
    for op in OPS:
        library.impl(op, getattr(kernels, f"{op}_triton"), "CPU", allow_override=True)
    yield
    library._destroy()
    # Destroying an override leaves the op without a CPU implementation; put the plain one back.
    restored = torch.library.Library("fsvd", "IMPL")
    for op in OPS:
        restored.impl(op, getattr(kernels, f"{op}_aten"), "CPU", allow_override=True)
    triton_on_cpu.kept = restored


@pytest.mark.interpret
@pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter is for machines without a GPU"
)
def test_triton_kernels_in_a_whole_model(cheap, triton_on_cpu):
    check_decoder("qwen3", "sequential", static, steps=1, options={"kernels": "ops"})
