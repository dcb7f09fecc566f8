"""What many tests need: the one error measure, and the pipeline run on a function's Dynamo graph without Inductor."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from fsvd_compile.passes import PIPELINE, Context, Outcome, lower, run
from fsvd_compile.passes.graph import drop_dead_code, val
from fsvd_compile.passes.vocabulary import kind_of


def rel_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference over that of `expected`, in fp64; NaN and inf never pass."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)} != {tuple(expected.shape)}"
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    if not torch.isfinite(actual).all():
        return float("inf")
    scale = expected.square().mean().sqrt().clamp_min(1e-30)
    return ((actual - expected).square().mean().sqrt() / scale).item()


def assert_close(name: str, actual: torch.Tensor, expected: torch.Tensor, limit: float) -> None:
    """`rel_rms` at most `limit`, with the name of what was compared in the message."""
    error = rel_rms(actual, expected)
    assert error <= limit, f"{name}: relative RMS error {error:.3e} > {limit:.1e}"


@dataclasses.dataclass
class Rewritten:
    """One Dynamo graph before and after the pipeline.

    Attributes:
        matches: Matches per rewrite that matched at all.
        misses: Reasons of refusals per rewrite.
        before: How often each operation occurs, by kind (`"linear"`), op (`"fsvd.shrink"`) or name.
        after: The same for what is left alive afterwards.
        graph: The rewritten graph.
        guards: How many shape guards the rewrites added.
        output: What the last call returned.
    """

    matches: dict[str, int]
    misses: dict[str, list[str]]
    before: Counter[str]
    after: Counter[str]
    graph: Graph
    guards: int = 0
    output: Any = None

    def only(self, *names: str) -> dict[str, int]:
        """Matches outside normalisation, or of the named rewrites."""
        kept = names or FUSIONS
        return {name: count for name, count in self.matches.items() if name in kept}

    def text(self) -> str:
        return dump(self.graph)


# The rewrites that make or change a fused op; the rest only changes spelling.
FUSIONS = (
    "lowrank_chain", "siblings", "gated_mlp", "activation", "norm_prologue", "residual", "rope_append", "attention",
    "decode_attention", "dense_siblings", "dense_linear", "carried_norm",
    "carried_first", "carried_last",
)  # fmt: skip


class Recorder:
    """A backend that runs the pipeline and then the graph itself; keeps a `Rewritten` per graph."""

    def __init__(
        self,
        device: str = "cpu",
        kernels: str = "auto",
        disable: tuple[str, ...] = (),
        lowered: bool = False,
        twice: bool = True,
    ):
        self.context = Context(device, kernels)
        self.rewrites = [r for r in PIPELINE if r.name not in disable]
        self.lowered, self.twice = lowered, twice
        self.graphs: list[Rewritten] = []

    def __call__(self, gm: GraphModule, example_inputs: list[Any]) -> Callable:
        graph = gm.graph
        placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        for node, given in zip(placeholders, example_inputs, strict=True):
            node.meta["stored"] = isinstance(given, nn.Parameter)  # as the backend marks them
        before = operations(graph)
        guards = _guards(graph)
        outcomes = run(self.rewrites, graph, self.context)
        if self.twice:
            again = matches(run(self.rewrites, graph, self.context))
            # A fused op may write its result in an order that makes a copy after it unnecessary.
            again.pop("contiguous", None)
            assert not again, f"a second run of the pipeline still matches {again}"
        if self.lowered:
            lower(graph, self.context)
            drop_dead_code(graph)
        graph.lint()
        gm.recompile()
        check_values(graph)
        misses = {o.name: [reason for _, reason in o.misses] for o in outcomes if o.misses}
        added = _guards(graph) - guards
        after = operations(graph)
        self.graphs.append(Rewritten(matches(outcomes), misses, before, after, graph, added))
        return gm.forward

    def compile(self, fn: Callable, **options: Any) -> Callable:
        torch._dynamo.reset()
        return torch.compile(fn, backend=self, fullgraph=True, **options)


def rewrite(
    fn: Callable,
    *args: Any,
    limit: float = 1e-5,
    device: str = "cpu",
    kernels: str = "auto",
    disable: tuple[str, ...] = (),
    lowered: bool = False,
    dynamic: bool | None = False,
    reference: Callable | None = None,
    **kwargs: Any,
) -> Rewritten:
    """Run a function eagerly and through the pipeline on equal inputs, and compare everything there is to see.

    Compared are the results, what was written into inputs, parameters and buffers, and which results share memory
    with each other or with inputs: a rewrite may remove such sharing but never add any.

    Args:
        fn: A module or function; a module is copied, as calls may write its buffers.
        *args: Inputs; copied.
        limit: On the relative RMS error.
        device: What the guards are told; the CPU implementations run in any case.
        kernels: As in `Config`.
        disable: Rewrites to leave out.
        lowered: Whether to lower the fused ops to ATen afterwards.
        dynamic: As in `torch.compile`.
        reference: What to compare with instead of `fn`, for instance the same in fp32.
        **kwargs: Keyword inputs.
    """
    recorder = Recorder(device, kernels, disable, lowered)
    eager, mine = _same(fn), _same(fn)
    with torch.no_grad():
        theirs = copy.deepcopy((args, kwargs))
        expected = (reference or eager)(*theirs[0], **theirs[1])
        ours = copy.deepcopy((args, kwargs))
        actual = recorder.compile(mine, dynamic=dynamic)(*ours[0], **ours[1])
    assert len(recorder.graphs) == 1, f"{len(recorder.graphs)} graphs"
    compare("output", actual, expected, limit)
    compare("input", ours, theirs, limit)
    if isinstance(fn, nn.Module) and reference is None:
        compare("module", mine.state_dict(), eager.state_dict(), limit)
    if reference is None:
        new = _sharing(actual, ours) - _sharing(expected, theirs)
        assert not new, f"results share memory that they do not share in eager: {sorted(new)}"
    result = recorder.graphs[0]
    result.output = actual
    return result


def _same(fn: Callable) -> Callable:
    return copy.deepcopy(fn) if isinstance(fn, nn.Module) else fn


def compare(name: str, actual: Any, expected: Any, limit: float) -> None:
    """Every tensor in two structures of the same form."""
    ours, theirs = list(tensors(actual, name)), list(tensors(expected, name))
    assert [n for n, _ in ours] == [n for n, _ in theirs]
    for (where, a), (_, b) in zip(ours, theirs, strict=True):
        if a.dtype.is_floating_point and b.numel() and not torch.equal(a, b):
            assert_close(where, a, b, limit)
        else:
            assert torch.equal(a, b), f"{where} differs"


def tensors(
    value: Any, name: str = "", seen: set[int] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in a structure of containers and plain objects, with its path."""
    seen = set() if seen is None else seen
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from tensors(item, f"{name}.{key}", seen)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from tensors(item, f"{name}[{i}]", seen)
    elif hasattr(value, "__dict__") and not callable(value) and id(value) not in seen:
        seen.add(id(value))
        yield from tensors(vars(value), name, seen)


def _sharing(results: Any, inputs: Any) -> set[tuple[str, str]]:
    """Pairs of a result and another result or input that share memory."""
    named = [(n, t.untyped_storage().data_ptr()) for n, t in tensors(results, "output")]
    others = [*named, *((n, t.untyped_storage().data_ptr()) for n, t in tensors(inputs, "input"))]
    return {(a, b) for i, (a, p) in enumerate(named) for b, q in others[i + 1 :] if p == q and p}


def matches(outcomes: list[Outcome]) -> dict[str, int]:
    return {o.name: o.matches for o in outcomes if o.matches}


def operations(graph: Graph) -> Counter[str]:
    calls = [n for n in graph.nodes if n.op in ("call_function", "call_method")]
    return Counter(operation(n) for n in calls)


def operation(node: Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target).removesuffix(".default")
    return kind_of(node) or getattr(node.target, "__name__", str(node.target))


def _guards(graph: Graph) -> int:
    for node in graph.nodes:
        if isinstance(val(node), FakeTensor):
            return len(val(node).fake_mode.shape_env.guards)
    return 0


def check_values(graph: Graph) -> None:
    """Interpret the graph on its fake inputs: every fake value must have the shape, strides and dtype that it says."""
    computed: dict[Node, Any] = {}
    memory: dict[int, int] = {}
    for node in graph.nodes:
        said = node.meta.get("example_value")
        if node.op == "placeholder":
            computed[node] = said
        elif node.op in ("call_function", "call_method") and _fakes(said):
            if not all(n in computed for n in node.all_input_nodes):
                continue
            args, kwargs = map_arg((node.args, node.kwargs), computed.__getitem__)
            with torch.no_grad(), _fakes(said)[0].fake_mode:
                fn = node.target if node.op == "call_function" else getattr(args[0], node.target)
                is_ = fn(*args, **kwargs) if node.op == "call_function" else fn(*args[1:], **kwargs)
            for made, told in zip(_fakes(is_), _fakes(said), strict=True):
                assert made.dtype == told.dtype, node
                assert str((made.shape, made.stride())) == str((told.shape, told.stride())), node
            computed[node] = is_
        elif said is not None and node.op != "output":
            computed[node] = said
        for made, told in zip(_fakes(computed.get(node)), _fakes(said), strict=False):
            key, own = made.untyped_storage()._cdata, told.untyped_storage()._cdata
            assert memory.setdefault(key, own) == own, (
                f"{node} says it has other memory than it has"
            )


def _fakes(value: Any) -> tuple[FakeTensor, ...]:
    """A fake tensor, or all of a tuple of them; nothing of anything else."""
    values = value if isinstance(value, tuple) else (value,)
    return values if all(isinstance(v, FakeTensor) for v in values) else ()


_DTYPES = {
    "torch.float32": "f32",
    "torch.bfloat16": "bf16",
    "torch.float16": "f16",
    "torch.int64": "i64",
}


def dump(graph: Graph, keep: Callable[[Node], bool] = lambda node: True) -> str:
    """The graph as text that depends on nothing but what it computes: one line a node, inputs by their path.

    Of nodes that are not kept only the operation is shown, where a kept one reads them.
    """
    names: dict[Node, str] = {}
    lines = []
    for node in graph.nodes:
        if node.op == "placeholder":
            names[node] = _input_name(node.name)
        elif node.op == "output":
            lines.append(f"return {_text(node.args[0], names)}")
        elif not keep(node):
            names[node] = f"<{operation(node)}>"
        else:
            names[node] = f"%{len(lines)}"
            args = [_text(a, names) for a in node.args]
            args += [f"{k}={_text(v, names)}" for k, v in sorted(node.kwargs.items())]
            value = val(node)
            kind = "" if value is None else f"  # {list(value.shape)} {_dtype(value)}"
            lines.append(f"{names[node]} = {operation(node)}({', '.join(args)}){kind}")
    return "\n".join(lines) + "\n"


def _dtype(value: torch.Tensor) -> str:
    return _DTYPES.get(str(value.dtype), str(value.dtype).removeprefix("torch."))


def _input_name(name: str) -> str:
    # Up to torch 2.13 "L_", then with the place of the model among the arguments.
    name = re.sub("^l_(args_0_)?", "", name).strip("_")
    name = re.sub(r"_?(modules|parameters|buffers)_", ".", name)
    return name.removeprefix("self").strip(".")


def _text(value: Any, names: dict[Node, str]) -> str:
    if isinstance(value, Node):
        return names[value]
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(_text(v, names) for v in value)}]"
    if isinstance(value, slice):
        parts = [value.start, value.stop, value.step]
        return ":".join(
            "" if p is None else _text(p, names) for p in (parts if value.step else parts[:2])
        )
    if isinstance(value, float):
        return f"{value:.6g}"
    return "..." if value is Ellipsis else repr(value)
