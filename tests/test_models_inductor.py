"""Whole models through Inductor: a few on a CPU, where it takes half a minute each; every one of them on a GPU."""

from __future__ import annotations

import pytest
from decoding import check_decoder, dynamic, static


@pytest.mark.slow
@pytest.mark.parametrize(("name", "spelling"), [("gpt2", "transposed"), ("opt", "sequential")])
def test_decoder_through_inductor(name, spelling):
    check_decoder(name, spelling, dynamic if name == "opt" else static)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_ops_kept_through_inductor(name):
    """What a GPU runs in decode: our ops inside Inductor's graph, caches written through a mutating op."""
    check_decoder(name, "sequential", static, options={"kernels": "ops"})


def test_one_token_on_a_cpu_reads_weights_by_rows():
    """Batch 1: every linear of the decode graph is a loop of Inductor's; attention is the one library call."""
    prompt, decode = check_decoder("qwen2", "foreign", static, batch=1)
    assert decode.layers == [1, 2, 1]
    assert [k["library calls"] for k in decode.kernels] == [0, 1, 0]
    assert all(k["library calls"] > 0 for k in prompt.kernels[1:])
