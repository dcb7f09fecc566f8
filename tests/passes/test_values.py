"""Fake values of calls that look alike are computed once, where nothing but memory could differ."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fsvd_compile.passes.graph import set_value, val


class Calls:
    """Calls of one function in a graph of fake inputs, and how often it ran."""

    def __init__(self, function, mode=None):
        self.ran = 0
        self.mode = mode or FakeTensorMode(shape_env=ShapeEnv())
        self.graph = Graph()

        def counted(*args, **kwargs):
            self.ran += 1
            return function(*args, **kwargs)

        counted.__name__ = function.__name__
        self.function = counted

    def input(self, *size, dtype=torch.float32, stride=None):
        node = self.graph.placeholder(f"x{len(self.graph.nodes)}")
        with self.mode:
            value = torch.empty(size, dtype=dtype)
            node.meta["example_value"] = value if stride is None else value.as_strided(size, stride)
        return node

    def __call__(self, *args, **kwargs):
        node = self.graph.call_function(self.function, args, kwargs)
        set_value(node)
        return val(node)


def look(value):
    return value.shape, value.stride(), value.dtype, value.device


def test_calls_that_look_alike_run_once():
    calls = Calls(torch.nn.functional.linear)
    a = calls(calls.input(3, 4, dtype=torch.bfloat16), calls.input(7, 4, dtype=torch.bfloat16))
    b = calls(calls.input(3, 4, dtype=torch.bfloat16), calls.input(7, 4, dtype=torch.bfloat16))
    assert calls.ran == 1 and a.shape == (3, 7)
    assert look(a) == look(b) and a.fake_mode is b.fake_mode
    assert a.untyped_storage()._cdata != b.untyped_storage()._cdata


def test_what_looks_different_runs():
    calls = Calls(torch.add)
    x = calls.input(3, 4)
    expected = [
        calls(x, calls.input(3, 4)),
        calls(x, calls.input(4)),
        calls(x, calls.input(3, 4, dtype=torch.float64)),
        calls(x, calls.input(3, 4, stride=(1, 3))),
        *(calls(x, number) for number in (1, True, 1.0, 0.0, -0.0)),
        calls(x, 1, alpha=2),
    ]
    assert calls.ran == len(expected) == 10
    assert expected[2].dtype == torch.float64


def test_strides_of_the_result_are_kept():
    calls = Calls(torch.neg)
    x, y = (calls.input(3, 4, stride=(1, 3)) for _ in range(2))
    assert calls(x).stride() == calls(y).stride() == (1, 3)
    assert calls.ran == 1


@pytest.mark.parametrize("function", (torch.t, torch.ravel, torch.detach, torch.relu_))
def test_what_lies_in_an_arguments_memory_runs_every_time(function):
    calls = Calls(function)
    for _ in range(2):
        x = calls.input(3, 4)
        assert calls(x).untyped_storage()._cdata == val(x).untyped_storage()._cdata
    assert calls.ran == 2


def test_what_writes_runs_every_time():
    def fill_(x):
        x.fill_(1)
        return torch.empty_like(x)

    calls = Calls(fill_)
    for _ in range(2):
        calls(calls.input(3))
    assert calls.ran == 2


def test_named_results_run_every_time():
    calls = Calls(torch.topk)
    for _ in range(2):
        node = calls.graph.call_function(calls.function, (calls.input(8), 2))
        set_value(node)
        assert [v.shape for v in node.meta["example_value"]] == [(2,), (2,)]
    assert calls.ran == 2


def test_several_results_in_memory_of_their_own_run_once():
    calls = Calls(lambda x: (x * 2, x.t() + 1))
    for _ in range(2):
        calls(calls.input(3, 4))
    first, second = (n.meta["example_value"] for n in calls.graph.nodes if n.op == "call_function")
    assert calls.ran == 1 and type(second) is tuple
    assert [look(t) for t in first] == [look(t) for t in second]
    assert len({t.untyped_storage()._cdata for t in (*first, *second)}) == 4

    same = Calls(lambda x: (x * 2,) * 2)
    for _ in range(2):
        same(same.input(3, 4))
    assert same.ran == 2  # one memory, twice


def test_symbols_run_every_time():
    calls = Calls(torch.neg)
    symbolic = calls.mode.from_tensor(
        torch.empty(5, 4),
        symbolic_context=None,
        static_shapes=False,
        source=torch._dynamo.source.ConstantSource("x"),
    )
    for _ in range(2):
        node = calls.graph.placeholder("s")
        node.meta["example_value"] = symbolic
        assert not isinstance(calls(node).shape[0], int)
    assert calls.ran == 2


@pytest.mark.parametrize("kind", ("float", "bool"))
def test_numbers_that_are_symbols_are_not_asked_for(kind):
    """The hash of a SymFloat is that of its number, and guards it."""
    calls = Calls(torch.mul)
    env = calls.mode.shape_env
    source = torch._dynamo.source.ConstantSource("s")
    length = env.create_symintnode(env.create_symbol(7, source), hint=7, source=source)
    symbol = torch.sym_float(length) if kind == "float" else length > 3
    guards = len(env.guards)
    for _ in range(2):
        calls(calls.input(3), symbol)
    assert calls.ran == 2 and len(env.guards) == guards


def test_methods_and_what_lies_behind_an_offset():
    mode = FakeTensorMode(shape_env=ShapeEnv())
    calls = Calls(torch.neg, mode)
    for offset in (0, 0, 2):
        x = calls.graph.placeholder(f"y{len(calls.graph.nodes)}")
        with mode:
            x.meta["example_value"] = torch.empty(8)[offset : offset + 3]
        calls(x)
        node = calls.graph.call_method("neg", (x,))
        set_value(node)
        assert val(node).shape == (3,) and val(node).storage_offset() == 0
    assert calls.ran == 2


def test_a_compilation_of_its_own_starts_anew():
    calls = Calls(torch.neg)
    calls(calls.input(3))
    calls.mode = FakeTensorMode(shape_env=ShapeEnv())
    assert calls(calls.input(3)).fake_mode is calls.mode
    assert calls.ran == 2
