"""What surrounds a pair: gated and plain activations, norms before, residuals after."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from harness import rewrite
from torch import nn

K, R, N = 37, 5, 22


def low_rank(inputs=K, out=N, rank=R, v_bias=False, bias=False):
    return nn.Sequential(nn.Linear(inputs, rank, bias=v_bias), nn.Linear(rank, out, bias=bias))


class Block(nn.Module):
    """Named parts and a function of them."""

    def __init__(self, fn, **parts):
        super().__init__()
        self.parts, self.fn = nn.ModuleDict(parts), fn

    def forward(self, x, *args):
        return self.fn(x, *args, **{name: self.parts[name] for name in self.parts})


def op_arguments(result, name):
    (node,) = [n for n in result.graph.nodes if getattr(n.target, "_opname", "") == name]
    return node.args


def gpt2_gelu(x):
    return (
        0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))
    )


ACTIVATIONS = {
    "silu": (F.silu, "silu"),
    "nn.SiLU": (nn.SiLU(), "silu"),
    "x*sigmoid(x)": (lambda x: x * torch.sigmoid(x), "silu"),
    "sigmoid(x)*x": (lambda x: x.sigmoid() * x, "silu"),
    "gelu": (F.gelu, "gelu"),
    "nn.GELU": (nn.GELU(), "gelu"),
    "gelu-tanh": (lambda x: F.gelu(x, approximate="tanh"), "gelu_tanh"),
    "nn.GELU(tanh)": (nn.GELU(approximate="tanh"), "gelu_tanh"),
    "gpt2-polynomial": (gpt2_gelu, "gelu_tanh"),
    "relu": (F.relu, "relu"),
    "torch.relu": (torch.relu, "relu"),
    "relu-method": (lambda x: x.relu(), "relu"),
    "relu-in-place": (lambda x: F.relu(x, inplace=True), "relu"),
    "relu_": (lambda x: x.relu_(), "relu"),
    "nn.ReLU(inplace)": (nn.ReLU(inplace=True), "relu"),
    "silu-in-place": (lambda x: F.silu(x, True), "silu"),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name):
    act, expected = ACTIVATIONS[name]
    result = rewrite(Block(lambda x, f: act(f(x)) * 2, f=low_rank(bias=True)), torch.randn(3, 5, K))
    assert result.only() == {"lowrank_chain": 1, "activation": 1}, result.misses
    assert op_arguments(result, "expand")[5] == expected
    assert result.after == {"fsvd.shrink": 1, "fsvd.expand": 1, "mul": 1}


@pytest.mark.parametrize(
    "fn",
    [
        pytest.param(lambda x, f: (y := f(x)) * torch.sigmoid(y + 1), id="sigmoid-of-another"),
        pytest.param(lambda x, f: torch.tanh(f(x)), id="tanh-alone"),
        pytest.param(lambda x, f: F.elu(f(x)), id="elu"),
        pytest.param(lambda x, f: F.leaky_relu(f(x)), id="leaky-relu"),
        pytest.param(lambda x, f: F.relu(f(x)[..., 1:]), id="of-a-slice"),
        pytest.param(lambda x, f: F.silu(f(x) * 2), id="of-a-product"),
        pytest.param(
            lambda x, f: 0.5 * (y := f(x)) * (1 + torch.tanh(0.8 * (y + 0.044715 * y**3))),
            id="other-constant",
        ),
        pytest.param(
            lambda x, f: 0.5 * (y := f(x)) * (1 + torch.tanh(0.7978845608 * (y + 0.04 * y**3))),
            id="other-cube",
        ),
    ],
)
def test_other_activations_stay(fn):
    result = rewrite(Block(fn, f=low_rank()), torch.randn(3, 5, K))
    assert result.only() == {"lowrank_chain": 1}
    assert "gelu_tanh" not in result.matches and "silu" not in result.matches


def test_an_expand_read_before_its_activation_too():
    result = rewrite(
        Block(lambda x, f: F.silu(y := f(x)) + y.sum(), f=low_rank()), torch.randn(3, 5, K)
    )
    assert result.only() == {"lowrank_chain": 1}
    assert "is also read by sum" in result.misses["activation"][0]


def test_relu_in_place_on_a_value_that_is_read_again():
    result = rewrite(
        Block(lambda x, f: F.relu(y := f(x), inplace=True) + y, f=low_rank()), torch.randn(3, 5, K)
    )
    assert result.only() == {"lowrank_chain": 1}


def test_polynomials_of_integers():
    """Integers promote inside the polynomial; `gelu` and `silu` refuse them."""
    x = torch.randint(-3, 4, (3, 5))
    for fn in (gpt2_gelu, lambda x: x * torch.sigmoid(x)):
        result = rewrite(fn, x)
        assert result.matches == {}, result.matches


@pytest.mark.parametrize("order", ["act*up", "up*act"])
@pytest.mark.parametrize("first", ["gate", "up"])
@pytest.mark.parametrize(
    "name", ["silu", "x*sigmoid(x)", "gelu", "gelu-tanh", "gpt2-polynomial", "relu"]
)
def test_gated(name, first, order):
    act, expected = ACTIVATIONS[name]

    def fn(x, gate, up):
        if first == "gate":
            g, u = gate(x), up(x)
        else:
            u, g = up(x), gate(x)
        return (act(g) * u if order == "act*up" else u * act(g)).sum(-1)

    block = Block(fn, gate=low_rank(rank=5, bias=True), up=low_rank(rank=7))
    result = rewrite(block, torch.randn(3, 5, K))
    assert result.only() == {"lowrank_chain": 2, "siblings": 1, "gated_mlp": 1}, result.misses
    assert result.after == {"fsvd.shrink": 1, "fsvd.expand": 1, "sum": 1}
    assert op_arguments(result, "expand")[5] == expected + "_mul"


def test_gated_with_a_shared_v():
    v = nn.Linear(K, R, bias=False)
    block = Block(
        lambda x, gate, up: F.silu(gate(x)) * up(x),
        gate=nn.Sequential(v, nn.Linear(R, N)),
        up=nn.Sequential(v, nn.Linear(R, N)),
    )
    assert rewrite(block, torch.randn(3, 5, K)).matches["gated_mlp"] == 1


def test_silu_in_place_on_the_gate():
    block = Block(
        lambda x, gate, up: F.silu(gate(x), inplace=True) * up(x), gate=low_rank(), up=low_rank()
    )
    rewrite(block, torch.randn(3, 5, K))  # right, whatever is matched


GATED_REFUSALS = {
    "activation-read-twice": (lambda x, g, u: (a := F.silu(g(x))) * u(x) + a, "is also read by"),
    "gate-read-twice": (lambda x, g, u: F.silu(y := g(x)) * u(x) + y, "is also read by"),
    "up-read-twice": (lambda x, g, u: F.silu(g(x)) * (y := u(x)) + y, "is also read by"),
    "gate-returned": (lambda x, g, u: (y := g(x), F.silu(y) * u(x)), None),
    "times-another-value": (lambda x, g, u: F.silu(g(x)) * x[..., :N] + u(x), None),
    "times-itself": (lambda x, g, u: (F.silu(y := g(x)) * y) + u(x), None),
    "sum-not-product": (lambda x, g, u: F.silu(g(x)) + u(x), None),
    "activation-on-both": (lambda x, g, u: F.silu(g(x)) * F.silu(u(x)), None),
    "up-sliced": (lambda x, g, u: F.silu(g(x)[..., :7]) * u(x)[..., :7], None),
    "up-shifted": (lambda x, g, u: F.silu(g(x)) * u(x).roll(1, -1), None),
}


@pytest.mark.parametrize("name", GATED_REFUSALS)
def test_gated_left_alone(name):
    fn, reason = GATED_REFUSALS[name]
    block = Block(lambda x, gate, up: fn(x, gate, up), gate=low_rank(rank=5), up=low_rank(rank=7))
    result = rewrite(block, torch.randn(3, 5, K))
    assert "gated_mlp" not in result.matches and result.matches["siblings"] == 1
    assert reason is None or reason in result.misses["gated_mlp"][0]


def test_gate_and_up_of_different_sizes():
    def fn(x, gate, up):
        return (F.silu(gate(x)) * up(x)[..., :1]).sum() + (F.silu(gate(x))[..., :9] * up(x)).sum()

    result = rewrite(Block(fn, gate=low_rank(), up=low_rank(out=9)), torch.randn(3, 5, K))
    assert "gated_mlp" not in result.matches

    # Of 22 and 1 features the product broadcasts.
    v = {"gate": nn.Linear(N, R, bias=False), "up": nn.Linear(N, R, bias=False)}
    wide, one = nn.Sequential(v["gate"], nn.Linear(R, N)), nn.Sequential(v["up"], nn.Linear(R, 1))
    result = rewrite(Block(lambda x, g, u: F.silu(g(x)) * u(x), g=wide, u=one), torch.randn(3, N))
    assert "gated_mlp" not in result.matches


def test_three_blocks():
    def fn(x, gate, up, other):
        return F.silu(gate(x)) * up(x) + other(x)

    result = rewrite(
        Block(fn, gate=low_rank(), up=low_rank(), other=low_rank()), torch.randn(3, 5, K)
    )
    assert result.only() == {"lowrank_chain": 3, "siblings": 1}
    assert result.misses["gated_mlp"] == ["the expand has 3 blocks, not gate and up alone"]


def test_the_users_own_narrow_of_a_pair():
    """One projection to twice the size, split afterwards (`chunk`, `narrow`): not packed siblings."""

    def chunked(x, f):
        gate, up = f(x).chunk(2, -1)
        return F.silu(gate) * up

    def narrowed(x, f):
        y = f(x)
        return F.silu(y.narrow(-1, 0, 11)) * torch.narrow(y, dim=-1, start=11, length=11)

    for fn in (chunked, narrowed):
        for lowered in (False, True):
            result = rewrite(Block(fn, f=low_rank()), torch.randn(3, 5, K), lowered=lowered)
            assert result.only() == {"lowrank_chain": 1}


class LlamaNorm(nn.Module):
    def __init__(self, size=K, eps=1e-5):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(size) + 0.5), eps

    def forward(self, x):
        dtype = x.dtype
        x = x.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x.to(dtype)


class GemmaNorm(LlamaNorm):
    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * (1.0 + self.weight.float())).type_as(x)


class SquareNorm(LlamaNorm):
    def forward(self, x):
        return torch.rsqrt(self.eps + torch.mean(x * x, (-1,), True)) * x * self.weight


class TorchSquareNorm(LlamaNorm):
    def forward(self, x):
        return (x * (x.square().mean(dim=[-1], keepdim=True) + self.eps).rsqrt()).mul(self.weight)


class FunctionalNorm(LlamaNorm):
    def forward(self, x):
        return F.rms_norm(x, (K,), self.weight, self.eps)


NORMS = {
    "llama": (LlamaNorm, "rms", 0.0),
    "gemma": (GemmaNorm, "rms", 1.0),
    "x*x": (SquareNorm, "rms", 0.0),
    "square": (TorchSquareNorm, "rms", 0.0),
    "F.rms_norm": (FunctionalNorm, "rms", 0.0),
    "nn.RMSNorm": (lambda: nn.RMSNorm(K, eps=1e-6), "rms", 0.0),
    "nn.RMSNorm-plain": (lambda: nn.RMSNorm(K, eps=1e-6, elementwise_affine=False), "rms", 0.0),
    "LayerNorm": (lambda: nn.LayerNorm(K), "layer", 0.0),
    "LayerNorm-no-bias": (lambda: nn.LayerNorm(K, bias=False), "layer", 0.0),
    "LayerNorm-plain": (lambda: nn.LayerNorm(K, elementwise_affine=False), "layer", 0.0),
    "F.layer_norm": (lambda: Block(lambda x: F.layer_norm(x, [K], eps=1e-3)), "layer", 0.0),
}


def randomized(module):
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return module


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("lowered", [False, True], ids=["ops", "lowered"])
def test_norm(name, lowered):
    make, norm, offset = NORMS[name]
    block = Block(lambda x, norm, f: f(norm(x)).sin(), norm=randomized(make()), f=low_rank())
    result = rewrite(block, torch.randn(3, 5, K) * 3 + 1, lowered=lowered)
    assert result.only() == {"lowrank_chain": 1, "norm_prologue": 1}, result.misses
    if not lowered:
        assert result.after == {"fsvd.shrink": 1, "fsvd.expand": 1, "sin": 1}
        given = op_arguments(result, "shrink")
        assert given[3] == norm and given[7] == offset


@pytest.mark.parametrize("dtype,limit", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=str)
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("lowered", [False, True], ids=["ops", "lowered"])
def test_norm_in_16_bits(name, dtype, limit, lowered):
    """Compared with the fp32 model on the same numbers; large values overflow a sum of squares in fp16."""
    block = Block(
        lambda x, norm, f: f(norm(x)).sin(), norm=randomized(NORMS[name][0]()), f=low_rank()
    )
    block = block.to(dtype)
    x = (torch.randn(3, 5, K) * 400).to(dtype)
    reference = copy.deepcopy(block).float()
    result = rewrite(
        block, x, lowered=lowered, limit=limit, reference=lambda x: reference(x.float())
    )
    assert result.matches["norm_prologue"] == 1, result.misses
    assert result.output.dtype == dtype


def test_norm_before_packed_siblings():
    block = Block(
        lambda x, norm, q, k, d: q(x := norm(x)).sum() + k(x).sum() + d(x).sum(),
        norm=LlamaNorm(), q=low_rank(), k=low_rank(out=8, rank=3), d=nn.Linear(K, 6),
    )  # fmt: skip
    result = rewrite(block, torch.randn(3, 5, K))
    assert result.only() == {"lowrank_chain": 2, "siblings": 1, "norm_prologue": 1}
    assert not result.after.keys() & {"rsqrt", "mean", "pow", "mul"}


def _norm(x, w, dim=-1, eps=1e-6, keepdim=True, **mean):
    return x * torch.rsqrt(x.pow(2).mean(dim, keepdim=keepdim, **mean) + eps) * w


# name -> (function of x [.., K], weight, pair), size of the weight, reason)
NORM_REFUSALS = {
    "output-read-again": (lambda x, w, f: f(y := _norm(x, w)) + y.sum(), K, "is also read by"),
    "output-is-the-residual": (
        lambda x, w, f: f(y := _norm(x, w))[..., :9] + y[..., :9],
        K,
        "is also read by",
    ),
    "statistic-read-again": (
        lambda x, w, f: f(x * (r := torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)) * w) + r,
        K,
        "is also read by",
    ),
    "over-other-dims": (lambda x, w, f: f(_norm(x, w, dim=-2)), K, None),
    "over-two-dims": (lambda x, w, f: f(_norm(x, w, dim=(-2, -1))), K, None),
    "over-everything": (lambda x, w, f: f(x * torch.rsqrt(x.pow(2).mean() + 1e-6) * w), K, None),
    "weight-of-one": (lambda x, w, f: f(_norm(x, w)), 1, None),
    "mean-subtracted": (
        lambda x, w, f: f(
            (c := x - x.mean(-1, keepdim=True))
            * torch.rsqrt(c.pow(2).mean(-1, keepdim=True) + 1e-6)
            * x
            * w
        ),
        K,
        None,
    ),
    "variance": (lambda x, w, f: f(x * torch.rsqrt(x.var(-1, keepdim=True) + 1e-6) * w), K, None),
    "cubed": (
        lambda x, w, f: f(x * torch.rsqrt(x.pow(2).pow(1.5).mean(-1, keepdim=True) + 1) * w),
        K,
        None,
    ),
    "of-another-value": (
        lambda x, w, f: f(x * torch.rsqrt((x + 1).pow(2).mean(-1, keepdim=True) + 1e-6) * w),
        K,
        None,
    ),
    "eps-outside": (
        lambda x, w, f: f(x * (torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) + 1e-6) * w),
        K,
        None,
    ),
    "eps-a-tensor": (
        lambda x, w, f: f(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + w.abs().sum()) * w),
        K,
        None,
    ),
    "alpha": (
        lambda x, w, f: f(
            x * torch.rsqrt(torch.add(x.pow(2).mean(-1, keepdim=True), 1e-3, alpha=2)) * w
        ),
        K,
        None,
    ),
    "mean-in-another-dtype": (
        lambda x, w, f: f(_norm(x, w, dtype=torch.float16).float()),
        K,
        "rounds torch.float32 to torch.float16",
    ),
    "norm-in-fp16": (
        lambda x, w, f: f(_norm(x.half(), w.half()).float()),
        K,
        "rounds torch.float32 to torch.float16",
    ),
    "rounded-before-the-weight": (
        lambda x, w, f: f(w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).half()),
        K,
        "rounds torch.float32 to torch.float16",
    ),
    "group-norm": (
        lambda x, w, f: f(F.group_norm(x.transpose(1, 2), 1, w).transpose(1, 2)),
        K,
        None,
    ),
    "layer-norm-of-two-dims": (lambda x, w, f: f(F.layer_norm(x, (5, K))), K, None),
    "rms-norm-of-two-dims": (lambda x, w, f: f(F.rms_norm(x, (5, K), eps=1e-6)), K, None),
    "rms-norm-eps-none": (lambda x, w, f: f(F.rms_norm(x, (K,), w)), K, None),
    "scaled-after": (lambda x, w, f: f(_norm(x, w) * 2), K, None),
    "features-reshaped-after": (lambda x, w, f: f(_norm(x, w).mT.reshape(3, 5, K)), K, None),
}


@pytest.mark.parametrize("name", NORM_REFUSALS)
def test_norm_left_alone(name):
    fn, size, reason = NORM_REFUSALS[name]
    w = torch.rand(size) + 0.5
    result = rewrite(
        Block(lambda x, f: fn(x, w, f), f=low_rank()), torch.randn(3, 5, K), limit=1e-4
    )
    assert "norm_prologue" not in result.matches and result.matches["lowrank_chain"] == 1
    if reason:
        assert reason in result.misses["norm_prologue"][0]
    else:
        assert "norm_prologue" not in result.misses


def test_keepdim_false_broadcasts_along_columns():
    """With as many tokens as features this has the shape of a norm."""
    w = torch.rand(K)
    result = rewrite(
        Block(lambda x, f: f(_norm(x, w, keepdim=False)), f=low_rank()), torch.randn(K, K)
    )
    assert "norm_prologue" not in result.matches


def test_norm_of_a_vector():
    result = rewrite(
        Block(lambda x, norm, f: f(norm(x)), norm=LlamaNorm(), f=low_rank()), torch.randn(K)
    )
    assert result.matches["norm_prologue"] == 1


@pytest.mark.parametrize("what", ["x", "weight"])
def test_norm_with_a_write_before_the_shrink(what):
    def fn(x, w, f):
        y = _norm(x, w)
        (x if what == "x" else w).mul_(2)
        return f(y)

    result = rewrite(
        Block(lambda x, w, f: fn(x, w, f), f=low_rank()), torch.randn(3, 5, K), torch.rand(K) + 0.5
    )
    assert result.only() == {"lowrank_chain": 1}
    assert "is written in place by mul_" in result.misses["norm_prologue"][0]


def test_norm_mixed_dtypes_stay():
    """fp16 in, fp32 weight: the product is fp32, as T5 does on purpose."""

    def fn(x, w, f):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return f(w * y.half())

    result = rewrite(
        Block(lambda x, w, f: fn(x, w, f), f=low_rank()), torch.randn(3, 5, K).half(), torch.rand(K)
    )
    assert result.only() == {"lowrank_chain": 1}
    assert "casts torch.float16 to torch.float32" in result.misses["norm_prologue"][0]


def _iadd(x, f):
    x = x + 0
    x += f(x)
    return x


RESIDUALS = {
    "x+f(x)": lambda x, f: x + f(x),
    "f(x)+x": lambda x, f: f(x) + x,
    "torch.add": lambda x, f: torch.add(x, f(x)),
    "add-method": lambda x, f: f(x).add(x),
    "alpha-1": lambda x, f: torch.add(x, f(x), alpha=1),
    "alpha-of-the-stream": lambda x, f: f(x).add(x, alpha=-1),
    "in-place-on-the-branch": lambda x, f: f(x).add_(x),
    "in-place-on-the-stream": _iadd,
    "of-another-value": lambda x, f: x.sin() + f(x),
    "strided": lambda x, f: x.transpose(0, 1).sin().transpose(0, 1) + f(x),
    "expanded-but-of-full-shape": lambda x, f: x[:1].expand(3, 5, K) + f(x),
}


@pytest.mark.parametrize("name", RESIDUALS)
@pytest.mark.parametrize("lowered", [False, True], ids=["ops", "lowered"])
def test_residual(name, lowered):
    result = rewrite(
        Block(RESIDUALS[name], f=low_rank(out=K, bias=True)), torch.randn(3, 5, K), lowered=lowered
    )
    assert result.only() == {"lowrank_chain": 1, "residual": 1}, result.misses
    if not lowered:
        assert op_arguments(result, "expand")[4] is not None


def _then_written(x, f):
    y = x + f(x)
    x.mul_(3)
    return y, x


def _written_between(x, f):
    z = f(x)
    x.mul_(3)
    return x + z


def _written_between_through_view(x, f):
    row = x[0]
    z = f(x)
    row.zero_()
    return z + x


@pytest.mark.parametrize("fn", [_then_written, _written_between, _written_between_through_view])
def test_residual_written(fn):
    """The sum reads the stream where it stands, before and after the rewrite; only x of the branch moves not."""
    result = rewrite(Block(fn, f=low_rank(out=K)), torch.randn(3, 5, K))
    assert result.matches["residual"] == 1


def test_weight_written_between_branch_and_sum():
    def fn(x, f):
        z = f(x)
        f[1].weight.data.mul_(2)
        return x + z

    result = rewrite(Block(fn, f=low_rank(out=K)), torch.randn(3, 5, K))
    assert result.only() == {"lowrank_chain": 1}
    assert "is written in place by mul_" in result.misses["residual"][0]


RESIDUAL_REFUSALS = {
    "[D]": (lambda x, f: f(x) + x[0, 0], "is broadcast"),
    "[1,D]": (lambda x, f: f(x) + x[0, :1], "is broadcast"),
    "[B,1,D]": (lambda x, f: x[:, :1] + f(x), "is broadcast"),
    "[B,T,1]": (lambda x, f: x[..., :1] + f(x), "is broadcast"),
    "wider": (lambda x, f: f(x) + torch.stack((x, x)), "is broadcast"),
    "number": (lambda x, f: f(x) + 2.0, None),
    "fp64": (lambda x, f: f(x) + x.double(), "the residual is torch.float64"),
    "bf16": (lambda x, f: f(x) + x.bfloat16(), "the residual is torch.bfloat16"),
    "integers": (lambda x, f: f(x) + x.long(), "the residual is torch.int64"),
    "alpha=2": (lambda x, f: torch.add(x, f(x), alpha=2), None),
    "minus": (lambda x, f: x - f(x), None),
    "branch-read-twice": (lambda x, f: x + (y := f(x)) * 1 + y, "is also read by"),
    "branch-returned": (lambda x, f: (y := f(x), x + y), "is also read by output"),
    "branch-added-to-itself": (lambda x, f: (y := f(x)) + y, None),
    "activation-before": (lambda x, f: x + F.silu(f(x)), "ends in silu"),
    "scaled-branch": (lambda x, f: x + 0.5 * f(x), None),
}


@pytest.mark.parametrize("name", RESIDUAL_REFUSALS)
def test_residual_left_alone(name):
    fn, reason = RESIDUAL_REFUSALS[name]
    result = rewrite(Block(fn, f=low_rank(out=K)), torch.randn(3, 5, K))
    assert "residual" not in result.matches and result.matches["lowrank_chain"] == 1
    assert reason is None or reason in result.misses["residual"][0], result.misses


def test_two_branches_added():
    block = Block(lambda x, y, a, b: a(x) + b(y), a=low_rank(), b=low_rank())
    result = rewrite(block, torch.randn(3, 5, K), torch.randn(3, 5, K))
    assert result.only() == {"lowrank_chain": 2, "residual": 1}
    block = Block(lambda x, y, a, b: x + a(x) + b(y), a=low_rank(out=K), b=low_rank(out=K))
    result = rewrite(block, torch.randn(3, 5, K), torch.randn(3, 5, K))
    assert result.only() == {"lowrank_chain": 2, "residual": 2}


def test_a_second_residual_is_refused():
    block = Block(lambda x, y, f: y + (x + f(x)), f=low_rank(out=K))
    result = rewrite(block, torch.randn(3, 5, K), torch.randn(3, 5, K))
    assert result.matches["residual"] == 1
    assert result.misses["residual"] == ["the expand has a residual already"]


def test_a_whole_mlp():
    """norm -> gate, up -> act · up -> down -> + x: two shrinks and two expands."""

    def fn(x, norm, gate, up, down):
        y = norm(x)
        return x + down(F.silu(gate(y)) * up(y))

    parts = {"gate": low_rank(out=41), "up": low_rank(out=41, rank=7), "down": low_rank(41, K)}
    result = rewrite(Block(fn, norm=LlamaNorm(), **parts), torch.randn(3, 5, K))
    assert result.after == {"fsvd.shrink": 2, "fsvd.expand": 2}
