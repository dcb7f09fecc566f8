"""Cutting at layer borders: same-shaped layers are lowered once, different ones never share code."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path

import pytest
import torch
import zoo
from harness import assert_close
from torch import nn

from fsvd_compile import LowRankLinear, backend
from fsvd_compile.kernels import _stream
from fsvd_compile.layers import Program
from fsvd_compile.passes import Context
from fsvd_compile.report import collect


class Block(nn.Module):
    def __init__(self, rank: int, act: nn.Module):
        super().__init__()
        self.norm, self.act = nn.LayerNorm(32), act
        self.up, self.down = LowRankLinear(32, 64, rank), LowRankLinear(64, 32, rank)

    def forward(self, x):
        h = self.down(self.act(self.up(self.norm(x))))
        return x + h * torch.sigmoid(h).cumsum(-1).tanh()


class Stack(nn.Module):
    def __init__(self, *blocks: nn.Module):
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x.softmax(-1)


def compile_and_check(model, lowered, *shape):
    model = model.eval().requires_grad_(False)
    x = torch.randn(*shape)
    compiled = torch.compile(model, backend="flashsvd")
    with torch.no_grad(), collect() as reports:
        for _ in range(2):
            assert_close("stack", compiled(x), model(x), 1e-5)
    return reports[0]


def test_same_layers_are_lowered_once(lowered):
    report = compile_and_check(Stack(*(Block(6, nn.GELU()) for _ in range(5))), lowered, 3, 8)
    assert report.layers == [1, 5, 1]
    assert len(lowered) == 3


def check_lengths(model, lengths=(3, 7, 4)):
    model = model.eval().requires_grad_(False)
    compiled = torch.compile(model, backend="flashsvd", dynamic=True)
    with torch.no_grad(), collect() as reports:
        for length in lengths:
            x = torch.randn(2, length, 8)
            assert_close("stack", compiled(x), model(x), 1e-5)
    assert len(reports) == 1 and reports[0].phase == "any"
    return reports[0]


def test_layers_of_any_length_are_lowered_once(lowered):
    report = check_lengths(Stack(*(Block(6, nn.GELU()) for _ in range(5))))
    assert report.layers == [1, 5, 1]


class Twice(Stack):
    """Layers see twice the length, in no input of theirs by itself."""

    def forward(self, x):
        return super().forward(torch.cat([x, x + 1], 1))


def test_a_length_that_layers_see_only_in_an_expression(lowered):
    report = check_lengths(Twice(*(Block(6, nn.GELU()) for _ in range(5))))
    assert report.layers == [1, 5, 1]


def test_layers_that_use_the_length_itself(lowered):
    class Scaled(Block):
        def forward(self, x):
            return super().forward(x) / x.shape[1] + torch.arange(x.shape[1])[:, None]

    report = check_lengths(Stack(*(Scaled(6, nn.GELU()) for _ in range(4))))
    assert report.layers == [1, 4, 1]


def test_a_float_of_the_length_that_crosses_a_border_leaves_the_graph_whole(lowered):
    class Shrunk(Stack):
        def forward(self, x):
            factor = x.shape[1] ** -0.5
            x = self.embed(x)
            for block in self.blocks:
                x = block(x) * factor
            return x.softmax(-1)

    report = check_lengths(Shrunk(*(Block(6, nn.GELU()) for _ in range(4))))
    assert report.layers == [1]


def test_different_layers_do_not_share(lowered):
    blocks = [
        Block(6, nn.GELU()),
        Block(7, nn.GELU()),
        Block(6, nn.ReLU()),
        Block(6, nn.GELU()),
        Block(7, nn.GELU()),
    ]
    report = compile_and_check(Stack(*blocks), lowered, 3, 8)
    assert sorted(report.layers) == [1, 1, 1, 2, 2]


def test_layers_without_repetition_stay_one_graph(lowered):
    report = compile_and_check(Stack(Block(5, nn.GELU()), Block(6, nn.GELU())), lowered, 3, 8)
    assert report.layers == [1]
    assert len(lowered) == 1


def test_constants_differ_between_layers(lowered):
    class Scaled(Block):
        def __init__(self, scale: float):
            super().__init__(6, nn.GELU())
            self.scale = scale

        def forward(self, x):
            return super().forward(x) * self.scale

    report = compile_and_check(Stack(Scaled(1.0), Scaled(0.5), Scaled(1.0)), lowered, 3, 8)
    assert sorted(report.layers) == [1, 1, 1, 2] or sorted(report.layers) == [1, 1, 2, 1]


def test_off(lowered):
    model = Stack(*(Block(6, nn.GELU()) for _ in range(3))).eval().requires_grad_(False)
    x = torch.randn(3, 8)
    with torch.no_grad():
        actual = torch.compile(model, backend="flashsvd", options={"layers": False})(x)
    assert_close("whole", actual, model(x), 1e-5)
    assert len(lowered) == 1


def test_one_block_used_several_times(lowered):
    block = Block(6, nn.GELU())
    report = compile_and_check(Stack(block, block, block), lowered, 3, 8)
    assert sum(report.layers) >= 1


def test_buffers_and_caches_of_each_layer_are_its_own(lowered):
    class Counting(Block):
        def __init__(self):
            super().__init__(6, nn.GELU())
            self.register_buffer("seen", torch.zeros(3))

        def forward(self, x):
            self.seen.add_(x.mean(-1))
            return super().forward(x) + self.seen[:, None]

    torch.manual_seed(1)
    model = Stack(*(Counting() for _ in range(3))).eval().requires_grad_(False)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend="flashsvd")
    with torch.no_grad(), collect() as reports:
        for _ in range(4):
            x = torch.randn(3, 8)
            assert_close("counting", compiled(x), eager(x), 1e-5)
    for ours, theirs in zip(model.blocks, eager.blocks, strict=True):
        assert_close("seen", ours.seen, theirs.seen, 1e-5)
    assert 3 in reports[0].layers


def test_intermediates_are_freed(lowered):
    """A program keeps a value no longer than its last reader needs it."""
    from fsvd_compile.layers import Program

    model = zoo.factorized("llama")
    programs = []
    plain = Program.__init__

    def spy(self, *args):
        plain(self, *args)
        programs.append(self)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(Program, "__init__", spy)
        torch.compile(model, backend="flashsvd")(torch.randint(1, 97, (1, 5)), use_cache=False)
    (program,) = programs
    done = [slot for *_, slots in program.steps for slot in slots]
    assert done
    assert len(done) == len(set(done))


@pytest.mark.parametrize("kernels", ["ops", "aten"])
def test_a_second_compilation_comes_from_the_caches_on_disk(monkeypatch, kernels):
    """Nothing that a piece is made of keeps Inductor's and AOTAutograd's caches away; other sources of ours do."""
    from torch._dynamo.utils import counters
    from torch._inductor.utils import fresh_cache

    def compiled_again(**options):
        torch._dynamo.reset()
        counters.clear()
        with torch.no_grad(), collect() as reports:
            result = torch.compile(model, backend="flashsvd", options=options)(x)
        assert_close("stack", result, model(x), 1e-5)
        cached = (
            counters["inductor"]["fxgraph_cache_hit"],
            counters["inductor"]["fxgraph_cache_miss"],
        )
        assert not counters["inductor"]["fxgraph_cache_bypass"]
        return cached, counters["aot_autograd"]["autograd_cache_hit"], reports[0].kernels

    model = Stack(*(Block(6, nn.GELU()) for _ in range(3))).eval().requires_grad_(False)
    x = torch.randn(3, 8)
    with fresh_cache():
        cached, _, first = compiled_again(kernels=kernels)
        assert cached == (0, 3)
        cached, whole, again = compiled_again(kernels=kernels)
        assert cached == (3, 0) and whole == 3
        assert again == first  # what explain counts is the same
        monkeypatch.setattr(backend, "_SOURCES", "edited")
        assert compiled_again(kernels=kernels)[:2] == ((0, 3), 0)


def test_the_key_of_the_caches_is_of_the_sources_that_were_imported(tmp_path):
    file = tmp_path / "a.py"
    file.write_text("one")
    before = backend._sources(tmp_path)
    assert backend._sources(tmp_path) == before
    file.write_text("two")
    assert backend._sources(tmp_path) != before
    # No two processes share a cache where nothing can be read.
    assert backend._sources(tmp_path / "a.zip") != backend._sources(tmp_path / "a.zip")
    assert backend._sources(Path(backend.__file__).parent) == backend._SOURCES


class Normed(nn.Module):
    def __init__(self, features: int, rank: int):
        super().__init__()
        self.norm = nn.RMSNorm(features, 1e-6)
        self.chain = LowRankLinear(features, features, rank)

    def forward(self, x):
        return x + self.chain(self.norm(x))


@pytest.fixture
def carried(lowered, monkeypatch):
    """Norms are carried on a CPU, by torch ops."""
    monkeypatch.setattr(_stream, "usable", lambda x: x.element_size() == 2)
    monkeypatch.setattr(_stream, "LEAST_BYTES", 0)
    monkeypatch.setattr(backend, "Context", lambda *given: Context("cuda", "ops"))
    monkeypatch.setattr(backend, "_kernels_compiled", lambda *a: contextlib.nullcontext())


class Blocks(nn.Module):
    """Five layers of two branches; `head`: what comes behind them."""

    def __init__(self, head: nn.Module):
        super().__init__()
        blocks = [nn.Sequential(Normed(1024, 64), Normed(1024, 64)) for _ in range(5)]
        self.blocks, self.head = nn.ModuleList(blocks), head
        self.bfloat16().eval().requires_grad_(False)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize("cuda_graphs", ("step", "layer"))
@pytest.mark.parametrize(
    "tokens,head,matches",
    [
        (5, nn.Softmax(-1), [9, 1, 1]),
        (2, nn.Softmax(-1), [9, 1, 1]),
        # The last layer's own result is read by nobody then.
        (5, nn.Sequential(nn.RMSNorm(1024, 1e-6), nn.Linear(1024, 512, bias=False)), [10, 1, 0]),
        (2, nn.Sequential(nn.RMSNorm(1024, 1e-6), nn.Linear(1024, 512, bias=False)), [10, 1, 0]),
        (19, nn.Sequential(nn.RMSNorm(1024, 1e-6), nn.Linear(1024, 512, bias=False)), [9, 1, 1]),
        (5, "twofold", [9, 1, 1]),
    ],
    ids=("no head", "two tokens", "head", "head, two", "head of a library", "a norm read twice"),
)
def test_norms_that_layers_carry_for_each_other(carried, tokens, head, matches, cuda_graphs):
    """Sums of squares cross the borders, and all layers are alike."""
    model = Blocks(Twofold() if head == "twofold" else head)
    x = torch.randn(tokens, 1024).bfloat16()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    options = {"kernels": "ops", "cuda_graphs": cuda_graphs}
    compiled = torch.compile(model, backend="flashsvd", options=options)
    with torch.no_grad(), collect() as reports:
        for _ in range(2):
            assert_close("model", compiled(x), copy.deepcopy(model).float()(x.float()), 2e-2)
    found = [reports[0].matches.get(f"carried_{of}", 0) for of in ("norm", "first", "last")]
    assert found == matches
    assert reports[0].layers == [1, 5, 1]
    # Of the last twin's norm weight a second time nothing is new.
    assert reports[0].weight_bytes == weights


class Mapped(nn.Module):
    def forward(self, places):
        return torch.vmap(lambda row: row.sin().bfloat16())(places)


class MappedBlocks(Blocks):
    def forward(self, places):
        return super().forward(Mapped()(places))


@pytest.mark.parametrize("inside", (False, True))
def test_a_first_layer_behind_a_vmap(carried, inside):
    """What stands in for its norm is not put between the operations that stay together."""
    model = (Blocks if inside else MappedBlocks)(nn.Softmax(-1))
    places = torch.arange(5 * 1024).view(5, 1024)
    if inside:
        model.blocks[0].insert(0, Mapped())
    compiled = torch.compile(model, backend="flashsvd", options={"kernels": "ops"})
    with torch.no_grad(), collect() as reports:
        assert_close("model", compiled(places), model(places), 2e-2)
    assert reports[0].matches["carried_first"] == 1
    assert max(reports[0].layers) == 4 + (not inside)


class Twofold(nn.Module):
    """A head behind a norm that the model returns as well."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.RMSNorm(1024, 1e-6), nn.Linear(1024, 512, bias=False)

    def forward(self, x):
        x = self.norm(x)
        return torch.cat((self.head(x), x), -1)


class WithInner(nn.Module):
    """Returns what it computes, and a value on the way there."""

    def __init__(self):
        super().__init__()
        self.chain = LowRankLinear(64, 64, 8)

    def forward(self, x):
        h = torch.sin(self.chain(x))
        return torch.tanh(torch.cos(h) * 2 + x) - h, h


class Kept(nn.Module):
    """Values on the way are read behind some of its layers, or overwritten there."""

    def __init__(self, kept: tuple[int, ...], write: bool = False):
        super().__init__()
        self.blocks = nn.ModuleList(WithInner() for _ in range(4))
        self.kept, self.write = kept, write

    def forward(self, x):
        found = []
        for block in self.blocks:
            x, h = block(x)
            found.append(h)
        if self.write:
            found[0].mul_(3)
        return x, *(found[i] for i in self.kept)


@pytest.mark.parametrize("kept", ((), (0, 2), (3,), (0, 1, 2, 3)), ids=str)
@pytest.mark.parametrize("write", (False, True))
def test_a_layer_that_hands_out_less_is_no_other(lowered, kept, write):
    model, x = Kept(kept, write).eval().requires_grad_(False), torch.randn(3, 64)
    compiled = torch.compile(model, backend="flashsvd", options={"kernels": "ops"})
    with torch.no_grad(), collect() as reports:
        for _ in range(2):
            for actual, wanted in zip(compiled(x), model(x), strict=True):
                assert_close("model", actual, wanted, 1e-5)
    assert reports[0].layers == ([4, 1] if write and 0 in kept else [4])


def test_what_is_handed_out_for_nobody_is_freed(lowered):
    model, x = Kept((0,)).eval().requires_grad_(False), torch.randn(3, 64)
    programs = []

    def kept(*args):
        programs.append(Program(*args))
        return programs[-1]

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(backend, "Program", kept)
        torch.compile(model, backend="flashsvd", options={"kernels": "ops"})(x)
    ((_, _, first, freed), *others) = programs[0].steps
    assert len(first) == 2 and not set(first) & set(freed)  # the caller's, and the next layer's
    for _, _, writes, done in others[:-1]:
        assert len(set(writes) & set(done)) == 1


class Pooled(nn.Module):
    def __init__(self, pool):
        super().__init__()
        self.linear, self.pool = nn.Linear(16, 16), pool

    def forward(self, x):
        h = torch.tanh(self.pool(self.linear(x).view(2, 4, 4, 4), 3)).mean((2, 3))
        return torch.sin(self.linear(h.repeat(1, 4)))[:, None] + x


def test_functions_of_one_name_are_two():
    """`max_pool2d` and `adaptive_max_pool2d` are closures that one function made, and named."""
    pools = nn.functional.max_pool2d, nn.functional.adaptive_max_pool2d
    assert pools[0].__qualname__ == pools[1].__qualname__
    model, x = nn.Sequential(*map(Pooled, pools)).eval(), torch.randn(2, 4, 16)
    with torch.no_grad():
        compiled = torch.compile(model, backend="flashsvd")
        assert_close("model", compiled(x), model(x), 2e-6)


class Times(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x, n):
        return (torch.sin(self.linear(torch.tanh(self.linear(x)))) * 2 + 1) * n


class TimesNegative(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Times() for _ in range(2))

    def forward(self, x, z):
        n = z.conj().imag
        for layer in self.layers:
            x = layer(x, n)
        return x


def test_layers_that_read_a_negative_view():
    """Its memory holds the opposite of what it is."""
    model, x, z = TimesNegative(), torch.randn(3, 16), torch.randn(3, 16, dtype=torch.complex64)
    with torch.no_grad():
        compiled = torch.compile(model, backend="flashsvd")
        assert_close("model", compiled(x, z), model(x, z), 2e-6)
