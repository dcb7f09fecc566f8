"""Decode steps whose KV cache grows: what is of fixed size is captured, layers share what is compiled."""

from __future__ import annotations

import copy
import sys
from itertools import chain

import pytest
import torch
import torch.nn.functional as F
import zoo
from decoding import DECODERS, check_decoder, dynamic, run, static
from fake_cuda import FakeApi
from harness import assert_close
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils._pytree import tree_leaves

from fsvd_compile import LowRankLinear, backend
from fsvd_compile.cuda_graph import GraphPool
from fsvd_compile.kernels import attention, attention_aten, sdpa_of_any_length
from fsvd_compile.report import collect

SPELLINGS = {name: list(zoo.SPELLINGS)[i % 3] for i, name in enumerate(zoo.MODELS)}


@pytest.fixture
def pool(monkeypatch):
    """CUDA graphs on a CPU; graphs take the way of a GPU."""
    pool = GraphPool(api=FakeApi())
    monkeypatch.setattr(backend, "_pool", pool)
    monkeypatch.setattr(backend, "_device", lambda inputs: "cuda")
    monkeypatch.setattr(backend, "_why_uncaptured", lambda *given: None)
    return pool


class Layer(nn.Module):
    """Attention over a cache that is a tensor longer after each call, and a branch behind it."""

    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(32, 1e-6)
        self.q, self.k, self.v, self.o = (LowRankLinear(32, 32, 8, bias=False) for _ in range(4))
        self.up, self.down = LowRankLinear(32, 48, 8), LowRankLinear(48, 32, 8)

    def forward(self, x, keys, values):
        h = self.norm(x)
        q, k, v = (f(h).unflatten(-1, (4, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        h = F.scaled_dot_product_attention(q, keys, values).transpose(1, 2).flatten(2)
        x = x + self.o(h)
        return x + self.down(F.gelu(self.up(x))), keys, values


class Model(nn.Module):
    def __init__(self, layers=4):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.head = nn.Linear(32, 64)
        self.eval().requires_grad_(False)

    def forward(self, x, caches):
        found = []
        for layer, (keys, values) in zip(self.layers, caches, strict=True):
            x, keys, values = layer(x, keys, values)
            found.append([keys, values])
        return self.head(x), found


def caches(lengths):
    return [[torch.randn(1, 4, n, 8) for _ in range(2)] for n in lengths]


def check_steps(model, compiled, lengths, steps, seed=0):
    """Steps from caches of these lengths on; every result is compared at the end as well."""
    torch.manual_seed(seed)
    ours = theirs = caches(lengths)
    kept = []
    with torch.no_grad():
        for _ in range(steps):
            x = torch.randn(1, 1, 32)
            y, ours = compiled(x, ours)
            expected, theirs = model(x, theirs)
            kept.append((y, expected, y.clone()))
            for mine, right in zip(chain(*ours), chain(*theirs), strict=True):
                assert_close("cache", mine, right, 1e-5)
    for y, expected, before in kept:
        assert_close("logits", y, expected, 1e-5)
        assert torch.equal(y, before)


def test_what_lies_between_attentions_is_captured(pool, lowered):
    model = Model()
    compiled = torch.compile(model, backend="flashsvd")
    with collect() as reports:
        check_steps(model, compiled, [5] * 4, 8)
    static, growing = reports
    assert static.graphs == "step"
    assert growing.graphs.startswith("5 of 9 pieces: elsewhere ")
    # The first layer's front, attention, what lies between two attentions, the last layer's end and the head.
    assert growing.layers == [1, 4, 3, 1]
    names = {name for name in pool.captures if "layer" in name}
    assert len(names) == 5 and all(pool.captures[name] == 1 for name in names)
    # Of seven steps one warms up and one captures and replays.
    assert all(pool.replays[name] == 6 for name in names)
    sdpa = [n for gm in lowered for n in gm.graph.nodes if n.target is sdpa_of_any_length]
    assert len(sdpa) == 1
    # A second text replays what is there.
    check_steps(model, compiled, [9] * 4, 3, seed=1)
    assert len(reports) == 2 and all(pool.captures[name] == 1 for name in names)
    assert all(pool.replays[name] == 9 for name in names)


def test_caches_of_different_lengths(pool, lowered):
    model = Model()
    compiled = torch.compile(model, backend="flashsvd")
    with collect() as reports:
        check_steps(model, compiled, [5, 7, 6, 9], 4)
        check_steps(model, compiled, [17, 3, 40, 8], 4, seed=1)
    assert len(reports) == 2 and reports[1].layers == [1, 4, 3, 1]


def test_guards_of_what_is_shared_are_on_every_symbol(pool, monkeypatch):
    """What the compiler asks of one layer's length is asked of those that share the result."""
    asked = []

    def compile_graph(gm, inputs):
        for given in inputs:
            if (
                isinstance(given, torch.Tensor)
                and given.dim() == 4
                and not isinstance(given.shape[2], int)
            ):
                asked.append(bool(given.shape[2] < 30))
                break
        return aot_eager(gm, inputs)

    monkeypatch.setattr(backend, "_inductor", lambda config: compile_graph)
    model = Model(3)
    compiled = torch.compile(model, backend="flashsvd")
    with collect() as reports:
        check_steps(model, compiled, [5, 5, 5], 3)
        assert asked == [True] and reports[-1].layers[1] == 3
        # Only the last layer's cache has left the range for which all are compiled.
        check_steps(model, compiled, [6, 6, 50], 2, seed=1)
        assert len(reports) == 3
    # The two short ones share again, the long one has a function of its own.
    assert asked == [True, True, False]
    assert sorted(reports[-1].layers) == [1, 1, 1, 2, 2]


def test_a_range_that_one_symbol_has_and_another_lacks(pool, lowered):
    """A bound that was told to Dynamo needs no guard, so nobody would see that another symbol lacks it."""
    model = Model(3)
    compiled = torch.compile(model, backend="flashsvd")
    x, given = torch.randn(1, 1, 32), caches([5, 5, 5])
    for i, cache in enumerate(given):
        for tensor in cache:
            torch._dynamo.mark_dynamic(tensor, 2, **({"min": 2, "max": 64} if i == 0 else {}))
    with torch.no_grad(), collect() as reports:
        y, _ = compiled(x, given)
        assert_close("logits", y, model(x, given)[0], 1e-5)
    # The bounded first layer's attention serves no other.
    assert sorted(reports[0].layers) == [1, 1, 1, 2, 2]


def test_prompts_of_any_length_are_cut_at_layers(pool, lowered):
    """There the head alone is of a fixed size, and no reason to give up what layers share."""
    model = zoo.factorized("llama")
    compiled = torch.compile(model, backend="flashsvd")
    with torch.no_grad(), collect() as reports:
        for length in (5, 9, 12):
            ids = torch.randint(1, 97, (1, length))
            given = {"use_cache": False, "logits_to_keep": 1}
            assert_close("logits", compiled(ids, **given).logits, model(ids, **given).logits, 1e-5)
    assert reports[-1].graphs.startswith("off: ")
    assert max(reports[-1].layers) == model.config.num_hidden_layers
    assert not any("layer" in name for name in pool.captures)


def test_what_shares_memory_with_a_result_is_not_lent(pool, lowered):
    """A view that a later piece takes of a captured one's result, as the model's result."""

    class Viewed(Model):
        def forward(self, x, caches):
            for layer, (keys, values) in zip(self.layers, caches, strict=True):
                x, keys, values = layer(x, keys, values)
            y = self.head(x)
            length = keys.shape[2]
            return y.view(1, 8, 8).narrow(1, 0, 3), y * length

    model = Viewed(2)
    compiled = torch.compile(model, backend="flashsvd")
    found = []
    with torch.no_grad(), collect() as reports:
        for length in range(5, 11):
            x, given = torch.randn(1, 1, 32), caches([length] * 2)
            found.append((compiled(x, given), model(x, given)))
    assert "pieces" in reports[-1].graphs
    for ours, theirs in found:
        for mine, right in zip(ours, theirs, strict=True):
            assert_close("result", mine, right, 1e-5)


def check_calls(model, inputs, lengths=(5, 6, 7, 8, 9), inference=False):
    """Calls from caches of these lengths, inputs written in place included; returns the reports."""
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend="flashsvd")
    context = torch.inference_mode if inference else torch.no_grad
    with context(), collect() as reports:
        for length in lengths:
            given = inputs(length)
            twins = copy.deepcopy(given)
            for ours, right in zip(
                tree_leaves((compiled(*given), given)),
                tree_leaves((eager(*twins), twins)),
                strict=True,
            ):
                assert_close("result", ours, right, 1e-5)
    return reports


@pytest.mark.parametrize("inference", [False, True])
def test_a_piece_that_writes_what_attention_made_is_not_captured(pool, lowered, inference):
    class Clamped(Model):
        def forward(self, x, caches):
            found = []
            for layer, (keys, values) in zip(self.layers, caches, strict=True):
                h = F.scaled_dot_product_attention(layer.q(x)[:, None], keys, values)
                x = x + layer.o(h[:, 0])
                h.clamp_(min=0)
                x = x + layer.down(F.gelu(layer.up(x))) + h[:, 0]
                found.append(h)
            return self.head(x), found

    def inputs(length):
        return torch.randn(1, 1, 32), [[torch.randn(1, 1, length, 32) for _ in "kv"] for _ in "12"]

    reports = check_calls(Clamped(2), inputs, inference=inference)
    assert "of 5 pieces" in reports[-1].graphs and not reports[-1].graphs.startswith("3")


def test_a_view_that_is_read_behind_a_write_of_its_base_leaves_the_graph_whole(pool, lowered):
    class Viewed(Model):
        def forward(self, x, caches, buffer):
            view = buffer.view(-1)[2:]
            for layer, (keys, values) in zip(self.layers, caches, strict=True):
                y, *_ = layer(x + view.sum(), keys, values)
                buffer.add_(y.flatten())
                x = x + y + view.sum()
            return self.head(x)

    reports = check_calls(
        Viewed(2), lambda n: (torch.randn(1, 1, 32), caches([n] * 2), torch.randn(32))
    )
    assert reports[-1].graphs.startswith("off: ") and reports[-1].layers == [1]


def test_memory_shown_across_a_border_leaves_the_graph_whole(pool, lowered):
    """`as_strided` of a view counts from the beginning of what the view is a view of."""

    class Strided(Model):
        def forward(self, x, caches):
            for layer, (keys, values) in zip(self.layers, caches, strict=True):
                view = layer.o(x).flatten()[8:]
                y, *_ = layer(x, keys, values)
                x = y + view.as_strided((8,), (1,), 2).sum()
            return self.head(x)

    reports = check_calls(Strided(2), lambda n: (torch.randn(1, 1, 32), caches([n] * 2)))
    assert reports[-1].layers == [1]


def test_a_length_that_the_compiler_fixes_is_fixed_for_its_twins(pool):
    """Inductor makes the length of pooled keys a constant, of one layer; its twins' are then, too."""

    class Pooled(Model):
        def forward(self, x, caches):
            for layer, (keys, values) in zip(self.layers, caches, strict=True):
                x, keys, _ = layer(x, keys, values)
                x = x + F.adaptive_avg_pool2d(keys, (4, 8)).mean()
            return self.head(x)

    def inputs(length):
        return torch.randn(1, 1, 32), caches([length, length + 2 * (length == 8)])

    check_calls(Pooled(2), inputs, lengths=(5, 6, 6, 8, 6))


def test_sizes_that_are_known_late_leave_the_graph_whole(pool, lowered):
    class Counted(Model):
        def forward(self, x, caches):
            for layer, (keys, values) in zip(self.layers, caches, strict=True):
                x, *_ = layer(x, keys, values)
                h = self.layers[0].up(x).flatten()
                x = x + h[h > 0].sum() * 0.1
            return self.head(x)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        reports = check_calls(Counted(2), lambda n: (torch.randn(1, 1, 32), caches([n] * 2)))
    assert reports[-1].layers == [1]


def test_attention_whose_result_lies_otherwise(pool, monkeypatch):
    """What is compiled behind it is for the kernel that runs, not for the one that torch would have chosen."""

    def other(*args, **kwargs):
        return plain(*args, **kwargs).contiguous()

    plain, lower = F.scaled_dot_product_attention, sys.modules["fsvd_compile.passes.lower"]
    other.__module__ = lower.__name__
    monkeypatch.setattr(lower, "sdpa_of_any_length", other)
    model = Model(2)
    reports = check_calls(model, lambda n: (torch.randn(1, 3, 32), caches([n] * 2)))
    assert "pieces" in reports[-1].graphs


@pytest.mark.parametrize("name", DECODERS)
def test_decoders(pool, lowered, name):
    reports = check_decoder(name, SPELLINGS[name], dynamic, steps=7, batch=1)
    assert "pieces" in reports[-1].graphs and pool.captures
    assert max(reports[-1].layers) > 1


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_static_caches_of_windows_that_slide(pool, lowered, name):
    """How far such a cache is filled is an int, another one in every step; what does not read it is captured."""
    reports = check_decoder(name, SPELLINGS[name], static, steps=20, batch=1)
    assert reports[-1].graphs.startswith("1 of 2 pieces: elsewhere ")
    # The steps before and those after the window is full: a warm-up each, then replays.
    assert sorted(pool.captures.values()) == [1, 1] and sum(pool.replays.values()) == 18


def test_layers_within_what_is_captured_are_compiled_once(pool, lowered):
    """A number that only what lies in front of all layers reads: they are one graph, of layers that are alike."""

    class Branch(LowRankLinear):
        def forward(self, x):
            return x + torch.tanh(super().forward(torch.relu(x))).cumsum(-1).sin().softmax(-1)

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Branch(32, 32, 8) for _ in range(5))
            self.head = nn.Linear(32, 16)
            self.eval().requires_grad_(False)

        def forward(self, x, number):
            x = x + torch.arange(3).sum() * number
            for block in self.blocks:
                x = block(x)
            return self.head(x), number + 2

    model = Scaled()
    compiled = torch.compile(model, backend="flashsvd")
    with torch.no_grad(), collect() as reports:
        for number in range(3, 9):
            x = torch.randn(2, 32)
            (ours, theirs), (right, same) = compiled(x, number), model(x, number)
            assert_close("result", ours, right, 1e-5)
            assert theirs == same
    assert reports[-1].graphs.startswith("1 of 2 pieces: elsewhere ")
    assert reports[-1].layers == [1, 1, 5, 1]
    (name,) = [name for name in pool.captures if "layer" in name]
    assert pool.captures[name] == 1 and pool.replays[name] == 4


def test_through_inductor(pool):
    model = zoo.factorized("llama")
    prompt = torch.randint(1, 97, (2, 7))
    expected, tokens = run(model, prompt, 6, dynamic(model, 2))
    compiled = torch.compile(model, backend="flashsvd")
    with collect() as reports:
        actual, ours = run(compiled, prompt, 6, dynamic(model, 2))
    assert_close("logits", actual, expected, 1e-5)
    assert torch.equal(ours, tokens)
    assert "pieces" in reports[-1].graphs


def test_a_second_compilation_comes_from_the_caches_on_disk(pool):
    """With guards on symbols, also where a size that one piece computes from them is read by the others."""
    from torch._dynamo.utils import counters
    from torch._inductor.utils import fresh_cache

    class Sized(Model):
        def forward(self, x, caches):
            length = caches[0][0].shape[2] + 1
            x = x + torch.arange(length).sum() / length
            for layer, (keys, values) in zip(self.layers, caches, strict=True):
                x, keys, values = layer(x, keys, values)
                x = x + keys.reshape(4, length, 8).mean((0, 2)).sum()
            return self.head(x)

    model, steps = Sized(2), [5, 6, 7]

    def compiled_again():
        torch._dynamo.reset()
        counters.clear()
        compiled = torch.compile(model, backend="flashsvd")
        with torch.no_grad(), collect() as reports:
            for length in steps:
                x, given = torch.randn(1, 1, 32), caches([length] * 2)
                assert_close("result", compiled(x, given), model(x, given), 1e-5)
        assert "pieces" in reports[-1].graphs
        assert not counters["inductor"]["fxgraph_cache_bypass"]
        found = counters["inductor"]
        return found["fxgraph_cache_hit"], found["fxgraph_cache_miss"]

    with fresh_cache():
        _, missed = compiled_again()
        assert compiled_again() == (missed, 0)


class Switches:
    """torch's switches of attention kernels."""

    def __init__(self, monkeypatch, cudnn=True, flash=True, efficient=True):
        self.cudnn, self.seen = cudnn, []
        backends = torch.backends.cuda
        monkeypatch.setattr(backends, "cudnn_sdp_enabled", lambda: self.cudnn)
        monkeypatch.setattr(backends, "flash_sdp_enabled", lambda: flash)
        monkeypatch.setattr(backends, "mem_efficient_sdp_enabled", lambda: efficient)
        monkeypatch.setattr(backends, "enable_cudnn_sdp", lambda on: setattr(self, "cudnn", on))
        plain = F.scaled_dot_product_attention

        def attend(*args, **kwargs):
            self.seen.append(self.cudnn)
            return plain(*args, **kwargs)

        monkeypatch.setattr(F, "scaled_dot_product_attention", attend)


@pytest.mark.parametrize(
    ("given", "during"),
    [
        ({}, False),
        ({"flash": False}, False),
        ({"cudnn": False}, False),
        # Whoever allows cuDNN alone, or plain math beside it, gets it.
        ({"flash": False, "efficient": False}, True),
    ],
)
def test_attention_of_any_length_goes_without_cudnn(monkeypatch, given, during):
    switches = Switches(monkeypatch, **given)
    before = switches.cudnn
    q, k = torch.randn(1, 4, 1, 8), torch.randn(1, 4, 5, 8)
    assert_close(
        "attention", sdpa_of_any_length(q, k, k), attention_aten(q, k, k, None, 8**-0.5), 1e-6
    )
    assert switches.seen == [during, before] and switches.cudnn == before
    with pytest.raises(RuntimeError):
        sdpa_of_any_length(q, k[..., :7], k)
    assert switches.cudnn == before


def test_a_prompt_of_a_graph_of_any_length_goes_without_cudnn(monkeypatch):
    """`fsvd::attention` stays in a graph of symbolic sizes; of prompts it then is what the op calls."""
    switches = Switches(monkeypatch)
    q, k = torch.randn(1, 4, 70, 8), torch.randn(1, 4, 70, 8)
    attention._cuda(q, k, k, None, 8**-0.5)
    assert switches.seen == [False] and switches.cudnn
