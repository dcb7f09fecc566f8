"""dense_siblings and dense_linear: what is left dense runs as ours where one or two tokens, or a few, meet a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from harness import rewrite
from torch import nn

from fsvd_compile.kernels import _stream

K, N = 32, 21  # rows of 32 fp32 values are whole 16-byte loads


def run(fn, *args, **kwargs):
    return rewrite(fn, *args, **{"device": "cuda"} | kwargs)


def operand(result, op, name_or_index):
    (node,) = [n for n in result.graph.nodes if n.target is op]
    return node.args[name_or_index]


class Norm(nn.Module):
    """RMSNorm as Llama spells it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(K))

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class Head(nn.Sequential):
    def __init__(self, bias=False):
        super().__init__(Norm(), nn.Linear(K, N, bias=bias))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(K,), (1, K), (1, 1, K), (2, 1, K)], ids=str)
def test_head_takes_the_final_norm(shape, bias):
    result = run(Head(bias), torch.randn(shape))
    assert result.only() == {"dense_linear": 1, "norm_prologue": 1}
    assert result.after["fsvd.shrink"] == 1
    assert not result.after.keys() & {"linear", "rsqrt", "mean", "mul", "fsvd.expand"}


def test_norm_between_two_factors():
    """DeepSeek's latent attention: V, RMSNorm, U."""
    result = run(nn.Sequential(nn.Linear(2 * K, K, bias=False), Head()), torch.randn(1, 1, 2 * K))
    assert result.only() == {"dense_linear": 2, "norm_prologue": 1}
    assert result.after["fsvd.shrink"] == 2
    assert not result.after.keys() & {"linear", "rsqrt", "mean", "mul", "fsvd.expand"}


class Layer(nn.Module):
    """A dense attention block and MLP of one token, attention left out."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([Norm(), Norm()])
        self.q, self.k, self.v, self.o = (nn.Linear(K, K, bias=i == 1) for i in range(4))
        self.gate, self.up, self.down = nn.Linear(K, 48), nn.Linear(K, 48), nn.Linear(48, K)

    def forward(self, x):
        y = self.norms[0](x)
        x = x + self.o(self.q(y) * self.k(y) + self.v(y))
        y = self.norms[1](x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def test_a_dense_layer():
    result = run(Layer(), torch.randn(1, 1, K))
    assert result.only() == {
        "dense_siblings": 2,
        "dense_linear": 2,
        "norm_prologue": 2,
        "residual": 2,
    }
    assert (result.after["fsvd.shrink"], result.after["fsvd.expand"]) == (2, 2)
    assert not result.after.keys() & {"linear", "rsqrt"}


def test_activation_behind_a_dense_linear():
    result = run(nn.Sequential(nn.Linear(K, 40), nn.ReLU(), nn.Linear(40, N)), torch.randn(1, K))
    assert result.only() == {"dense_linear": 2, "activation": 1}
    assert operand(result, torch.ops.fsvd.expand.default, 5) == "relu"


def test_a_factorized_sibling_takes_the_dense_one_first():
    class Group(nn.Module):
        def __init__(self):
            super().__init__()
            self.low = nn.Sequential(nn.Linear(K, 5), nn.Linear(5, N))
            self.dense = nn.Linear(K, N)

        def forward(self, x):
            return self.low(x) * self.dense(x)

    result = run(Group(), torch.randn(1, K))
    assert result.only() == {"lowrank_chain": 1, "siblings": 1}


class Wide(nn.Module):
    """A linear by a view of its weight."""

    def __init__(self, weight, bias=None, view=lambda w: w):
        super().__init__()
        self.weight, self.bias, self.view = nn.Parameter(weight), bias, view

    def forward(self, x):
        return F.linear(x, self.view(self.weight), self.bias).sin()


@pytest.fixture
def streamed(monkeypatch):
    """Values of 16 bits are taken for those of a GPU whose kernels are streamed."""
    monkeypatch.setattr(_stream, "usable", lambda x: x.element_size() == 2)


class Wider(nn.Module):
    """A norm and as many linears as `rows` says, of 1024 features in half precision."""

    def __init__(self, *rows, k=1024, dtype=torch.bfloat16):
        super().__init__()
        self.norm = nn.RMSNorm(k, 1e-6)
        self.linears = nn.ModuleList(nn.Linear(k, n, bias=False) for n in rows)
        self.to(dtype)

    def forward(self, x):
        x = self.norm(x)
        return torch.cat([linear(x) for linear in self.linears], -1)


@pytest.mark.parametrize("shape", [(3, 1, 1024), (8, 1024), (4, 4, 1024)], ids=str)
@pytest.mark.parametrize("rows", [(1032,), (1024, 2048)], ids=str)
def test_a_few_tokens_where_weights_are_streamed(streamed, shape, rows):
    result = run(Wider(*rows), torch.randn(shape, dtype=torch.bfloat16))
    name = "dense_linear" if len(rows) == 1 else "dense_siblings"
    assert result.only(name) == {name: 1}
    assert result.after["fsvd.shrink"] == 1
    assert not result.after.keys() & {"linear", "fsvd.expand"}


def test_a_few_tokens_with_an_epilogue(streamed):
    weight, x = torch.randn(1032, 1024).bfloat16(), torch.randn(8, 1024).bfloat16()

    class Both(Wide):
        def forward(self, x, z, residual):
            return F.silu(F.linear(x, self.weight)), residual + F.linear(z, self.weight)

    result = run(Both(weight), x, x.clone(), torch.randn(8, 1032).bfloat16())
    assert result.only() == {"dense_linear": 2, "activation": 1, "residual": 1}
    assert result.after["fsvd.expand"] == 2
    assert not result.after.keys() & {"linear", "silu", "fsvd.shrink"}


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: x[:1, :1024].expand(8, 1024), id="expanded"),
        pytest.param(lambda x: x[:8, :8].reshape(-1)[:1].expand(8, 1024), id="one value"),
        pytest.param(lambda x: x[:8, :1024], id="rows of 1028 values"),
        pytest.param(lambda x: x[:8, 4:], id="not at a multiple of 16 bytes"),
        pytest.param(lambda x: x[:1024, :8].t(), id="transposed"),
    ],
)
def test_a_few_tokens_that_no_copy_takes(streamed, view):
    weight = nn.Parameter(torch.randn(1032, 1024).bfloat16())

    class Viewed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = weight

        def forward(self, x):
            return F.linear(view(x), self.weight)

    result = run(Viewed(), torch.randn(1024, 1028).bfloat16())
    assert not result.only("dense_linear") and result.after["linear"] == 1


@pytest.mark.parametrize(
    "fn,shape",
    [
        pytest.param(Wider(1032), (17, 1024), id="17 tokens"),
        pytest.param(Wider(1032, dtype=torch.float32), (8, 1024), id="fp32"),
        pytest.param(Wider(1000), (8, 1024), id="less than is streamed"),
        pytest.param(Wider(4096, k=520), (8, 520), id="few features"),
        pytest.param(Wider(1028), (8, 1024), id="rows of the result unaligned"),
    ],
)
def test_a_few_tokens_are_left_to_a_library_elsewhere(streamed, fn, shape):
    result = run(fn, torch.randn(shape, dtype=fn.norm.weight.dtype))
    assert not result.only("dense_linear", "dense_siblings")
    assert result.after["linear"] == 1 and not result.after.keys() & {"fsvd.shrink", "fsvd.expand"}


@pytest.mark.parametrize(
    "fn,x,options",
    [
        pytest.param(Head(), (1, K), {"device": "cpu"}, id="cpu"),
        pytest.param(Head(), (1, K), {"kernels": "aten"}, id="aten"),
        pytest.param(Head(), (3, K), {}, id="three tokens"),
        pytest.param(Head(), (2, 2, K), {}, id="two sequences of two"),
        pytest.param(Wide(torch.randn(N, 33)), (1, 33), {}, id="K unaligned"),
        pytest.param(
            Wide(torch.randn(N, 35), view=lambda w: w[:, :K]), (1, K), {}, id="stride unaligned"
        ),
        pytest.param(Wide(torch.randn(K, N), view=torch.t), (1, K), {}, id="transposed"),
        pytest.param(
            Wide(torch.randn(N, 2 * K), view=lambda w: w[:, ::2]), (1, K), {}, id="strided"
        ),
        pytest.param(Wide(torch.randn(N, K), torch.randn(1, N)), (1, K), {}, id="bias broadcast"),
        pytest.param(Wide(torch.randn(K)), (1, K), {}, id="weight is a vector"),
        pytest.param(Wide(torch.randn(N, K).double()), (1, K), {}, id="fp64"),
    ],
)
def test_left_alone(fn, x, options):
    dtype = next(fn.parameters()).dtype
    result = run(fn, torch.randn(x, dtype=dtype), **options)
    assert not result.only("dense_linear", "dense_siblings")
    assert not result.after.keys() & {"fsvd.shrink", "fsvd.expand"}


def test_a_weight_that_is_computed_or_written_is_left_alone():
    def computed(x, w):
        return F.linear(x, w * 2)

    def given(x, w):
        return F.linear(x, w)

    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(N, K))

        def forward(self, x):
            self.weight.mul_(2)
            return F.linear(x, self.weight)

    for fn in (computed, given):
        assert run(fn, torch.randn(1, K), torch.randn(N, K)).only() == {}
    assert run(Written(), torch.randn(1, K)).only() == {}


def test_symbolic_token_counts_are_left_alone():
    assert run(Head(), torch.randn(5, K), dynamic=True).only("dense_linear") == {}


def test_siblings_with_a_write_in_between_stay_apart():
    class Between(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(K, N), nn.Linear(K, N)

        def forward(self, x):
            x = x.clone()
            a = self.a(x)
            x.sin_()
            return a * self.b(x)

    result = run(Between(), torch.randn(1, K))
    assert result.only() == {"dense_linear": 2}


def test_both_can_be_switched_off():
    result = run(Layer(), torch.randn(1, K), disable=("dense_siblings", "dense_linear"))
    assert result.only() == {}
    assert result.after["linear"] == 7


def test_what_leaves_the_graph_has_memory_of_its_own():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(K, N), nn.Linear(K, N)

        def forward(self, x):
            return self.a(x), self.b(x)

    result = run(Both(), torch.randn(1, K))
    assert result.only() == {"dense_siblings": 1}
    assert result.after["own_memory"] == 2
