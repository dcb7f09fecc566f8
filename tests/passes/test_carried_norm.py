"""carried_norm: RMSNorm between an expand and a shrink of a few tokens, where weights are streamed."""

from __future__ import annotations

import operator

import pytest
import torch
from harness import rewrite
from torch import nn

from fsvd_compile.kernels import _stream, rms_operands
from fsvd_compile.passes.carried import _expands_like
from fsvd_compile.passes.ops import ExpandRms, read

K, R, TOKENS = 1024, 256, 17


@pytest.fixture(autouse=True)
def streamed(monkeypatch):
    """Values of 16 bits are taken for those of a GPU whose kernels are streamed; little weights count as large."""
    monkeypatch.setattr(_stream, "usable", lambda x: x.element_size() == 2)
    monkeypatch.setattr(_stream, "LEAST_BYTES", 0)


class Chain(nn.Sequential):
    def __init__(self, rows=K, k=K, rank=R, bias=False):
        super().__init__(nn.Linear(k, rank, bias=False), nn.Linear(rank, rows, bias=bias))


class Layers(nn.Module):
    """Two residual branches of a factorized MLP without its gate, RMSNorm in front of each."""

    def __init__(self, dtype=torch.bfloat16, norm=nn.RMSNorm, rank=R, bias=False):
        super().__init__()
        self.norms = nn.ModuleList(norm(K) for _ in range(2))
        self.first, self.second = Chain(rank=rank), Chain(rank=rank, bias=bias)
        self.to(dtype)
        for parameter in self.norms.parameters():
            nn.init.normal_(parameter)

    def forward(self, x):
        x = x + self.first(self.norms[0](x))
        return x + self.second(self.norms[1](x))


class Norm(nn.RMSNorm):
    def __init__(self, k):
        super().__init__(k, eps=1e-6)


def given(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, dtype=dtype)


def run(fn, *args, **kwargs):
    return rewrite(fn, *args, **{"device": "cuda", "limit": 2e-2} | kwargs)


@pytest.mark.parametrize("shape", [(TOKENS, K), (2, 1, K), (3, 1, K), (32, 1, K)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_between_two_branches(shape, bias):
    alone = {"disable": ("carried_first", "carried_last")}
    result = run(Layers(norm=Norm, bias=bias), given(*shape), **alone)
    assert result.only("carried_norm", "norm_prologue") == {"carried_norm": 1, "norm_prologue": 2}
    # The first norm has no expand in front of it.
    assert [result.after[f"fsvd.{op}"] for op in ("expand_rms", "shrink_rms")] == [1, 1]
    assert [result.after[f"fsvd.{op}"] for op in ("expand", "shrink")] == [1, 1]
    (shrink,) = [n for n in result.graph.nodes if n.target is torch.ops.fsvd.shrink_rms.default]
    (expand,) = [n for n in result.graph.nodes if n.target is torch.ops.fsvd.expand_rms.default]
    assert [(n.target, n.args) for n in shrink.args[:2]] == [
        (operator.getitem, (expand, 1)),
        (operator.getitem, (expand, 2)),
    ]
    assert expand.args[4] is not None and expand.args[5] is not None  # residual and weight
    # The residual of the second branch is the first result.
    (last,) = [n for n in result.graph.nodes if n.target is torch.ops.fsvd.expand.default]
    assert (last.args[4].target, last.args[4].args) == (operator.getitem, (expand, 0))


def test_gemma_adds_one_and_a_norm_without_weight():
    class Gemma(nn.Module):
        def __init__(self, k):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(k))

        def forward(self, x):
            wide = x.float()
            wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
            return (wide * (1.0 + self.weight.float())).type_as(x)

    result = run(Layers(norm=Gemma), given(TOKENS, K))
    assert result.only("carried_norm") == {"carried_norm": 1}
    expands = [n for n in result.graph.nodes if n.target is torch.ops.fsvd.expand_rms.default]
    assert [n.args[6] for n in expands] == [1.0, 1.0]
    (first,) = [n for n in result.graph.nodes if n.target is rms_operands]
    assert first.args[2] == 1.0

    plain = run(
        Layers(norm=lambda k: nn.RMSNorm(k, 1e-6, elementwise_affine=False)), given(TOKENS, K)
    )
    assert plain.only("carried_norm") == {"carried_norm": 1}


def test_siblings_behind_it():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm = Chain(), Norm(K)
            self.gate, self.up = Chain(1536), Chain(1536)
            self.bfloat16()

        def forward(self, x):
            x = x + self.first(x)
            y = self.norm(x)
            return x, nn.functional.silu(self.gate(y)) * self.up(y)

    result = run(Packed(), given(TOKENS, K))
    assert result.only("siblings", "gated_mlp", "carried_norm") == dict.fromkeys(
        ("siblings", "gated_mlp", "carried_norm"), 1
    )
    assert result.after["fsvd.shrink_rms"] == 1


def test_two_norms_of_one_result():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norms = Chain(), nn.ModuleList([Norm(K), Norm(K)])
            self.a, self.b = Chain(), Chain()
            self.bfloat16()
            nn.init.normal_(self.norms[0].weight)

        def forward(self, x):
            x = self.first(x)
            return self.a(self.norms[0](x)), self.b(self.norms[1](x))

    result = run(Two(), given(TOKENS, K))
    assert result.only("carried_norm") == {"carried_norm": 1}
    assert result.after["fsvd.shrink"] == 2  # the other norm is the shrink's own


@pytest.mark.parametrize(
    "fn,shape,options",
    [
        pytest.param(Layers(norm=Norm), (1, K), {}, id="one token"),
        pytest.param(Layers(norm=Norm), (9, K), {}, id="9 tokens"),
        pytest.param(Layers(norm=Norm), (33, K), {}, id="33 tokens"),
        pytest.param(Layers(norm=Norm), (TOKENS, K), {"device": "cpu"}, id="cpu"),
        pytest.param(Layers(norm=Norm), (TOKENS, K), {"kernels": "aten"}, id="aten"),
        pytest.param(Layers(torch.float16, Norm), (TOKENS, K), {}, id="fp16"),
        pytest.param(Layers(torch.float32, Norm), (TOKENS, K), {}, id="fp32"),
        pytest.param(Layers(norm=nn.LayerNorm), (TOKENS, K), {}, id="LayerNorm"),
        pytest.param(Layers(norm=Norm, rank=252), (TOKENS, K), {}, id="rank without 16 bytes"),
    ],
)
def test_is_left_alone(fn, shape, options):
    dtype = next(fn.parameters()).dtype
    result = run(fn, given(*shape, dtype=dtype), **options)
    assert not result.only("carried_norm")
    assert not result.after.keys() & {"fsvd.expand_rms", "fsvd.shrink_rms"}


def test_a_result_that_is_written_in_between():
    class Written(Layers):
        def forward(self, x, y):
            x = self.first(self.norms[0](x))
            z = x.view(-1)
            z[:5].copy_(y)
            return self.second(self.norms[1](x))

    result = run(Written(norm=Norm), given(TOKENS, K), given(5))
    assert not result.only("carried_norm")


def test_an_expand_with_an_activation():
    class Active(Layers):
        def forward(self, x):
            return self.second(self.norms[1](nn.functional.silu(self.first(x))))

    result = run(Active(norm=Norm), given(TOKENS, K))
    assert result.only("activation", "norm_prologue") == {"activation": 1, "norm_prologue": 1}
    assert not result.only("carried_norm")


def test_tokens_that_are_not_known():
    x = given(TOKENS, K)
    torch._dynamo.mark_dynamic(x, 0)
    result = run(Layers(norm=Norm), x, dynamic=None)
    assert result.only("norm_prologue", "residual") == {"norm_prologue": 2, "residual": 2}
    assert not result.only("carried_norm") and not result.guards


class Viewed(nn.Module):
    """A norm whose weight is a view of a parameter, made where the norm is."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Chain(), Chain()
        self.weight = nn.Parameter(torch.randn(1, K))
        self.bfloat16()

    def forward(self, x):
        x = x + self.first(x)
        return x + self.second(nn.functional.rms_norm(x, (K,), self.weight.view(-1), 1e-6))


def test_a_weight_that_is_a_view_made_behind():
    result = run(Viewed(), given(TOKENS, K))
    assert result.only("norm_prologue") == {"norm_prologue": 1}
    assert not result.only("carried_norm")


@pytest.mark.parametrize("tokens", (8, TOKENS))
def test_a_rank_of_nothing(tokens):
    class Nothing(Layers):
        def __init__(self):
            super().__init__(norm=Norm)
            self.first = nn.Sequential(
                nn.Linear(K, 0, bias=False), nn.Linear(0, K, bias=False)
            ).bfloat16()

    assert not run(Nothing(), given(tokens, K)).only("carried_norm")


def test_an_fp32_weight_and_a_result_that_is_written_behind():
    class Late(Layers):
        def forward(self, x):
            x = x + self.first(x)
            y = self.second(self.norms[1](x))
            x.mul_(2)
            return x, y

    model = Late(norm=Norm)
    model.norms.float()
    result = run(model, given(TOKENS, K))
    assert result.only("carried_norm") == {"carried_norm": 1}


def test_the_first_layer_and_the_last_are_like_the_others():
    """What expands leave elsewhere comes from torch ops for the first, and is left for nobody by the last."""
    result = run(Layers(norm=Norm), given(TOKENS, K))
    assert result.only("carried_first", "carried_last") == {"carried_first": 1, "carried_last": 1}
    assert [result.after[f"fsvd.{op}"] for op in ("expand_rms", "shrink_rms")] == [2, 2]
    assert not result.after.keys() & {"fsvd.expand", "fsvd.shrink"}
    nodes = list(result.graph.nodes)
    calls = [n for n in nodes if n.op == "call_function"]
    (made,) = [n for n in nodes if n.target is rms_operands]
    assert calls[0] is made and not made.meta.get("nn_module_stack")
    first, second = (n for n in nodes if n.target is torch.ops.fsvd.shrink_rms.default)
    assert [n.args for n in first.args[:2]] == [(made, 0), (made, 1)]
    before, last = (n for n in nodes if n.target is torch.ops.fsvd.expand_rms.default)
    assert before.args[5:] == last.args[5:]  # the norm of a twin
    (read,) = last.users
    assert read.args[1] == 0 and {u.op for u in read.users} == {"output"}
    assert second.args[0].args == (before, 1)


def first_and_last(fn, *args, **options):
    return run(fn, *args, **options).only("carried_first", "carried_last")


class Embedded(Layers):
    def __init__(self):
        super().__init__(norm=Norm)
        self.tokens = nn.Embedding(50, K).bfloat16()

    def forward(self, ids):
        return super().forward(self.tokens(ids))


def test_the_first_layer_behind_an_embedding():
    result = run(Embedded(), torch.arange(TOKENS))
    assert result.only("carried_first", "carried_last") == {"carried_first": 1, "carried_last": 1}
    (made,) = [n for n in result.graph.nodes if n.target is rms_operands]
    assert made.prev is made.args[0]
    assert list(made.meta["nn_module_stack"].values())[-1][0].endswith("tokens")


class Behind(Layers):
    """A dense product in front of the first norm, an activation behind the last expand."""

    def __init__(self):
        super().__init__(norm=Norm)
        self.dense = nn.Linear(K, K, bias=False).bfloat16()

    def forward(self, x):
        x = self.dense(x)
        x = x + self.first(self.norms[0](x))
        return nn.functional.silu(self.second(self.norms[1](x)))


class Others(Layers):
    """A first shrink and a last expand like no other."""

    def __init__(self):
        super().__init__(norm=Norm)
        self.first, self.second = Chain(rank=R + 8).bfloat16(), Chain(rows=K + 8).bfloat16()

    def forward(self, x):
        x = x + self.first(self.norms[0](x))
        return self.second(self.norms[1](x))


class Overwritten(Layers):
    """The embedding is changed in place once it has been read."""

    def forward(self, x, y):
        z = x * 1
        w = z.view(-1)
        w[:5].copy_(y)
        x = z + self.first(self.norms[0](z))
        return x + self.second(self.norms[1](x))


class OtherNorm(Layers):
    """A first norm with another epsilon."""

    def __init__(self):
        super().__init__(norm=Norm)
        self.norms[0].eps = 1e-3


def test_a_first_layer_that_cannot_be_like_the_others():
    assert first_and_last(OtherNorm(), given(TOKENS, K)) == {"carried_last": 1}
    beside = given(TOKENS, 2, K)[:, 1]  # its rows do not follow one another
    assert first_and_last(Layers(norm=Norm), beside) == {"carried_last": 1}


def test_twins_are_on_one_device():
    """Devices count, as the last expand reads the norm's weight of its twin."""
    result = run(Layers(norm=Norm), given(TOKENS, K))
    nodes = [n for n in result.graph.nodes if n.target is torch.ops.fsvd.expand_rms.default]
    (one, other), weight = (read(n, ExpandRms) for n in nodes), nodes[0].args[1]
    assert _expands_like(one) == _expands_like(other)
    weight.meta["example_value"] = weight.meta["example_value"].to("meta")
    assert _expands_like(one) != _expands_like(other)


@pytest.mark.parametrize("fn", (Behind(), Others()), ids=("products around", "no twins"))
def test_layers_that_are_no_first_and_no_last(fn):
    result = run(fn, given(TOKENS, K))
    assert result.only("carried_norm") == {"carried_norm": 1}
    assert not result.only("carried_first", "carried_last")


def test_a_first_value_that_is_written_in_between():
    assert first_and_last(Overwritten(norm=Norm), given(TOKENS, K), given(5)) == {"carried_last": 1}


def test_a_first_norm_whose_weight_is_made_behind():
    class First(Viewed):
        def forward(self, x):
            x = x + self.first(nn.functional.rms_norm(x, (K,), self.weight.view(-1) * 2, 1e-6))
            return x + self.second(nn.functional.rms_norm(x, (K,), self.weight[0], 1e-6))

    assert not first_and_last(First(), given(TOKENS, K)).get("carried_first")


@pytest.mark.parametrize("name", ("carried_first", "carried_last"))
def test_one_end_disabled(name):
    found = first_and_last(Layers(norm=Norm), given(TOKENS, K), disable=(name,))
    assert list(found) == [n for n in ("carried_first", "carried_last") if n != name]


def test_disabled():
    result = run(Layers(norm=Norm), given(TOKENS, K), disable=("carried_norm",))
    assert not result.only("carried_norm", "carried_first", "carried_last")
    assert result.after["fsvd.shrink"] == 2
