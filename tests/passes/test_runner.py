"""The runner and what it rests on: who writes what, where memory is, what dies, what is said."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from harness import Recorder, rewrite
from torch import nn

from fsvd_compile.passes import PIPELINE, Context, Rewrite, run
from fsvd_compile.passes.graph import (
    Memory,
    emit,
    is_transpose,
    reaches_output,
    storage,
    transposed,
    val,
    written_by,
)
from fsvd_compile.passes.pattern import Call, Either, Is, Maybe, Var
from fsvd_compile.passes.vocabulary import arguments, kind_of

K = 37


def traced(fn, *args, dynamic=False):
    """Dynamo's graph, untouched."""
    graphs = []

    def backend(gm, inputs):
        graphs.append(gm.graph)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(fn, backend=backend, fullgraph=True, dynamic=dynamic)(*args)
    return graphs[0]


def calls(graph):
    return [n for n in graph.nodes if n.op in ("call_function", "call_method")]


def chain():
    return nn.Sequential(nn.Linear(K, 5, bias=False), nn.Linear(5, 22))


def test_names_are_unique_and_every_rewrite_says_what_it_does():
    names = [r.name for r in PIPELINE]
    assert len(set(names)) == len(names)
    for r in PIPELINE:
        assert "->" in r.what, r.name
        assert r.guard.__doc__, f"{r.name}: a guard's docstring is its cost model"


@pytest.mark.parametrize("name", [r.name for r in PIPELINE])
def test_disable(name):
    def fn(x, v, u, b):
        y = x.view(-1, K).to(torch.float32).contiguous() @ v
        y = F.dropout(y, 0.5, False) @ u
        y += b
        z = y.view(3, 5, K)
        return z + x

    shapes = ((3, 5, K), (K, 5), (5, K), (K,))
    result = rewrite(fn, *map(torch.randn, shapes), disable=(name,))
    assert name not in result.matches


def test_counts_reasons_and_time():
    def fn(x, v, u, w):
        z = F.linear(x, v)
        return F.linear(z, u) + F.linear(F.linear(x, v), u) + F.linear(z, w)

    graph = traced(fn, *map(torch.randn, ((3, K), (5, K), (22, 5), (22, 5))))
    outcomes = {o.name: o for o in run(PIPELINE, graph, Context())}
    assert list(outcomes) == [r.name for r in PIPELINE]
    chains = outcomes["lowrank_chain"]
    assert chains.matches == 1 and len(chains.misses) == 2 and chains.seconds > 0
    assert all("is also read by" in reason for _, reason in chains.misses)


def test_quiet_refusals_say_nothing():
    result = rewrite(
        lambda x: x.half().transpose(0, 1).contiguous() @ x.half(), torch.randn(4, 4), limit=1e-2
    )
    assert result.misses == {}


def test_a_repeated_rewrite_reports_only_the_last_round():
    """Else a refusal would be counted once a round."""
    graph = traced(lambda x: (x + 1) * 2 * 2, torch.randn(3))
    halves = Rewrite(
        "halves",
        "x * 2 -> x + x, unless x is a sum",
        Call("mul", input=Var("x"), other=Is(2)),
        lambda match, graph: emit(graph, match.root, match.root, torch.add, match["x"], match["x"]),
        lambda match, context: "x is a sum" if kind_of(match["x"]) == "add" else None,
        repeat=True,
    )
    (outcome,) = run([halves], graph, Context())
    assert outcome.matches == 1 and len(outcome.misses) == 1


def test_dead_code_is_no_second_reader():
    """`(u @ v).T` leaves the transpose behind; it must not count as a reader of the product."""
    result = rewrite(lambda x, u, v: x @ (u @ v).T, *map(torch.randn, ((3, K), (22, 5), (5, K))))
    assert result.matches["weight_product"] == 1
    assert result.after == {"fsvd.shrink": 1, "fsvd.expand": 1}


def test_writes_survive_dead_code_elimination():
    def fn(x, v, u):
        y = F.linear(F.linear(x, v), u)
        y[0] = 1  # nobody reads y
        x.mul_(2)
        return x

    rewrite(fn, *map(torch.randn, ((3, K), (5, K), (22, 5))))


def test_constants_made_in_the_graph():
    rewrite(lambda x: x + torch.ones(3) + torch.tensor([1.0, 2.0, 3.0]), torch.randn(3))


def test_views_that_show_what_disappears_count_as_readers():
    def fn(x, v, u):
        z = F.linear(x, v)
        return F.linear(z.view(3, 5), u), z.view(-1)

    result = rewrite(fn, *map(torch.randn, ((3, K), (5, K), (22, 5))))
    assert result.only() == {}


def test_shapes_strides_and_memory_of_fake_values_stay_true():
    """`Recorder` interprets every rewritten graph on fakes; here what that check rests on."""

    def fn(x, v, u):
        y = F.linear(F.linear(x, v), u)
        flat = y.view(-1)
        flat.add_(1)
        return y, flat

    result = rewrite(fn, *map(torch.randn, ((3, 5, K), (5, K), (22, 5))))
    y, flat = result.graph.output_node().args[0]
    assert storage(y) == storage(flat)


def _setitem(x, y):
    x[0] = 1.0


def _delegated(x, y):
    x[0] += y[0]


# What each statement writes: names of arguments.
WRITERS = {
    "add_": (lambda x, y: x.add_(y), "x"),
    "+=": (lambda x, y: operator.iadd(x, y), "x"),
    "-=": (lambda x, y: operator.isub(x, y), "x"),
    "/=": (lambda x, y: operator.itruediv(x, y), "x"),
    "//=": (lambda x, y: operator.ifloordiv(x, y), "x"),
    "**=": (lambda x, y: operator.ipow(x, y), "x"),
    "%=": (lambda x, y: operator.imod(x, y), "x"),
    "setitem": (_setitem, "x"),
    "setitem-of-a-sum": (_delegated, "x"),
    "copy_": (lambda x, y: x.copy_(y), "x"),
    "zero_": (lambda x, y: x.zero_(), "x"),
    "out=": (lambda x, y: torch.add(x, x, out=y), "y"),
    "out=-tuple": (lambda x, y: torch.frexp(x.clone(), out=(y, y.int())), "y"),
    "aten-overload": (lambda x, y: torch.ops.aten.add_.Tensor(x, y), "x"),
    "aten-packet": (lambda x, y: torch.ops.aten.mul_(x, y), "x"),
    "relu-inplace": (lambda x, y: F.relu(x, inplace=True), "x"),
    "relu-inplace-positional": (lambda x, y: F.relu(x, True), "x"),
    "elu-inplace-positional": (lambda x, y: F.elu(x, 1.0, True), "x"),
    "leaky_relu-inplace": (lambda x, y: F.leaky_relu(x, 0.1, True), "x"),
    "hardtanh-inplace": (lambda x, y: F.hardtanh(x, -1.0, 1.0, True), "x"),
    "dropout-inplace": (lambda x, y: F.dropout(x, 1.0, True, True), "x"),
    "init": (lambda x, y: nn.init.zeros_(x), "x"),
    "foreach": (lambda x, y: torch._foreach_add_([x, y], 1.0), "xy"),
    "embedding-max-norm": (lambda x, y: F.embedding(torch.tensor([0, 1]), x, max_norm=0.1), "x"),
    "batch-norm": (lambda x, y: F.batch_norm(x.clone(), y[0], y[1], training=True), "y"),
    "mul": (lambda x, y: x * y, ""),
    "and": (lambda x, y: (x > 0) & (y > 0), ""),
    "or": (lambda x, y: (x > 0) | (y > 0), ""),
    "not": (lambda x, y: ~(x > 0), ""),
    "relu": (lambda x, y: F.relu(x), ""),
    "embedding": (lambda x, y: F.embedding(torch.tensor([0, 1]), x), ""),
    "batch-norm-eval": (lambda x, y: F.batch_norm(x.clone(), y[0], y[1], training=False), ""),
    "index_copy": (lambda x, y: x.index_copy(0, torch.tensor([0]), y[:1]), ""),
}


@pytest.mark.parametrize("name", WRITERS)
def test_written_by(name):
    fn, names = WRITERS[name]

    def with_result(x, y):
        fn(x, y)
        return x + 0, y + 0

    def keep_result(x, y):
        return fn(x, y), x + 0, y + 0

    graph = traced(
        with_result if names else keep_result, torch.rand(4, 4) + 1, torch.rand(4, 4) + 1
    )
    inputs = {n: n.name for n in graph.nodes if n.op == "placeholder"}
    memory = {storage(n): name for n, name in inputs.items()}
    written = {memory.get(storage(w)) for n in calls(graph) for w in written_by(n)} - {None}
    assert written == {f"l_{c}_" for c in names}


def test_a_custom_op_writes_what_its_schema_says():
    with torch.library._scoped_library("fsvd_test", "DEF") as lib:
        lib.define("bump(Tensor x, Tensor(a!) y) -> ()")

        def bump(x, y):
            y.add_(x)

        lib.impl("bump", bump, "CompositeExplicitAutograd")
        torch.library.register_fake("fsvd_test::bump", lambda x, y: None, lib=lib)

        def fn(x, y, v, u):
            z = F.linear(x, v)
            torch.ops.fsvd_test.bump(u.t(), v)
            return F.linear(z, u) + y

        result = rewrite(fn, *map(torch.randn, ((3, K), (K,), (5, K), (K, 5))))
        assert result.only() == {}
        assert "is written in place by" in result.misses["lowrank_chain"][0]


def test_a_higher_order_operator_writes_if_its_body_does():
    def fn(x, v, u):
        z = F.linear(x, v)
        y = torch.cond(x.sum() > 0, lambda a: a.sin(), lambda a: a.cos(), (x,))
        return F.linear(z, u), y

    result = rewrite(fn, *map(torch.randn, ((3, K), (5, K), (22, 5))))
    assert result.only() == {"lowrank_chain": 1}


def test_writes_between():
    def fn(x):
        a = x.sin()
        view = x[0]
        view.add_(1)
        b = x.cos()
        x.mul_(2)
        return a, b

    graph = traced(fn, torch.randn(3, 3))
    x = next(n for n in graph.nodes if n.op == "placeholder")
    sin, _, add_, cos, mul_ = calls(graph)
    memory = Memory(graph)
    assert memory.between(x, sin, cos) is add_
    assert memory.between(x, add_, cos) is None and memory.between(x, sin, add_) is None
    assert memory.between(x, cos, graph.output_node()) is mul_
    assert memory.between(x, sin, cos, but=[add_]) is None
    assert memory.between(sin, x, graph.output_node()) is None


def test_inputs_of_one_storage_are_one_memory():
    base = torch.randn(2, 5, K)
    result = rewrite(
        lambda v, w, x, u: (z := F.linear(x, v), w.mul_(2), F.linear(z, u))[2],
        base[0], base[1], torch.randn(3, K), torch.randn(22, 5),
    )  # fmt: skip
    assert (
        result.only() == {} and "is written in place by mul_" in result.misses["lowrank_chain"][0]
    )


def test_reaches_output():
    def fn(x):
        a, b, c, d = x.sin(), x.cos(), x.tan(), x.exp()
        return a, b.view(-1)[2:], c.chunk(2)[0], d + 1

    graph = traced(fn, torch.randn(4, 4))
    found = {
        n.target.__name__ if callable(n.target) else n.target: reaches_output(n)
        for n in calls(graph)[:4]
    }
    assert found == {"sin": True, "cos": True, "tan": True, "exp": False}


def test_transposes():
    views = {
        "T": lambda w: w.T,
        "mT": lambda w: w.mT,
        "aten.numpy_T": lambda w: torch.ops.aten.numpy_T(w),
        "aten.mT": lambda w: torch.ops.aten.mT(w),
        "t": lambda w: w.t(),
        "torch.t": lambda w: torch.t(input=w),
        "transpose": lambda w: w.transpose(0, 1),
        "negative": lambda w: torch.transpose(w, dim0=-1, dim1=0),
    }
    for name, fn in views.items():
        graph = traced(fn, torch.randn(3, 4))
        (node,) = calls(graph)
        assert is_transpose(node), name
        assert transposed(graph, node, graph.output_node()).op == "placeholder", name
    for fn in (lambda w: w.transpose(0, 0), lambda w: w[None].mT, lambda w: w.permute(1, 0)):
        assert not any(is_transpose(n) for n in calls(traced(fn, torch.randn(3, 4))))


def test_a_transpose_of_a_transpose():
    graph = traced(lambda w: w.t().T.mT, torch.randn(3, 4))
    once, twice, thrice = calls(graph)
    output = graph.output_node()
    assert transposed(graph, thrice, output).op == "placeholder"
    made = transposed(graph, twice, output)
    assert is_transpose(made) and made.args[0].op == "placeholder" and made < once
    assert tuple(val(made).shape) == (4, 3)
    graph.lint()


SPELLED = {
    "+": ("add", lambda x: x + 1),
    "torch.add": ("add", lambda x: torch.add(x, 1)),
    "x.add": ("add", lambda x: x.add(1, alpha=1)),
    "*": ("mul", lambda x: x * 2),
    "multiply": ("mul", lambda x: x.multiply(2)),
    "-x": ("neg", lambda x: -x),
    "**": ("pow", lambda x: x**2),
    ".T": ("t", lambda x: x.T),
    "aten.numpy_T": ("t", lambda x: torch.ops.aten.numpy_T(x)),
    "keyword": ("mean", lambda x: torch.mean(input=x, dim=-1, keepdim=True)),
    "flatten-keyword": ("reshape", lambda x: torch.flatten(input=x, start_dim=0)),
    "reshape-keyword": ("reshape", lambda x: torch.reshape(input=x, shape=(-1,))),
    "narrow-keyword": ("narrow", lambda x: x.narrow(dim=0, start=0, length=1)),
    "permute": ("permute", lambda x: x.permute(1, 0)),
}


@pytest.mark.parametrize("name", SPELLED)
def test_vocabulary(name):
    kind, fn = SPELLED[name]
    (node,) = calls(traced(fn, torch.randn(3, 4)))
    assert kind_of(node) == kind
    assert arguments(node)["input"].op == "placeholder"
    rewrite(fn, torch.randn(3, 4))


def test_unknown_arguments_are_not_understood():
    (node,) = calls(
        traced(
            lambda x: torch.add(x, x, out=x.new_empty(0)) if False else x.mean(axis=-1),
            torch.randn(3, 4),
        )
    )
    assert kind_of(node) == "mean" and arguments(node) is None


def test_patterns():
    graph = traced(lambda x, y: 2 * x + y.to(torch.float64), torch.randn(3), torch.randn(3))
    node = calls(graph)[-1]
    found = Call(
        "add", input=Maybe("cast", Var("b")), other=Call("mul", input=Var("a"), other=Is(2))
    )(node)
    assert {k: v.name for k, v in found.bound.items()} == {"a": "l_x_", "b": "l_y_"}
    assert len(found.interior) == 2 and node not in found.interior
    assert Call("add", input=Call("neg", input=Var("a")), other=Var("b"))(node) is None
    assert (
        Either(Call("neg", input=Var("a")), Call("add", input=Var("a"), other=Var("c")))(node).get(
            "b"
        )
        is None
    )
    # The same name must meet the same value.
    assert Call("add", input=Var("a"), other=Var("a"))(node) is None
    assert Is(1).match(True, found) is False


def parameter(*shape):
    return nn.Parameter(torch.randn(shape), requires_grad=False)


def _sizes(*sizes):
    for batch, rows in sizes:
        yield torch.randn(batch, rows, K)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(K, eps=1e-6)
        self.gate, self.up = (
            nn.Sequential(nn.Linear(K, r, bias=False), nn.Linear(r, 41)) for r in (5, 7)
        )
        self.down = nn.Sequential(nn.Linear(41, 6, bias=False), nn.Linear(6, K))

    def forward(self, x):
        def flat(f, t):  # as transformers' Conv1D does it
            return f(t.view(-1, t.shape[-1])).view(*t.shape[:-1], -1)

        y = self.norm(x)
        y = flat(self.down, F.silu(flat(self.gate, y)) * flat(self.up, y))
        return x + F.dropout(y, 0.1, self.training)


def test_dynamic_shapes_one_compile():
    model, recorder = Mlp().eval(), Recorder()
    compiled = recorder.compile(model)
    with torch.no_grad():
        for x in _sizes((2, 5), (3, 7), (4, 11), (5, 2)):
            for dim in (0, 1):
                torch._dynamo.mark_dynamic(x, dim)
            torch.testing.assert_close(compiled(x), model(x))
    (graph,) = recorder.graphs
    assert graph.only() == {
        "lowrank_chain": 3,
        "siblings": 1,
        "gated_mlp": 1,
        "norm_prologue": 1,
        "residual": 1,
    }
    assert graph.guards == 0, "a rewrite guarded on a symbolic size"


@pytest.mark.parametrize("lowered", [False, True], ids=["ops", "lowered"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_dynamic_shapes_of_other_blocks(lowered, device):
    def fn(x, q, k, v, o):
        n, t, _ = x.shape
        q, k, v = (
            F.linear(F.linear(x, a), b).view(n, t, -1, 8).transpose(1, 2) for a, b in (q, k, v)
        )
        k, v = (y[:, :, None].expand(n, 2, 2, t, 8).reshape(n, 4, t, 8) for y in (k, v))
        seen = torch.ones(t, t, dtype=torch.bool).tril()[None, None]
        y = F.scaled_dot_product_attention(q, k, v, seen)
        y = y.transpose(1, 2).contiguous().view(n, t, 32)
        y += 1
        return x + F.linear(F.linear(y, o[0]), o[1]), q

    sizes = [(K, 32), (K, 16), (K, 16), (32, K)]
    weights = [(parameter(5, a), parameter(b, 5)) for a, b in sizes]
    recorder = Recorder(device=device, lowered=lowered)
    compiled = recorder.compile(fn)
    with torch.no_grad():
        for x in _sizes((2, 5), (3, 7), (6, 9)):
            for dim in (0, 1):
                torch._dynamo.mark_dynamic(x, dim)
            for ours, theirs in zip(compiled(x, *weights), fn(x, *weights), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
    (graph,) = recorder.graphs
    assert graph.only() == {"lowrank_chain": 4, "siblings": 1, "attention": 1, "residual": 1}, (
        graph.misses
    )
    assert graph.guards == 0


def test_dynamic_views_that_are_not_restored():
    def fn(x, v, u):
        return F.linear(F.linear(x.view(-1, K), v), u)

    x = torch.randn(3, 5, K)
    torch._dynamo.mark_dynamic(x, 0)
    result = rewrite(fn, x, torch.randn(5, K), torch.randn(22, 5), dynamic=None)
    assert result.only() == {"lowrank_chain": 1}


def test_a_symbolic_rank_is_never_asked():
    v = torch.randn(5, K)
    torch._dynamo.mark_dynamic(v, 0)
    u = torch.randn(22, 5)
    torch._dynamo.mark_dynamic(u, 1)
    result = rewrite(
        lambda x, v, u: F.linear(F.linear(x, v), u), torch.randn(3, K), v, u, dynamic=None
    )
    assert result.only() == {} and "no matrix of static shape" in result.misses["lowrank_chain"][0]
    assert result.guards == 0


@pytest.mark.parametrize("how", ["view", "as_strided", "torch.as_strided", "behind"])
def test_what_as_strided_shows_is_not_laid_out_anew(how):
    def fn(q, k, v):
        mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
        y = F.scaled_dot_product_attention(q, k, v, mask)[0]
        if how == "view":
            return y.reshape(6, 80)
        if how == "as_strided":
            return y.as_strided((6, 80), (80, 1))
        return torch.as_strided(y[None] if how == "torch.as_strided" else y.exp(), (6, 80), (80, 1))

    q, k = (torch.randn(1, 5, 6, 8).transpose(1, 2) for _ in range(2))
    result = rewrite(fn, q, k, torch.cat([q, k], -1))
    assert result.only() == ({"attention": 1} if how == "view" else {})
    if how != "view":
        assert "shows how its result lies" in result.misses["attention"][0]


def test_linears_that_as_strided_reads_are_fused():
    def fn(x, a, b, c, d):
        y, z = F.linear(F.linear(x, a), b), F.linear(F.linear(x, c), d)
        return y.as_strided((4, 10), (10, 1)), (z + 1).as_strided((4, 10), (10, 1)), z

    weights = [parameter(*size) for size in ((3, 16), (8, 3), (3, 16), (8, 3))]
    result = rewrite(fn, torch.randn(5, 2, 16).transpose(0, 1), *weights)
    assert result.matches["lowrank_chain"] == 2
