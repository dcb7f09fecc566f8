"""lower(): which fused ops become ATen, and that nothing of the packing is left when they do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from harness import rewrite
from torch import nn

K = 37


def low_rank(inputs=K, out=22, rank=5, bias=True):
    return nn.Sequential(nn.Linear(inputs, rank, bias=False), nn.Linear(rank, out, bias=bias))


class Layer(nn.Module):
    """Everything at once: norm, q/k/v, RoPE, cache, grouped attention, residuals, gated MLP."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(K, eps=1e-6) for _ in range(2))
        self.q, self.k, self.v = (
            low_rank(out=32),
            low_rank(out=16, rank=3),
            low_rank(out=16, rank=2),
        )
        self.o = low_rank(32, K)
        self.gate, self.up, self.down = low_rank(out=41), low_rank(out=41, rank=7), low_rank(41, K)

    def forward(self, x, cos, sin, k_cache, v_cache, position, mask):
        def rotated(t):
            return t * cos + torch.cat((-t[..., 4:], t[..., :4]), -1) * sin

        n, t, _ = x.shape
        y = self.norms[0](x)
        q, k, v = (f(y).view(n, t, -1, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = rotated(q), rotated(k)
        k_cache.index_copy_(2, position, k)
        v_cache.index_copy_(2, position, v)
        y = F.scaled_dot_product_attention(q, k_cache, v_cache, mask, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).reshape(n, t, 32))
        y = self.norms[1](x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def inputs(batch, rows, slots=13):
    return (
        torch.randn(batch, rows, K),
        *(torch.randn(1, 1, rows, 8) for _ in range(2)),
        *(torch.randn(batch, 2, slots, 8) for _ in range(2)),
        torch.arange(rows) + 2,
        (torch.arange(slots) < rows + 2).expand(batch, 1, rows, slots),
    )


EVERYTHING = {
    "lowrank_chain": 7, "siblings": 2, "gated_mlp": 1, "norm_prologue": 2, "residual": 2,
    "rope_append": 1, "attention": 1,
}  # fmt: skip
LINEARS = {"fsvd.shrink": 4, "fsvd.expand": 4}
OPS = LINEARS | {"fsvd.rope_append": 1, "fsvd.attention": 1}
ONE_TOKEN = LINEARS | {"fsvd.decode_attention": 1}


def fused(result):
    return {op: n for op, n in result.after.items() if op.startswith("fsvd.")}


@pytest.mark.parametrize(
    "device,kernels,rows,kept",
    [
        pytest.param("cpu", "auto", 1, {}, id="cpu-decode"),
        pytest.param("cpu", "auto", 5, {}, id="cpu-few"),
        pytest.param("cpu", "aten", 1, {}, id="cpu-aten"),
        pytest.param("cuda", "aten", 1, {}, id="cuda-aten"),
        pytest.param("cuda", "auto", 1, ONE_TOKEN, id="cuda-decode"),
        pytest.param("cuda", "auto", 5, OPS, id="cuda-few"),
        pytest.param("cuda", "auto", 70, {}, id="cuda-prefill"),
        pytest.param("cuda", "ops", 70, OPS, id="cuda-prefill-ops"),
        pytest.param("cpu", "ops", 5, OPS, id="cpu-ops"),
    ],
)
def test_which_ops_stay(device, kernels, rows, kept):
    result = rewrite(
        Layer(), *inputs(1, rows, slots=rows + 5), device=device, kernels=kernels, lowered=True
    )
    assert result.only() == EVERYTHING | ({"decode_attention": 1} if rows == 1 else {})
    assert fused(result) == kept


def test_unpacked_projections_are_plain_linears():
    result = rewrite(Layer(), *inputs(2, 5), lowered=True)
    assert result.after["linear"] == 14
    assert not result.after.keys() & {"narrow", "cat", "own_memory", "clone"}, result.text()


def test_batches_count_as_tokens():
    """40 sequences of 2 tokens are 80 rows to a weight."""
    result = rewrite(Layer(), *inputs(40, 2), device="cuda", lowered=True)
    assert not {"fsvd.shrink", "fsvd.expand", "fsvd.rope_append"} & fused(result).keys()


class Group(nn.Module):
    def __init__(self, combine, *members):
        super().__init__()
        self.combine, self.members = combine, nn.ModuleList(members)

    def forward(self, x):
        return self.combine(x, [m(x) for m in self.members])


CASES = {
    "returned": (lambda x, v: tuple(v), lambda: (low_rank(), low_rank(rank=7))),
    "dense-beside": (lambda x, v: (v[0] * 2, v[1]), lambda: (low_rank(), nn.Linear(K, 9))),
    "dense-twice-the-same": (
        lambda x, v: (v[0], v[1], v[2]),
        lambda: (low_rank(), d := nn.Linear(K, 9), d),
    ),
    "the-same-twice": (lambda x, v: (v[0], v[1]), lambda: (f := low_rank(), f)),
    "whole-and-slice": (
        lambda x, v: (v[0] + v[1], v[0][..., :3]),
        lambda: (low_rank(), low_rank(rank=7)),
    ),
    "residual": (lambda x, v: (x + v[0], v[1]), lambda: (low_rank(out=K), low_rank(rank=7))),
    "activation": (lambda x, v: (F.gelu(v[0]),), lambda: (low_rank(),)),
    "activation-of-one-of-two": (
        lambda x, v: (F.gelu(v[0]), v[1]),
        lambda: (low_rank(), low_rank()),
    ),
    "gate": (lambda x, v: (F.gelu(v[0]) * v[1],), lambda: (low_rank(), low_rank(rank=7))),
    "gate-and-third": (
        lambda x, v: (F.gelu(v[0]) * v[1] + v[2],),
        lambda: (low_rank(), low_rank(), low_rank()),
    ),
    "users-narrow": (
        lambda x, v: (v[0].narrow(-1, 2, 5), v[0].narrow(dim=1, start=0, length=2)),
        lambda: (low_rank(),),
    ),
    "users-narrow-of-everything": (
        lambda x, v: (v[0].narrow(-1, 0, 22) * 2,),
        lambda: (low_rank(),),
    ),
    "chunked": (lambda x, v: v[0].chunk(2, -1), lambda: (low_rank(),)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
def test_lowered_is_equal(name, norm):
    combine, members = CASES[name]
    module = Group(combine, *members())
    module = nn.Sequential(nn.LayerNorm(K), module) if norm else module
    result = rewrite(module, torch.randn(3, 5, K), lowered=True)
    assert not fused(result) and result.after["narrow"] <= 2 * (name.startswith("users"))


class GatedMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(K, eps=1e-6)
        self.gate, self.up, self.down = low_rank(out=41), low_rank(out=41, rank=7), low_rank(41, K)

    def forward(self, x):
        y = self.norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


@pytest.mark.parametrize("layers", [2, 3])
def test_strides_of_a_residual_stream_reach_every_layer(layers):
    """What a layer adds to a transposed stream lies as that does; fake values of the next layers have to say so."""
    module = nn.Sequential(*(GatedMLP() for _ in range(layers)))
    result = rewrite(module, torch.randn(3, 5, K).transpose(0, 1), lowered=True)
    assert result.output.stride() == (K, 5 * K, 1) and not fused(result)


def test_a_shared_latent_is_computed_once():
    v = nn.Linear(K, 5, bias=False)
    module = Group(
        lambda x, v: v[0] * v[1] + v[2],
        nn.Sequential(v, nn.Linear(5, 22)), nn.Sequential(v, nn.Linear(5, 22)), nn.Sequential(v, nn.Linear(5, 22)),
    )  # fmt: skip
    assert rewrite(module, torch.randn(3, 5, K), lowered=True).after["linear"] == 4


def test_fp16_statistics_do_not_overflow():
    """Squares of 400 are beyond fp16; the lowered norm works in fp32 as the op does."""
    module = nn.Sequential(nn.RMSNorm(K, eps=1e-6), low_rank()).half()
    wide = nn.Sequential(nn.RMSNorm(K, eps=1e-6), low_rank())
    wide.load_state_dict(module.state_dict())
    x = (torch.randn(3, 5, K) * 400).half()
    rewrite(module, x, lowered=True, limit=3e-3, reference=lambda x: wide(x.float()))


@pytest.mark.parametrize("rows", [(1, 1), (1,)], ids=["[1,1,K]", "[1,K]"])
@pytest.mark.parametrize("bias", [True, False])
def test_one_row_on_a_cpu(rows, bias):
    """Linears of one row become a loop for Inductor; whatever `F.linear` takes as weight and bias stays right."""
    module = nn.Sequential(nn.Linear(K, 41, bias=bias), nn.ReLU(), low_rank(41, 22))
    rewrite(module, torch.randn(*rows, K), lowered=True)


@pytest.mark.parametrize("bias", [(9,), (1, 9), (1,), (1, 1), ()], ids=str)
def test_one_row_with_a_bias_that_broadcasts(bias):
    rewrite(
        lambda x, w, b: F.linear(x, w, b),
        torch.randn(1, K),
        torch.randn(9, K),
        torch.randn(bias),
        lowered=True,
    )


def test_values_stay_true_after_lowering():
    """q is a slice of the packed result before and a tensor of its own after: its strides change, downstream too."""

    def combine(x, v):
        q, k = (t.view(3, 5, 2, 11).transpose(1, 2) for t in v)
        return (q + 0) * k, q.reshape(-1)

    rewrite(Group(combine, low_rank(), low_rank(rank=7)), torch.randn(3, 5, K), lowered=True)
