"""The backend: what happens between Dynamo's graph and the function it calls, read top-down."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import logging
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch._inductor import metrics
from torch._inductor.compile_fx import compile_fx
from torch.fx import GraphModule
from torch.fx.node import map_arg

from fsvd_compile import generate, kept_cache
from fsvd_compile.config import Config
from fsvd_compile.cuda_graph import GraphedCallable, GraphPool
from fsvd_compile.kernels import (
    attention_aten,
    decode_attention_aten,
    rms_operands,
    sdpa_of_any_length,
)
from fsvd_compile.kernels.ahead import compiling_ahead
from fsvd_compile.layers import Program, cut
from fsvd_compile.passes import PIPELINE, Context, lower, run, vmap
from fsvd_compile.passes.graph import is_input, is_static, storage, tokens, val, written_by
from fsvd_compile.passes.ops import Expand, ExpandRms, Shrink, ShrinkRms, name_of, read
from fsvd_compile.passes.vocabulary import arguments, kind_of
from fsvd_compile.phase import phase_of
from fsvd_compile.pieces import Piece, compile_piece, is_size
from fsvd_compile.report import GraphReport, forget_warnings, publish, warn_once

log = logging.getLogger(__name__)

_pool = GraphPool()
_numbers = itertools.count()


def flashsvd(
    gm: GraphModule,
    example_inputs: list[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable:
    """Compile one Dynamo graph; `torch.compile(model, backend="flashsvd")` calls this through its entry point.

    Args:
        gm: Dynamo's torch-level graph, parameters as inputs.
        example_inputs: The real inputs of the call being compiled.
        options: Fields of `Config`.
        mode: A `torch.compile` mode; see `config.MODES`.

    Returns:
        A callable of the graph's inputs.

    Raises:
        OptionError: an unknown option, value or mode.
    """
    started = time.perf_counter()
    config = Config.of(options, mode)
    report = GraphReport()
    report.unfused = _why_unfused(example_inputs) or _why_autocast(gm) or _why_transformed(gm)
    if report.unfused:
        warn_once(f"backend 'flashsvd': {report.unfused}.")
        compiled = _inductor(config)(gm, example_inputs)
    else:
        compiled = _fused(gm, example_inputs, config, report)
    report.seconds = time.perf_counter() - started
    publish(report)
    return compiled


def reset() -> None:
    """Free every captured CUDA graph and kept KV cache; `torch._dynamo.reset()` calls this."""
    _pool.reset()
    kept_cache.forget()
    forget_warnings()


flashsvd.reset = reset


def _fused(
    gm: GraphModule, example_inputs: list[Any], config: Config, report: GraphReport
) -> Callable:
    graph = gm.graph
    placeholders = (n for n in graph.nodes if n.op == "placeholder")
    for node, given in zip(placeholders, example_inputs, strict=True):
        node.meta["stored"] = _has_static_address(given)
    vmap.hide(graph)
    context = Context(_device(example_inputs), config.kernels)
    wanted = [r for r in PIPELINE if r.name not in config.disable]
    written = _written_inputs(gm)  # before lowering hides the schemas of ops
    report.outcomes = run(wanted, graph, context)
    _describe(graph, report)
    lower(graph, context)
    graph.eliminate_dead_code(is_impure_node=_has_effect)
    gm.recompile()
    return _compiled(gm, example_inputs, written, config, report)


def _compiled(
    gm: GraphModule,
    example_inputs: list[Any],
    written: set[int],
    config: Config,
    report: GraphReport,
) -> Callable:
    """The rewritten graph through Inductor, layer by layer where it can be cut, and under CUDA graphs."""
    compile_fn = _inductor(config)
    static = {i for i, x in enumerate(example_inputs) if _has_static_address(x)}
    off = _why_uncaptured(config, _device(example_inputs))
    dynamic = _dynamic(gm)
    # A number that is an input, as the tokens that a sliding window holds, is another one in every step.
    changing = dynamic or _changing(gm)
    pieces = cut(gm.graph, by_size=bool(changing) and off is None) if config.layers else []
    if len(pieces) < 2:
        report.layers = [1]
        with (
            _kernels_compiled(gm.graph.nodes, not (off or dynamic)),
            _counted(list(gm.graph.nodes), report),
        ):
            whole = compile_fn(gm, example_inputs)
        return _graphed(whole, "step", static, written, config, report, off or dynamic)

    some_fixed = any(piece.fixed for piece in pieces)
    elsewhere = off or (changing if some_fixed else dynamic)
    functions = _lowered(pieces, compile_fn, some_fixed or elsewhere is None, report)
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    output = next(n for n in gm.graph.nodes if n.op == "output")
    program = functools.partial(Program, placeholders, output.args[0], pieces)
    if config.cuda_graphs != "layer" and not some_fixed:
        whole = program(functions)
        return _graphed(whole, "step", static, written, config, report, elsewhere)
    index = {n: i for i, n in enumerate(placeholders)}
    results = output.all_input_nodes
    kept = {storage(n) for n in results} - {None}
    for i, piece in enumerate(pieces):
        ids = [index.get(n) for n in piece.inputs]
        fixed = {k for k, n in enumerate(piece.inputs) if n.op == "get_attr" or ids[k] in static}
        mutated = {k for k, p in enumerate(ids) if p in written}
        # What only later pieces read may lie in the graph's own memory; what the caller gets may not, nor what shares
        # its memory with that.
        inner = not any(n in results or storage(n) in kept for n in piece.outputs)
        reason = None if piece.fixed else elsewhere
        others = (n for k, n in enumerate(piece.inputs) if k not in mutated)
        if reason is None and piece.writes(others):  # a capture would write its copy
            reason = "a layer writes what another one has made"
        layer = functions[i], f"layer {i}", fixed, mutated, config, report, reason
        functions[i] = _graphed(*layer, borrow=inner, alone=False)
    captured = sum(isinstance(function, GraphedCallable) for function in functions)
    if some_fixed:
        report.graphs = f"{captured} of {len(pieces)} pieces: elsewhere {elsewhere}"
    return _one_at_a_time(program(functions)) if captured else program(functions)


def _one_at_a_time(program: Program) -> Callable:
    """Calls of a program whose pieces lend their results to one another, see `GraphPool`."""

    def call(*args: Any) -> Any:
        with _pool.lock:
            return program(*args)

    return call


def _lowered(
    pieces: list[Piece], compile_fn: Callable, captured: bool, report: GraphReport
) -> list[Callable]:
    """A function for each piece; pieces that are alike share one."""
    units = [unit for piece in pieces for unit in piece.units]
    signatures = [unit.signature() for unit in units]
    distinct = dict(zip(signatures, units, strict=True)).values()
    compiled: list[tuple[Piece, Callable]] = []
    alike: dict[tuple, list[int]] = {}
    chosen = []
    with _kernels_compiled((n for unit in distinct for n in unit.nodes), captured):
        for unit, signature in zip(units, signatures, strict=True):
            twins = alike.setdefault(signature, [])
            found = next((i for i in twins if compiled[i][0].serves(unit)), len(compiled))
            if found == len(compiled):
                with _counted(unit.nodes, report):
                    compiled.append((unit, compile_piece(unit, compile_fn)))
                twins.append(found)
            chosen.append(found)
    report.layers = [chosen.count(i) for i in range(len(compiled))]
    functions = iter([compiled[i][1] for i in chosen])
    return [
        Program(
            piece.inputs, tuple(piece.outputs), piece.parts, [next(functions) for _ in piece.parts]
        )
        if piece.parts
        else next(functions)
        for piece in pieces
    ]


def _why_uncaptured(config: Config, device: str) -> str | None:
    """Why nothing is captured, whatever the sizes are."""
    if config.cuda_graphs == "off":
        return "off"
    if not torch.cuda.is_available():
        return "off: no CUDA device"
    return None if device == "cuda" else f"off: the inputs are on {device}"


@contextlib.contextmanager
def _kernels_compiled(nodes: Iterable[torch.fx.Node], captured: bool) -> Iterator[None]:
    """Our kernels for these operations, where sizes are known, are compiled when the block ends."""
    with contextlib.ExitStack() as stack:
        try:
            ops = [n for n in nodes if name_of(n) and val(n.args[0]).device.type == "cuda"]
            calls = [
                (n.target, map_arg(n.args, lambda a: a.meta["example_value"]))
                for n in ops
                if all(is_static(a) for a in n.all_input_nodes)
            ]
            stack.enter_context(compiling_ahead(calls, captured))
        except Exception as error:  # time is lost, nothing else
            log.warning(
                "kernels were not compiled ahead (%s: %s); each is when it first runs",
                type(error).__name__,
                error,
            )
        yield


@contextlib.contextmanager
def _counted(nodes: list[torch.fx.Node], report: GraphReport) -> Iterator[None]:
    """Add to the report what one call of a piece launches."""
    before = metrics.generated_kernel_count
    yield
    library = [n for n in nodes if kind_of(n) in ("linear", "addmm", "matmul", "sdpa")]
    attentions = (attention_aten, decode_attention_aten, sdpa_of_any_length)
    library += [n for n in nodes if n.target in attentions]
    report.kernels.append(
        {
            "fsvd ops": sum(1 for n in nodes if name_of(n)),
            "library calls": len(library),
            "Inductor kernels": metrics.generated_kernel_count - before,
        }
    )


def _graphed(
    fn: Callable, name: str, static: set[int], written: set[int], config: Config, report: GraphReport,
    reason: str | None, borrow: bool = False, alone: bool = True,
) -> Callable:  # fmt: skip
    """`fn` under CUDA-graph replay unless there is a reason against it; `report.graphs` says which."""
    if reason is not None:
        report.graphs = reason if reason.startswith("off") else f"off: {reason}"
        if alone:
            log.info("flashsvd: a graph runs without CUDA-graph capture: %s", report.graphs)
        return fn
    report.graphs = config.cuda_graphs
    return GraphedCallable(
        fn,
        name=f"graph {next(_numbers)} {name}",
        static=frozenset(static - written),
        mutated=frozenset(written),
        pool=_pool,
        max_captures=config.max_captures,
        borrow_outputs=borrow,
        ahead=alone,
    )


def _inductor(config: Config) -> Callable:
    # Inductor's own CUDA graphs would copy what ours keep in place.
    patches = {**config.inductor, "triton.cudagraphs": False}
    # Its caches on disk know our ops by name only; what they make depends on how the ops lay out their results.
    tag = f"{torch.compiler.config.cache_key_tag} fsvd {_SOURCES}".strip()

    def compile_graph(gm: GraphModule, inputs: list[Any]) -> Callable:
        marked = {**_own_functions(gm), **torch._inductor.config.unsafe_marked_cacheable_functions}
        given = {"unsafe_marked_cacheable_functions": marked, **patches}
        with torch.compiler.config.patch(cache_key_tag=tag):
            return compile_fx(gm, inputs, config_patches=given)

    return compile_graph


def _own_functions(gm: GraphModule) -> dict[str, str]:
    """The functions that lowering has put into a graph: without state, and in the digest of the sources."""
    targets = {n.target for n in gm.graph.nodes if n.op == "call_function"}
    ours = [
        t for t in targets if (getattr(t, "__module__", None) or "").startswith("fsvd_compile.")
    ]
    names = (f"{t.__module__}.{t.__name__}" for t in ours if hasattr(t, "__name__"))
    return dict.fromkeys(sorted(names), "fsvd")


def _sources(root: Path) -> str:
    """A digest of this package's source; where there are no files to read (a zip), something new in each process."""
    files = sorted(root.rglob("*.py")) if root.is_dir() else []
    if not files:
        return uuid.uuid4().hex
    digest = hashlib.sha256()
    for file in files:
        digest.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return digest.hexdigest()


# At the import: what runs in this process is what was there then, whatever the files hold later.
_SOURCES = _sources(Path(__file__).parent)


def _why_unfused(example_inputs: list[Any]) -> str | None:
    if not torch.is_grad_enabled():
        return None
    if any(isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs):
        return (
            "gradients are needed (grad mode is on and an input requires grad), so this call runs unfused; "
            "for inference call under torch.no_grad() or after model.requires_grad_(False)"
        )
    return None


def _why_autocast(gm: GraphModule) -> str | None:
    entered = any(
        n.op == "call_function"
        and getattr(n.target, "__name__", "") == "_enter_autocast"
        and (n.args[2] if len(n.args) > 2 else n.kwargs.get("enabled", True))
        for n in gm.graph.nodes
    )
    if entered or torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"):
        return (
            "autocast is on, which chooses dtypes call by call, so this call runs unfused; "
            "convert the model instead: model.to(torch.bfloat16)"
        )
    return None


def _why_transformed(gm: GraphModule) -> str | None:
    if not vmap.can_be_hidden(gm.graph):
        return (
            "the model uses a transform of torch.func (vmap, grad, jvp), whose tensors stand for others, so this call "
            "runs unfused; write the batch dimension out, or compile the part without the transform"
        )
    return None


def _device(example_inputs: list[Any]) -> str:
    kinds = [x.device.type for x in example_inputs if isinstance(x, torch.Tensor)]
    return "cuda" if "cuda" in kinds else (kinds[0] if kinds else "cpu")


def _has_static_address(x: Any) -> bool:
    return isinstance(x, torch.nn.Parameter) or (
        isinstance(x, torch.Tensor) and getattr(x, "_dynamo_static_input_type", None) is not None
    )


def _written_inputs(gm: GraphModule) -> set[int]:
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    memory = {storage(target) for n in gm.graph.nodes for target in written_by(n)} - {None}
    return {i for i, n in enumerate(placeholders) if storage(n) in memory}


def _has_effect(node: torch.fx.Node) -> bool:
    if written_by(node) or node.is_impure():
        return True
    # A float that nobody reads was a constant of the model, which a rewrite has read; a size Dynamo asked for.
    read = is_size(node) or isinstance(node.meta.get("example_value"), torch.SymFloat)
    return val(node) is None and not read


def _dynamic(gm: GraphModule) -> str | None:
    symbolic = next((n for n in gm.graph.nodes if not is_static(n)), None)
    return None if symbolic is None else f"{symbolic.name} has a dynamic shape"


def _changing(gm: GraphModule) -> str | None:
    number = next(
        (n for n in gm.graph.nodes if n.op == "placeholder" and is_size(n) and n.users), None
    )
    return None if number is None else f"{number.name} is a number that changes"


def _describe(graph: torch.fx.Graph, report: GraphReport) -> None:
    ops = [n for n in graph.nodes if name_of(n) or kind_of(n) == "linear"]
    # The first: the head behind a prompt takes one token, however many the others take.
    first = next((n for n in ops if val(n) is not None), None)
    rows = None if first is None else tokens(first)
    report.tokens = rows
    report.phase = phase_of(rows).value if rows is not None else "any"
    report.linears = [n.name for n in graph.nodes if kind_of(n) == "linear"]
    report.weight_bytes = _weight_bytes(graph)


def _weight_bytes(graph: torch.fx.Graph) -> int:
    """Bytes of the weights that every call reads whole: operands of linears, shrinks, expands and norms."""
    read_once: dict[int | None, int] = {}
    for node in graph.nodes:
        for weight in _weights(node):
            while kind_of(weight) in ("t", "transpose"):
                weight = weight.args[0]
            value = val(weight)
            if value is not None and is_input(weight):
                read_once[storage(weight)] = value.numel() * value.element_size()
    return sum(read_once.values())


def _weights(node: torch.fx.Node) -> list[Any]:
    if (shrink := read(node, Shrink)) is not None:
        return [*shrink.weights, *shrink.biases, shrink.norm_weight, shrink.norm_bias]
    if (expand := read(node, Expand)) is not None:
        return [*expand.weights, *expand.biases]
    if (expand := read(node, ExpandRms)) is not None:
        return [expand.weight, expand.bias, expand.norm_weight]
    if (shrink := read(node, ShrinkRms)) is not None:
        return [*shrink.weights, *shrink.biases]
    if node.target is rms_operands:
        return [node.args[1]]
    if kind_of(node) in ("linear", "layer_norm", "rms_norm") and (given := arguments(node)):
        return [given["weight"], given.get("bias")]
    return []


def _is_ours(callback: Any) -> bool:
    from torch._dynamo.eval_frame import innermost_backend

    inner = innermost_backend(callback)
    return getattr(inner, "compiler_fn", inner) is flashsvd


generate.reach_compiled(_is_ours)
