"""`explain` says what matched, what nearly did and why not, and what a call costs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import zoo
from torch import nn

import fsvd_compile
from fsvd_compile import LowRankLinear
from fsvd_compile.report import collect

pytestmark = pytest.mark.usefixtures("cheap")


def test_decode_of_a_llama():
    model = zoo.factorized("llama")
    ids = torch.randint(1, 97, (2, 1))
    told = fsvd_compile.explain(
        model, ids, past_key_values=zoo.static_cache(model, 2, 32), use_cache=True
    )
    (graph,) = told.graphs
    assert (graph.phase, graph.tokens) == ("decode", 2)
    assert graph.layers == [1, 2, 1], "embedding, two layers compiled once, head"
    assert told.matches()["attention"] == 2
    text = repr(told)
    for part in (
        "decode (tokens: 2)",
        "lowrank_chain",
        "siblings",
        "weights read per call",
        "CUDA graphs: off",
    ):
        assert part in text
    read = sum(p.numel() for n, p in model.named_parameters() if "embed_tokens" not in n)
    # Norm weights of the last norm belong to Inductor; they are 48 numbers.
    assert abs(graph.weight_bytes - 4 * read) <= 4 * 48


def test_near_miss_gives_its_reason():
    class TwoReaders(nn.Module):
        def __init__(self):
            super().__init__()
            self.v, self.u = nn.Linear(40, 6, bias=False), nn.Linear(6, 30)

        def forward(self, x):
            z = self.v(x)
            return self.u(z), z

    told = fsvd_compile.explain(TwoReaders().eval(), torch.randn(3, 40))
    assert told.matches().get("lowrank_chain", 0) == 0
    (_, reason) = told.graphs[0].misses["lowrank_chain"][0]
    assert "also read by" in reason
    assert reason in repr(told)


def test_graph_breaks_are_named():
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = LowRankLinear(40, 40, 6)

        def forward(self, x):
            y = self.a(x)
            torch._dynamo.graph_break()
            return self.a(y)

    told = fsvd_compile.explain(Breaks().eval(), torch.randn(3, 40))
    assert len(told.graphs) == 2
    assert told.breaks
    assert "graph breaks" in repr(told)


def test_a_compiled_model_keeps_its_graphs_and_options():
    model = zoo.factorized("mlp")
    compiled = torch.compile(model, backend="flashsvd", options={"disable": ["activation"]})
    x = torch.randn(3, 48)
    told = fsvd_compile.explain(compiled, x)
    assert "activation" not in told.matches()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


def test_asking_takes_nothing_of_the_limit_of_recompilations():
    model, x = zoo.factorized("mlp"), torch.randn(3, 48)
    with torch._dynamo.config.patch(recompile_limit=2):
        for _ in range(4):
            assert fsvd_compile.explain(model, x).graphs
        with torch.no_grad(), collect() as reports:
            torch.compile(model, backend="flashsvd")(x)
    assert len(reports) == 1


def test_other_models_sizes_do_not_change_what_is_told():
    for width, tokens in ((40, 3), (48, 5), (56, 7)):
        model = nn.Sequential(LowRankLinear(width, width, 3)).eval()
        (graph,) = fsvd_compile.explain(model, torch.randn(tokens, width)).graphs
        assert graph.tokens == tokens


def in_place(model, **how):
    model.compile(**how)
    return model


@pytest.mark.parametrize("compiled", [torch.compile, in_place])
def test_explains_what_was_asked_for(compiled):
    x = torch.randn(3, 48)

    def told(**how):
        model = compiled(zoo.factorized("mlp"), **{"backend": "flashsvd", **how})
        (graph,) = fsvd_compile.explain(model, x).graphs
        return graph

    assert "activation" not in told(options={"disable": ["activation"]}).matches
    assert (told(dynamic=True).tokens, told().tokens) == (None, 3)
    with pytest.raises(Exception, match="mode='fast' is not a mode"):
        told(mode="fast")
    # Another backend's options mean nothing to this one.
    assert "activation" in told(backend="inductor", options={"max_autotune": True}).matches


def test_two_threads_hear_of_their_own_graphs():
    def told(width):
        model = nn.Sequential(LowRankLinear(width, width, 3)).eval()
        for _ in range(3):
            graphs = fsvd_compile.explain(model, torch.randn(5, width)).graphs
            assert [graph.weight_bytes for graph in graphs] == [4 * (6 * width + width)]

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(told, (40, 48)))


def test_nothing_reached_the_backend():
    assert "no graph reached" in repr(fsvd_compile.explain(nn.Identity(), torch.randn(3)))
