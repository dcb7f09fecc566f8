"""lowrank_chain and the spellings that lead to it: values, counts, reasons, and what is left in the graph."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from harness import Recorder, rewrite
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

K, R, N = 37, 5, 22


def factors(dtype=torch.float32):
    """x, V, U, bias of V, bias of U."""
    shapes = ((3, 5, K), (R, K), (N, R), (R,), (N,))
    return tuple(torch.randn(s).to(dtype) for s in shapes)


def assert_chain(result, count=1):
    assert result.only() == {"lowrank_chain": count}, result.misses
    assert result.after["fsvd.shrink"] == result.after["fsvd.expand"] == count
    for gone in ("linear", "matmul", "addmm", "add", "mul"):
        assert result.after[gone] == 0, result.text()


class Foreign(nn.Module):
    """A checkpoint's own module: nothing about it is ours."""

    def __init__(self):
        super().__init__()
        self.u_proj, self.v_proj = nn.Linear(R, N), nn.Linear(K, R, bias=False)

    def forward(self, x):
        return self.u_proj(self.v_proj(x))


class Transposed(nn.Module):
    """`x @ L @ R` as ASVD- and QR-like checkpoints store it: parameters with the input dimension first."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(K, R)), nn.Parameter(torch.randn(R, N))

    def forward(self, x):
        return x @ self.a @ self.b


@pytest.mark.parametrize(
    "module",
    [
        pytest.param(
            lambda: nn.Sequential(nn.Linear(K, R, bias=False), nn.Linear(R, N)), id="Sequential"
        ),
        pytest.param(Foreign, id="foreign"),
        pytest.param(Transposed, id="transposed-parameters"),
        pytest.param(
            lambda: nn.Sequential(nn.Linear(K, R), nn.Dropout(0.3), nn.Linear(R, N)).eval(),
            id="eval-dropout-between",
        ),
        pytest.param(
            lambda: nn.Sequential(nn.Linear(K, R), nn.Identity(), nn.Linear(R, N)),
            id="identity-between",
        ),
    ],
)
def test_modules(module):
    result = rewrite(module(), torch.randn(3, 5, K))
    assert_chain(result)
    # Parameters stored the other way round are read through a view, never copied.
    assert result.after["t"] == (2 if module is Transposed else 0)


def _in_place_bias(x, v, u, vb, ub):
    y = F.linear(F.linear(x, v), u)
    y += ub
    return y


SPELLINGS = {
    "linear": lambda x, v, u, vb, ub: F.linear(F.linear(x, v), u),
    "bias-on-v": lambda x, v, u, vb, ub: F.linear(F.linear(x, v, vb), u),
    "bias-on-u": lambda x, v, u, vb, ub: F.linear(F.linear(x, v), u, ub),
    "bias-on-both": lambda x, v, u, vb, ub: F.linear(F.linear(x, v, vb), u, ub),
    "bias-keyword": lambda x, v, u, vb, ub: F.linear(
        F.linear(x, weight=v, bias=vb), weight=u, bias=ub
    ),
    "add-after": lambda x, v, u, vb, ub: F.linear(F.linear(x, v), u) + ub,
    "add-before": lambda x, v, u, vb, ub: ub + F.linear(F.linear(x, v), u),
    "add-on-both": lambda x, v, u, vb, ub: F.linear(F.linear(x, v) + vb, u) + ub,
    "add-in-place": _in_place_bias,
    "add_": lambda x, v, u, vb, ub: F.linear(F.linear(x, v), u).add_(ub),
    "matmul-.T": lambda x, v, u, vb, ub: x @ v.T @ u.T,
    "matmul-.mT": lambda x, v, u, vb, ub: x @ v.mT @ u.mT,
    "matmul-t()": lambda x, v, u, vb, ub: torch.matmul(torch.matmul(x, v.t()), u.t()),
    "matmul-transpose": lambda x, v, u, vb, ub: x.matmul(v.transpose(0, 1)).matmul(
        u.transpose(-1, -2)
    ),
    "t-of-t": lambda x, v, u, vb, ub: x @ v.t().t().T @ u.T,
    "addmm": lambda x, v, u, vb, ub: torch.addmm(
        ub, torch.addmm(vb, x.view(-1, K), v.t()), u.t()
    ).view(3, 5, N),
    "addmm-method": lambda x, v, u, vb, ub: ub.addmm(x[0] @ v.T, u.T),
    "mm": lambda x, v, u, vb, ub: torch.mm(torch.mm(x[0], v.t()), u.t()),
    "2-D": lambda x, v, u, vb, ub: F.linear(F.linear(x[1], v), u, ub),
    "1-D": lambda x, v, u, vb, ub: F.linear(F.linear(x[1, 2], v), u, ub),
    "1-D-matmul": lambda x, v, u, vb, ub: x[1, 2] @ v.T @ u.T,
    "4-D": lambda x, v, u, vb, ub: F.linear(F.linear(x[None], v), u, ub),
    "view-before": lambda x, v, u, vb, ub: F.linear(F.linear(x.view(-1, K), v), u),
    "views-around": lambda x, v, u, vb, ub: F.linear(F.linear(x.view(-1, K), v), u).view(3, 5, N),
    "view-between": lambda x, v, u, vb, ub: F.linear(F.linear(x, v).view(-1, R), u),
    "flatten-unflatten": lambda x, v, u, vb, ub: F.linear(
        F.linear(x.flatten(0, 1), v).unflatten(0, (3, 5)), u
    ),
    "unsqueeze-squeeze": lambda x, v, u, vb, ub: F.linear(
        F.linear(x, v).unsqueeze(1).squeeze(1), u, ub
    ),
    "casts-that-do-nothing": lambda x, v, u, vb, ub: F.linear(
        F.linear(x.float(), v).to(x.dtype).type_as(x).contiguous(), u
    ),
    "x@(u@v).T": lambda x, v, u, vb, ub: x @ (u @ v).T,
    "linear(x,u@v)": lambda x, v, u, vb, ub: F.linear(x, u @ v, ub),
    "x@(vt@ut)": lambda x, v, u, vb, ub: x @ (v.T @ u.T),
    "dropout-p0": lambda x, v, u, vb, ub: F.linear(F.dropout(F.linear(x, v), 0.0), u),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name):
    result = rewrite(SPELLINGS[name], *factors())
    assert_chain(result)
    assert result.after["t"] == result.after["transpose"] == 0, result.text()


def test_contiguous_copy_of_x_stays_and_the_chain_is_found():
    def fn(x, v, u, vb, ub):
        return F.linear(F.linear(x.transpose(0, 1).contiguous(), v), u)

    result = rewrite(fn, *factors())
    assert result.only() == {"lowrank_chain": 1} and result.after["contiguous"] == 1


def test_strided_x_and_weights():
    def fn(x, v, u):
        return F.linear(F.linear(x[..., ::2], v[:, ::2]), u.t()[::2].t())

    result = rewrite(fn, torch.randn(3, 5, 2 * K), torch.randn(R, 2 * K), torch.randn(N, 2 * R))
    assert result.only() == {"lowrank_chain": 1}


@pytest.mark.parametrize(
    "dtype,limit", [(torch.float64, 1e-12), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]
)
def test_dtypes(dtype, limit):
    assert_chain(
        rewrite(
            lambda x, v, u, vb, ub: F.linear(F.linear(x, v, vb), u, ub),
            *factors(dtype),
            limit=limit,
        )
    )


# Several linears in a row: [features in order], which neighbours form pairs.
@pytest.mark.parametrize(
    "sizes,pairs,dense",
    [
        pytest.param((22, 37, 5, 22), 1, 1, id="dense-V-U"),
        pytest.param((37, 5, 22, 5, 37), 2, 0, id="V-U-V-U"),
        pytest.param((37, 5, 22, 37, 7, 22), 2, 1, id="V-U-dense-V-U"),
        pytest.param((37, 5, 22, 22), 1, 1, id="V-U-dense"),
        pytest.param((37, 22, 5), 0, 2, id="shrinking-steps"),
        pytest.param((5, 22, 37), 0, 2, id="growing-steps"),
    ],
)
def test_linears_in_a_row(sizes, pairs, dense):
    module = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))
    result = rewrite(module, torch.randn(3, 5, sizes[0]))
    assert result.only() == ({"lowrank_chain": pairs} if pairs else {})
    assert result.after["linear"] == dense


@pytest.mark.parametrize(
    "rank,matched",
    [(13, True), (14, False), (22, False), (40, False)],
    ids=["below", "above", "full", "wide"],
)
def test_break_even_rank(rank, matched):
    # 37 · 22 / (37 + 22) = 13.8
    module = nn.Sequential(nn.Linear(K, rank, bias=False), nn.Linear(rank, N))
    result = rewrite(module, torch.randn(3, 5, K))
    assert result.only() == ({"lowrank_chain": 1} if matched else {})
    assert matched or result.misses == {
        "lowrank_chain": [f"rank {rank} is not below break-even for {K} -> {N}"]
    }


def test_exactly_break_even_is_left_alone():
    result = rewrite(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8)), torch.randn(3, 8))
    assert result.only() == {} and "rank 4 is not below" in result.misses["lowrank_chain"][0]


def test_a_weight_product_above_break_even_stays_a_product():
    def fn(x, u, v):
        return F.linear(x, u @ v)

    result = rewrite(fn, torch.randn(3, 5, K), torch.randn(N, 20), torch.randn(20, K))
    assert result.only() == {} and "rank 20 is not below" in result.misses["weight_product"][0]


def _write_weight(x, v, u, vb, ub):
    z = F.linear(x, v)
    v.mul_(2)
    return F.linear(z, u)


def _write_through_view(x, v, u, vb, ub):
    row = v[0]
    z = F.linear(x, v)
    row.add_(1)
    return F.linear(z, u)


def _write_bias(x, v, u, vb, ub):
    z = F.linear(x, v, vb)
    vb += 1
    return F.linear(z, u, ub)


def _write_x(x, v, u, vb, ub):
    z = F.linear(x, v)
    x[0] = 0
    return F.linear(z, u)


def _write_latent_view(x, v, u, vb, ub):
    z = F.linear(x, v)
    first = z[..., 0]
    first.mul_(3)
    return F.linear(z, u)


def _out_argument(x, v, u, vb, ub):
    z = F.linear(x, v)
    torch.mul(v, 0.5, out=v)
    return F.linear(z, u)


def _copy_into_weight(x, v, u, vb, ub):
    z = F.linear(x, v)
    v[:, :R].copy_(u[:R])
    return F.linear(z, u)


# name -> (function, rewrite, what the reason says); an empty reason: nothing was near enough to say anything.
REFUSALS = {
    "latent-returned": (
        lambda x, v, u, vb, ub: (z := F.linear(x, v), F.linear(z, u)),
        "lowrank_chain",
        "is also read by output",
    ),
    "latent-used": (
        lambda x, v, u, vb, ub: F.linear(z := F.linear(x, v), u) + z.sum(-1, keepdim=True),
        "lowrank_chain",
        "is also read by sum",
    ),
    "latent-viewed-and-used": (
        lambda x, v, u, vb, ub: F.linear((z := F.linear(x, v)).view(3, 5, R), u) + z.view(-1).sum(),
        "lowrank_chain",
        "is also read by",
    ),
    "weight-written": (_write_weight, "lowrank_chain", "is written in place by mul_"),
    "weight-written-through-a-view": (
        _write_through_view,
        "lowrank_chain",
        "is written in place by add_",
    ),
    "weight-copied-into": (_copy_into_weight, "lowrank_chain", "is written in place by copy_"),
    "weight-is-out=": (_out_argument, "lowrank_chain", "is written in place by mul"),
    "bias-written": (_write_bias, "lowrank_chain", "is written in place by"),
    "x-written": (_write_x, "lowrank_chain", "is written in place by setitem"),
    "latent-written-through-a-view": (_write_latent_view, "lowrank_chain", "is also read by"),
    "silu-between": (lambda x, v, u, vb, ub: F.linear(F.silu(F.linear(x, v)), u), None, ""),
    "scaled-between": (lambda x, v, u, vb, ub: F.linear(F.linear(x, v) * 2, u), None, ""),
    "other-latent-added": (
        lambda x, v, u, vb, ub: F.linear(F.linear(x, v) + x[..., :R], u),
        None,
        "",
    ),
    "features-split-between": (
        lambda x, v, u, vb, ub: F.linear(F.linear(x.view(3, K, 5), u).view(3, N, K), v),
        None,
        "",
    ),
    "sliced-between": (
        lambda x, v, u, vb, ub: F.linear(F.linear(x, v)[..., :3], u[:, :3]),
        None,
        "",
    ),
    "x.T": (lambda x, v, u, vb, ub: (v @ x.mT).mT @ u.T, None, ""),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_left_alone(name):
    fn, where, reason = REFUSALS[name]
    result = rewrite(fn, *factors())
    assert result.only() == {}
    assert result.after["fsvd.shrink"] == result.after["fsvd.expand"] == 0
    if where:
        assert len(result.misses[where]) == 1 and reason in result.misses[where][0], result.misses
    else:
        assert "lowrank_chain" not in result.misses


@pytest.mark.parametrize(
    "bias",
    [
        pytest.param((5, 1), id="[M,1]"),
        pytest.param((5, N), id="[M,N]"),
        pytest.param((1, N), id="[1,N]"),
        pytest.param((1,), id="[1]"),
        pytest.param((), id="scalar"),
    ],
)
def test_a_bias_that_broadcasts(bias):
    """`F.linear` and `addmm` take whatever broadcasts; only one number per feature is a bias."""
    x, v, u, _, _ = factors()
    b = torch.randn(bias)

    for fn in (
        lambda x, v, u, b: F.linear(x[0] @ v.T, u, b),
        lambda x, v, u, b: torch.addmm(b, x[0] @ v.T, u.T),
    ):
        result = rewrite(fn, x, v, u, b)
        assert "lowrank_chain" not in result.matches, result.text()
        assert any("broadcast" in r for reasons in result.misses.values() for r in reasons)

    # Added afterwards it stays an addition behind the pair.
    result = rewrite(lambda x, v, u, b: F.linear(F.linear(x, v), u) + b, x, v, u, b)
    assert result.only() == {"lowrank_chain": 1} and result.after["add"] == 1


@pytest.mark.parametrize("factor", [{"beta": 2}, {"alpha": 0.5}, {"beta": 0}], ids=str)
def test_addmm_with_factors_stays(factor):
    def fn(x, v, u, vb, ub):
        return torch.addmm(ub, F.linear(x[0], v), u.t(), **factor)

    result = rewrite(fn, *factors())
    assert result.only() == {} and result.after["addmm"] == 1
    assert "beta=" in result.misses["addmm"][0]


def test_bias_times_alpha_is_no_bias():
    result = rewrite(
        lambda x, v, u, vb, ub: torch.add(F.linear(F.linear(x, v), u), ub, alpha=2), *factors()
    )
    assert result.only() == {"lowrank_chain": 1}
    assert "bias" not in result.matches and result.after["add"] == 1


def test_bias_of_wider_dtype_is_added_after():
    def fn(x, v, u, vb, ub):
        return F.linear(F.linear(x, v), u) + ub.double()

    result = rewrite(
        lambda x, v, u, vb, ub: F.linear(F.linear(x, v), u) + ub,
        *factors()[:4],
        torch.randn(N).double(),
    )
    assert result.only() == {"lowrank_chain": 1} and result.output.dtype == torch.float64
    assert rewrite(fn, *factors()).output.dtype == torch.float64


def test_active_dropout_between():
    module = nn.Sequential(nn.Linear(K, R), nn.Dropout(1.0), nn.Linear(R, N)).train()
    result = rewrite(module, torch.randn(3, 5, K))
    assert result.only() == {} and result.after["dropout"] == 1
    assert result.misses["dropout"] == ["dropout is active (training mode)"]


def test_real_casts_between():
    def fn(x, v, u):
        return F.linear(F.linear(x, v).half(), u)

    x, v, u, _, _ = factors()
    assert rewrite(fn, x, v, u.half(), limit=1e-2).only() == {}

    def there_and_back(x, v, u):
        return F.linear(F.linear(x, v).bfloat16().float(), u)

    assert rewrite(there_and_back, x, v, u, limit=1e-6).only() == {}


def test_float_and_double_factors_cast_between():
    def fn(x, v, u):
        return F.linear(F.linear(x, v).double(), u)

    x, v, u, _, _ = factors()
    assert rewrite(fn, x, v, u.double()).only() == {}


def test_the_view_dtype_of_the_latent_is_no_reshape():
    def fn(x, v, u):
        return F.linear(F.linear(x, v).view(torch.int32).view(torch.float32), u)

    x, v, u, _, _ = factors()
    result = rewrite(fn, x, v, u)
    assert result.only() == {} and result.after["reshape"] == 2


def test_weights_that_are_activations():
    """Attention spelled as matmuls: a chain by form; the ranks say no, and a symbolic rank is never asked."""

    def fn(q, k, v):
        return q @ k.T @ v

    result = rewrite(fn, torch.randn(9, 4), torch.randn(11, 4), torch.randn(11, 4))
    assert result.only() == {}
    result = rewrite(fn, torch.randn(9, 4), torch.randn(11, 4), torch.randn(11, 4), dynamic=True)
    assert result.only() == {} and result.guards == 0


def test_a_computed_weight_is_read_where_it_is():
    """Factors may be computed (an adapter merge); they are operands like any other."""

    def fn(x, v, u, vb, ub):
        return F.linear(F.linear(x, v * 2), u.abs(), ub)

    result = rewrite(fn, *factors())
    assert result.only() == {"lowrank_chain": 1} and result.after["mul"] == 1


def test_a_result_written_between_the_linears_that_read_it():
    """The first pair is replaced first: what is written in its place has to be known as the memory of the new one."""

    def fn(x, v, u, v2, u2):
        h = F.linear(F.linear(x, v), u)
        flat = h.view(-1)
        z = F.linear(h, v2)
        flat[:9] = 0
        return F.linear(z, u2), h

    shapes = ((3, 5, K), (R, K), (N, R), (R, N), (K, R))
    result = rewrite(fn, *map(torch.randn, shapes))
    assert result.only() == {"lowrank_chain": 1}
    assert "is written in place by setitem" in result.misses["lowrank_chain"][0]


def test_a_write_before_and_after_the_chain_is_seen_and_not_seen():
    def fn(x, v, u, vb, ub):
        x.mul_(2)
        v[0] = 1
        y = F.linear(F.linear(x, v), u, ub)
        x.zero_()
        u.add_(1)
        return y, F.linear(F.linear(x + 1, v), u)

    result = rewrite(fn, *factors())
    assert result.only() == {"lowrank_chain": 2}


def test_a_result_that_is_returned_and_viewed():
    def fn(x, v, u, vb, ub):
        y = F.linear(F.linear(x, v), u)
        return y, y.view(-1, N)

    result = rewrite(fn, *factors())
    assert result.only() == {"lowrank_chain": 1}
    y, flat = result.output
    assert y.data_ptr() == flat.data_ptr()


def test_a_tensor_subclass_keeps_its_own_linear():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.v = nn.Parameter(
                TwoTensor(torch.randn(R, K), torch.randn(R, K)), requires_grad=False
            )
            self.u = nn.Linear(R, N)

        def forward(self, x):
            return self.u(F.linear(x, self.v))

    model, recorder = Model(), Recorder()
    with torch.no_grad():
        recorder.compile(model, dynamic=False)(torch.randn(3, K))
    assert recorder.graphs[0].only() == {}
    assert "TwoTensor, no plain tensor" in recorder.graphs[0].misses["lowrank_chain"][0]


@pytest.mark.parametrize(
    "fn,reason",
    [
        pytest.param(lambda x, v, u: F.linear(F.linear(x, v), u), None, id="parameters"),
        pytest.param(lambda x, v, u: x @ v.T.T.T @ u.t(), None, id="views-of-parameters"),
        pytest.param(
            lambda x, v, u: F.linear(F.linear(x, v * 2), u), "no parameter or buffer", id="computed"
        ),
        pytest.param(
            lambda x, v, u: F.linear(F.linear(x, v.mul_(2)), u), "", id="updated-in-the-graph"
        ),
        pytest.param(
            lambda x, v, u: (v.mul_(2), F.linear(F.linear(x, v), u))[1],
            "is written in place by mul_",
            id="updated-before",
        ),
    ],
)
def test_on_a_gpu_weights_are_read_before_the_kernel_in_front_ends(fn, reason):
    """Right for what no kernel of the graph writes, and for nothing else. A CPU does not care."""
    v, u = (nn.Parameter(torch.randn(s), requires_grad=False) for s in ((R, K), (N, R)))
    assert rewrite(fn, torch.randn(3, K), v, u).only() == {"lowrank_chain": 1}
    result = rewrite(fn, torch.randn(3, K), v, u, device="cuda")
    assert result.only() == ({"lowrank_chain": 1} if reason is None else {})
    assert reason is None or reason in result.misses["lowrank_chain"][0]
