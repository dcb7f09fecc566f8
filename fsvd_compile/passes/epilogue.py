"""What surrounds a low-rank pair moves into it: norms into the shrink, activations and residuals into the expand."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import Graph, Node

from fsvd_compile.passes.graph import is_number, number, read_ahead, same_shape, shape, val
from fsvd_compile.passes.ops import Expand, Shrink, emit_op, read
from fsvd_compile.passes.pattern import Call, Either, Is, Match, Maybe, Pattern, Var
from fsvd_compile.passes.rewrite import Context, Rewrite
from fsvd_compile.passes.vocabulary import arguments, kind_of

# kind of activation -> its name in an expand; gelu's depends on `approximate`
_ACTIVATIONS = ("silu", "gelu", "relu")


def activation_of(node: Node) -> str | None:
    kind = kind_of(node)
    if kind not in _ACTIVATIONS:
        return None
    given = arguments(node)
    if given is None:
        return None
    if kind == "gelu":
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(given["approximate"])
    return kind


def _find_gated(graph: Graph) -> Iterator[Match]:
    for node in list(graph.nodes):
        given = arguments(node) if kind_of(node) == "mul" else None
        if given is None:
            continue
        for act, up in ((given["input"], given["other"]), (given["other"], given["input"])):
            name = activation_of(act) if isinstance(act, Node) else None
            if name is None:
                continue
            gate = arguments(act)["input"]
            pair = _narrowed(up)
            if pair is not None and pair is _narrowed(gate) and read(pair, Expand):
                bound = {"pair": pair, "gate": gate, "up": up, "activation": f"{name}_mul"}
                # Of a larger group the guard tells; its other readers are no news.
                whole = len(read(pair, Expand).weights) == 2
                yield Match(node, bound, [act, gate, up, pair] if whole else [act, gate, up])
                break


def _narrowed(node: object) -> Node | None:
    given = arguments(node) if kind_of(node) == "narrow" else None
    return given["input"] if given is not None else None


def _gated_guard(match: Match, context: Context) -> str | None:
    """Saves writing gate and up and reading them back: 4·out bytes a token in bf16, and one kernel."""
    pair = read(match["pair"], Expand)
    if len(pair.weights) != 2:
        return f"the expand has {len(pair.weights)} blocks, not gate and up alone"
    if pair.residual is not None or pair.activation != "none":
        return "the expand has an epilogue already"
    width, other = (shape(w)[0] for w in pair.weights)
    parts = [arguments(match[name]) for name in ("gate", "up")]
    halves = sorted((p["dim"], p["start"], p["length"]) for p in parts)
    if width != other or halves != [(-1, 0, width), (-1, width, width)]:
        return "gate and up are not the two halves"
    return None


def _replace_gated(match: Match, graph: Graph) -> Node:
    pair = read(match["pair"], Expand)
    order = (0, 1) if arguments(match["gate"])["start"] == 0 else (1, 0)
    pick = lambda values: [values[i] for i in order]  # noqa: E731
    fused = pair._replace(
        weights=pick(pair.weights),
        biases=pick(pair.biases),
        offsets=pick(pair.offsets),
        activation=match["activation"],
    )
    return emit_op(graph, match.root, match.root, fused)


def _find_activation(graph: Graph) -> Iterator[Match]:
    for node in list(graph.nodes):
        name = activation_of(node)
        source = arguments(node)["input"] if name else None
        if name and read(source, Expand):
            yield Match(node, {"expand": source, "activation": name}, [source])


def _activation_guard(match: Match, context: Context) -> str | None:
    """Saves one pass over the result."""
    expand = read(match["expand"], Expand)
    if expand.residual is not None or expand.activation != "none":
        return "the expand has an epilogue already"
    return None


def _replace_activation(match: Match, graph: Graph) -> Node:
    expand = read(match["expand"], Expand)._replace(activation=match["activation"])
    return emit_op(graph, match.root, match.root, expand)


_LAST = Either(Is(-1), Is([-1]), Is((-1,)))
_X = Var("x32")
_SQUARE = Either(
    Call("pow", input=_X, exponent=Is(2)), Call("square", input=_X), Call("mul", input=_X, other=_X)
)
_RSTD = Call(
    "rsqrt",
    input=Call(
        "add",
        input=Call("mean", input=_SQUARE, dim=_LAST, keepdim=Var("keepdim", lambda v: v is True)),
        other=Var("eps", is_number),
    ),
)
_UNIT = Maybe("cast", Call("mul", input=_X, other=_RSTD))
_WEIGHT = Maybe("cast", Var("weight", lambda v: len(shape(v)) == 1))
_OFFSET_WEIGHT = Call("add", input=Var("offset", is_number), other=_WEIGHT)
# Zhang & Sennrich, arXiv 1910.07467, eq. 4, in the spellings of Llama (w · x̂) and Gemma (x̂ · (1 + w)).
_RMS: Pattern = Maybe("cast", Call("mul", input=_UNIT, other=Either(_OFFSET_WEIGHT, _WEIGHT)))


def _norm_match(node: Node) -> Match | None:
    """The norm whose result `node` is, with x, weight, bias, eps, offset and which norm it is."""
    if kind_of(node) == "layer_norm" or kind_of(node) == "rms_norm":
        given = arguments(node)
        if given is None or not same_shape(_sizes(given["normalized_shape"]), shape(node)[-1:]):
            return None
        is_layer = kind_of(node) == "layer_norm"
        if not is_layer and given["eps"] is None:
            return None
        bound = {"x": given["input"], "weight": given["weight"], "eps": given["eps"], "offset": 0.0}
        bound |= {
            "bias": given["bias"] if is_layer else None,
            "norm": "layer" if is_layer else "rms",
        }
        return Match(node, bound, [node])
    found = Match(node)
    if not _RMS.match(node, found):
        return None
    source = found["x32"]
    if kind_of(source) == "cast":
        found.interior.append(source)
        source = arguments(source)["input"]
    found.bound |= {"x": source, "norm": "rms", "bias": None, "offset": found.get("offset", 0.0)}
    if val(found["weight"]) is None or not same_shape(shape(found["weight"]), shape(source)[-1:]):
        return None
    return found


def _sizes(value: object) -> tuple:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _find_norm(graph: Graph) -> Iterator[Match]:
    for node in list(graph.nodes):
        shrink = read(node, Shrink)
        if shrink is None or shrink.norm != "none":
            continue
        norm = _norm_match(shrink.x)
        if norm is not None:
            yield Match(node, norm.bound, list(dict.fromkeys(norm.interior)))


def _norm_guard(match: Match, context: Context) -> str | None:
    """Saves writing and reading the normalised input and one kernel; each program of a decode shrink computes
    the statistic itself, K reads from L2. In the prefill phase the op is lowered to a norm and GEMMs again."""
    if not same_shape(shape(match["x"]), shape(match.root.args[0])):
        return "the norm changes the shape"
    if not (is_number(match["eps"]) and is_number(match["offset"])):
        return "the norm's epsilon or offset is computed"
    x = val(match["x"])
    if x.dtype != val(match.root).dtype or x.device != val(match.root).device:
        return f"the norm casts {x.dtype} to {val(match.root).dtype}"
    for node in match.interior:
        if torch.promote_types(x.dtype, val(node).dtype) != val(node).dtype:
            return f"the norm rounds {x.dtype} to {val(node).dtype} at {node.name}"
    if context.device == "cuda":
        return read_ahead(match.memory, match["weight"], match["bias"])
    return None


def _replace_norm(match: Match, graph: Graph) -> Node:
    shrink = read(match.root, Shrink)._replace(
        x=match["x"],
        norm=match["norm"],
        norm_weight=match["weight"],
        norm_bias=match["bias"],
        norm_eps=number(match["eps"]),
        norm_offset=number(match["offset"]),
    )
    return emit_op(graph, match.root, match.root, shrink)


def _find_residual(graph: Graph) -> Iterator[Match]:
    for node in list(graph.nodes):
        given = arguments(node) if kind_of(node) == "add" else None
        if given is None or given["alpha"] != 1:
            continue
        orders = ((given["other"], given["input"]), (given["input"], given["other"]))
        branches = [
            (v, o) for v, o in orders if _is_branch(v) and isinstance(o, Node) and v is not o
        ]
        branches.sort(key=lambda pair: len(pair[0].users))
        if branches:
            value, other = branches[0]
            yield Match(node, {"expand": value, "residual": other}, [value])


def _is_branch(node: object) -> bool:
    """An expand that is added to the stream; one that has a residual and several readers is the stream."""
    expand = read(node, Expand)
    return expand is not None and (expand.residual is None or len(node.users) == 1)


def _residual_guard(match: Match, context: Context) -> str | None:
    """Saves writing and reading the branch once, and one kernel."""
    expand, residual = read(match["expand"], Expand), match["residual"]
    if expand.residual is not None:
        return "the expand has a residual already"
    if expand.activation != "none":
        return f"the expand ends in {expand.activation}: the sum belongs to the next layer"
    if val(residual) is None or not same_shape(shape(residual), shape(match["expand"])):
        return f"the residual is broadcast: {shape(residual)} + {shape(match['expand'])}"
    if val(residual).dtype != val(match["expand"]).dtype:
        return f"the residual is {val(residual).dtype}, the branch {val(match['expand']).dtype}"
    return None


def _replace_residual(match: Match, graph: Graph) -> Node:
    expand = read(match["expand"], Expand)._replace(residual=match["residual"])
    return emit_op(graph, match.root, match.root, expand)


EPILOGUE: tuple[Rewrite, ...] = (
    Rewrite(
        "gated_mlp",
        "act(gate) · up of one packed expand (SiLU, GELU, tanh GELU, ReLU) -> its epilogue",
        _find_gated,
        _replace_gated,
        _gated_guard,
    ),
    Rewrite(
        "activation",
        "act(expand) -> the expand's epilogue",
        _find_activation,
        _replace_activation,
        _activation_guard,
    ),
    Rewrite(
        "norm_prologue",
        "shrink(RMSNorm(x)) or shrink(LayerNorm(x)) -> a shrink that normalises as it reads",
        _find_norm,
        _replace_norm,
        _norm_guard,
    ),
    Rewrite(
        "residual",
        "x + expand -> the expand's epilogue",
        _find_residual,
        _replace_residual,
        _residual_guard,
    ),
)
