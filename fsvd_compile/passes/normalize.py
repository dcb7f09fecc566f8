"""One spelling per idea, so that the patterns after this stay few; every rewrite is exact or as exact as its source."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from fsvd_compile.passes.counters import COUNTERS
from fsvd_compile.passes.graph import (
    emit,
    is_input,
    is_number,
    is_static,
    is_transpose,
    same_shape,
    same_size,
    shape,
    storage,
    transposed,
    val,
)
from fsvd_compile.passes.pattern import Call, Is, Match, Var
from fsvd_compile.passes.rewrite import Context, Rewrite, replace_argument
from fsvd_compile.passes.vocabulary import IN_PLACE, arguments, kind_of


def _find_in_place(graph: Graph) -> Iterator[Match]:
    for node in list(graph.nodes):
        if node.op not in ("call_function", "call_method") or node.target not in IN_PLACE:
            continue
        if not node.args or not isinstance(node.args[0], Node):
            continue
        target = node.args[0]
        key = storage(target)
        if key is None or is_input(target) or storage(node) != key:
            continue
        if any(is_input(n) for n in _aliases(graph, key)):
            continue
        if any(user > node for alias in _other_aliases(graph, node) for user in alias.users):
            continue
        yield Match(node, {"target": target, "other": node.args[1] if len(node.args) > 1 else None})


def _aliases(graph: Graph, key: int) -> list[Node]:
    return [n for n in graph.nodes if storage(n) == key]


def _other_aliases(graph: Graph, node: Node) -> list[Node]:
    """Values through which the memory that `node` writes can be seen, beside its target and itself."""
    target = node.args[0]
    seen = {target, node}
    others = []
    for alias in _aliases(graph, storage(target)):
        if alias in seen:
            continue
        # A later view of the target will be one of the new value.
        if alias > node and any(source in seen for source in alias.all_input_nodes):
            seen.add(alias)
        else:
            others += [alias, *(n for n in alias.all_input_nodes if val(n) is None)]
    return others


def _in_place_guard(match: Match, context: Context) -> str | None:
    """An in-place operation keeps shape and dtype of its target; the out-of-place one must give the same."""
    target, other = match["target"], match["other"]
    if match.root.kwargs or len(match.root.args) > 2:
        return f"{match.root.name} has arguments beyond the two operands"
    if val(other) is not None and val(other).dtype != val(target).dtype:
        return f"{match.root.name} adds {val(other).dtype} into {val(target).dtype}"
    operands = [n.meta["example_value"] if isinstance(n, Node) else n for n in match.root.args]
    with torch.no_grad():
        result = IN_PLACE[match.root.target](*operands)
    if not same_shape(result.stride(), val(target).stride()):
        return f"{target.name} has a layout that an out-of-place result would not have"
    return None


def _replace_in_place(match: Match, graph: Graph) -> Node:
    node, target = match.root, match["target"]
    operands = (target,) if match["other"] is None else (target, match["other"])
    value = emit(graph, node, node, IN_PLACE[node.target], *operands)
    for user in list(target.users):
        if user > node:
            replace_argument(user, target, value)
    return value


def _noop_cast(match: Match, context: Context) -> str | None:
    """Free: `.to()` of what it is already returns its argument."""
    if val(match["x"]) is None or val(match.root) is None:
        return "not a tensor"
    same = (
        storage(match["x"]) == storage(match.root)
        and val(match["x"]).dtype == val(match.root).dtype
    )
    return None if same else "is a copy"


def _contiguous_already(match: Match, context: Context) -> str | None:
    """Free: `.contiguous()` of a contiguous tensor returns its argument."""
    if val(match["x"]) is None or not is_static(match["x"]):
        return "dynamic shape"
    return None if val(match["x"]).is_contiguous() else "is a copy"


def _takes_all(match: Match, context: Context) -> str | None:
    """Free: `x[:, 0:]` is a view of everything. Language models slice like that in front of the head."""
    x, root = match["x"], match.root
    if val(x) is None or val(root) is None or storage(x) != storage(root):
        return "is a copy"
    same = same_shape(shape(x), shape(root)) and same_shape(val(x).stride(), val(root).stride())
    start = same_size(val(x).storage_offset(), val(root).storage_offset())
    return None if same and start else "takes a part"


def _evaluates(match: Match, context: Context) -> str | None:
    """Free when dropout does nothing."""
    arguments_ = arguments(match.root)
    active = arguments_["training"] is not False and arguments_["p"] != 0
    return "dropout is active (training mode)" if active else None


def _find_reshape(graph: Graph) -> Iterator[Match]:
    for node in list(graph.nodes):
        if kind_of(node) != "reshape" or node._erased or not _keeps_dtype(node):
            continue
        source, passed = node.all_input_nodes[0], []
        # A reshape that copied is where its source was read: what views the copy cannot view the source.
        while kind_of(source) == "reshape" and _is_view(source) and _keeps_dtype(source):
            passed.append(source)
            source = source.all_input_nodes[0]
        spelled = node.target is torch.reshape and not passed and not node.kwargs
        back = same_shape(shape(node), shape(source)) and _is_view(node)
        # Only matched to be made shorter or spelled alike; static shapes can always be written out.
        if back or (is_static(node) and not spelled) or (node.target == "view" and not node.kwargs):
            yield Match(node, {"source": source, "back": back})


def _is_view(node: Node) -> bool:
    return storage(node) is not None and storage(node) == storage(node.all_input_nodes[0])


def _keeps_dtype(node: Node) -> bool:
    """Not so `view(dtype)`, which reinterprets bits."""
    before, after = val(node.all_input_nodes[0]), val(node)
    return before is not None and after is not None and before.dtype == after.dtype


def _replace_reshape(match: Match, graph: Graph) -> Node:
    if match["back"]:
        return match["source"]
    if not is_static(match.root):
        # `view` asserts a layout that a later rewrite may change; `reshape` does not.
        with graph.inserting_before(match.root):
            value = graph.call_method("reshape", match.root.args, match.root.kwargs)
        value.meta = dict(match.root.meta)
        return value
    return emit(graph, match.root, match.root, torch.reshape, match["source"], shape(match.root))


def _find_scaled_sum(graph: Graph) -> Iterator[Match]:
    for node in list(graph.nodes):
        given = arguments(node) if kind_of(node) == "add" else None
        if node.target == "add_" and len(node.args) == 2 and node.kwargs.keys() == {"alpha"}:
            given = {"input": node.args[0], "other": node.args[1], **node.kwargs}
        if given is not None and is_number(given["alpha"]) and given["alpha"] != 1:
            yield Match(node, {"x": given["input"], "y": given["other"], "a": given["alpha"]})


def _scaled_sum_guard(match: Match, context: Context) -> str | None:
    """Costs nothing, the two are one loop. Inductor of torch 2.13 drops the factor where y is a matrix product."""
    y = match["y"]
    if not isinstance(y, Node) or val(y) is None or not val(y).is_floating_point():
        return "what is multiplied is no floating-point tensor"
    if val(y).dtype != val(match.root).dtype:
        return f"what is multiplied is {val(y).dtype} and the sum {val(match.root).dtype}"
    return None


def _replace_scaled_sum(match: Match, graph: Graph) -> Node:
    root = match.root
    scaled = emit(graph, root, root, torch.mul, match["y"], match["a"])
    if root.target != "add_":
        return emit(graph, root, root, torch.add, match["x"], scaled)
    with graph.inserting_before(root):
        value = graph.call_method("add_", (match["x"], scaled))
    value.meta = dict(root.meta)
    return value


def _addmm_guard(match: Match, context: Context) -> str | None:
    """Free; only a bias that `linear` would broadcast the same way."""
    given = arguments(match.root)
    if given["beta"] != 1 or given["alpha"] != 1:
        return f"beta={given['beta']}, alpha={given['alpha']}"
    if not same_shape(shape(match["b"]), shape(match["w"])[1:]):
        return f"bias of shape {shape(match['b'])} is broadcast along rows"
    return None


def _replace_addmm(match: Match, graph: Graph) -> Node:
    weight = transposed(graph, match["w"], match.root)
    return emit(graph, match.root, match.root, F.linear, match["x"], weight, match["b"])


def _matmul_guard(match: Match, context: Context) -> str | None:
    """Free; only where the right factor is a weight: an input, its transpose, or a product of inputs."""
    if len(shape(match["w"])) != 2:
        return f"the right factor has {len(shape(match['w']))} dimensions"
    return None if _is_weight(match["w"]) else "the right factor is an activation"


def _is_weight(node: Node) -> bool:
    if is_input(node):
        return len(shape(node)) == 2
    if kind_of(node) not in ("linear", "matmul") and not is_transpose(node):
        return False
    return len(shape(node)) == 2 and all(_is_weight(n) for n in node.all_input_nodes)


def _replace_matmul(match: Match, graph: Graph) -> Node:
    weight = transposed(graph, match["w"], match.root)
    return emit(graph, match.root, match.root, F.linear, match["x"], weight, None)


def _outer_guard(match: Match, context: Context) -> str | None:
    """Saves a kernel or two: one product an element can be fused with what surrounds it, a matrix product cannot.

    RoPE's table is such a product, of frequencies and positions. Equal but for the sign of zeros.
    """
    x, y, product = val(match["x"]), val(match["y"]), val(match.root)
    if min(x.dim(), y.dim()) < 2 or not same_size(x.shape[-1], 1):
        return "sums over more than one product"
    if not product.dtype.is_floating_point:
        return f"a product of {product.dtype}"
    with torch.no_grad():
        strides = torch.mul(x, y).stride()
    # A matrix product is contiguous, this one lies as its factors do.
    if not all(
        same_size(n, 1) or same_size(a, b)
        for n, a, b in zip(product.shape, strides, product.stride(), strict=True)
    ):
        return "the factors are transposed"
    return None


def _replace_outer(match: Match, graph: Graph) -> Node:
    return emit(graph, match.root, match.root, torch.mul, match["x"], match["y"])


def _bias_guard(match: Match, context: Context) -> str | None:
    """Saves an elementwise pass; only a vector that is added to every row alike."""
    bias, weight = match["b"], match["w"]
    if (
        len(shape(weight)) != 2
        or not is_input(bias)
        or not same_shape(shape(bias), shape(weight)[:1])
    ):
        return f"adds a value of shape {shape(bias)}, not a bias of shape {shape(weight)[:1]}"
    if val(bias).dtype != val(weight).dtype:
        return f"bias is {val(bias).dtype}, weight {val(weight).dtype}"
    return None


def _replace_bias(match: Match, graph: Graph) -> Node:
    return emit(graph, match.root, match.root, F.linear, match["x"], match["w"], match["b"])


def _rows_guard(match: Match, context: Context) -> str | None:
    """Free; a linear layer does not care how its rows are arranged, as long as each row stays whole."""
    inner, source = shape(match["rows"]), shape(match["x"])
    if not source or not inner or not same_size(inner[-1], source[-1]):
        return "the reshape before it splits or merges the features"
    if len(shape(match["w"])) != 2:
        return f"the weight has {len(shape(match['w']))} dimensions"
    if match["b"] is not None and len(shape(match["b"])) > 1:
        return f"bias of shape {shape(match['b'])} is broadcast along rows"
    if not _keeps_dtype(match["rows"]):
        return "the view before it reinterprets bits"
    back = (*source[:-1], *shape(match.root)[-1:])
    restored = [kind_of(u) == "reshape" and same_shape(shape(u), back) for u in match.root.users]
    if not is_static(match.root) and not (restored and all(restored)):
        return "dynamic shape that is not restored afterwards"
    return None


def _replace_rows(match: Match, graph: Graph) -> Node | None:
    root = match.root
    whole = emit(graph, root, root, F.linear, match["x"], match["w"], match["b"])
    for user in list(root.users):
        if (
            kind_of(user) == "reshape"
            and same_shape(shape(user), shape(whole))
            and _keeps_dtype(user)
        ):
            user.replace_all_uses_with(whole)
            graph.erase_node(user)
    return emit(graph, root, root, torch.reshape, whole, shape(root)) if is_static(root) else None


def _find_restored_rows(graph: Graph) -> Iterator[Match]:
    for node in list(graph.nodes):
        source = node.all_input_nodes[0] if kind_of(node) == "reshape" else None
        linears: list[Node] = []
        while kind_of(source) == "linear" and (given := arguments(source)) is not None:
            linears.append(source)
            source = given["input"]
        if linears and kind_of(source) == "reshape":
            yield Match(node, {"heads": source, "linears": linears}, [*linears, source])


def _restored_rows_guard(match: Match, context: Context) -> str | None:
    """Free; rows arranged before the linears as they are after them leave nothing between them and their
    reader. Where that is how they came, no reshape is left; where the first merges features (heads), one."""
    root, heads, linears = match.root, match["heads"], match["linears"]
    if not _keeps_dtype(root) or not _keeps_dtype(heads):
        return "the view reinterprets bits"
    if not same_shape(shape(root)[-1:], shape(linears[0])[-1:]):
        return "rearranges more than rows"
    for given in map(arguments, linears):
        if len(shape(given["weight"])) != 2 or len(shape(given["bias"])) > 1:
            return "a weight or bias that is broadcast along rows"
    if _as_they_came(match):
        return None
    if not is_static(root):
        return "dynamic shape that is not restored afterwards"
    if same_shape(shape(heads)[-1:], shape(heads.all_input_nodes[0])[-1:]):
        return "the reshape before it can move below"
    return None


def _as_they_came(match: Match) -> bool:
    root, heads = match.root, match["heads"]
    wanted = (*shape(root)[:-1], *shape(heads)[-1:])
    return same_shape(shape(heads.all_input_nodes[0]), wanted)


def _replace_restored_rows(match: Match, graph: Graph) -> Node:
    root, heads = match.root, match["heads"]
    value = heads.all_input_nodes[0]
    if not _as_they_came(match):
        value = value if len(heads.users) == 1 else heads
        value = emit(graph, root, root, torch.reshape, value, (*shape(root)[:-1], shape(heads)[-1]))
    for given in map(arguments, reversed(match["linears"])):
        value = emit(graph, root, root, F.linear, value, given["weight"], given["bias"])
    return value


def _find_weight_product(graph: Graph) -> Iterator[Match]:
    for node in list(graph.nodes):
        given = arguments(node) if kind_of(node) == "linear" else None
        if given is None:
            continue
        # `F.linear(x, u @ v)` is x (U V)ᵀ with V in the middle; `x @ (u @ v)` is x U V.
        flipped = is_transpose(given["weight"])
        made = given["weight"].all_input_nodes[0] if flipped else given["weight"]
        product = arguments(made) if kind_of(made) == "linear" else None
        if product is None or product["bias"] is not None:
            continue
        if all(_is_weight(product[k]) for k in ("input", "weight")):
            bound = {"x": given["input"], "b": given["bias"], "flipped": flipped}
            bound |= {"left": product["input"], "right": product["weight"]}
            yield Match(node, bound, [made, given["weight"]] if flipped else [made])


def _product_guard(match: Match, context: Context) -> str | None:
    """`x @ (U V)ᵀ` costs r·in·out operations to build the product and in·out weights to read it back;
    `(x Vᵀ) Uᵀ` costs r·(in + out) a token. Better below break-even rank unless tokens outnumber both."""
    if not is_static(match["left"]) or not is_static(match["right"]):
        return "a factor has a symbolic shape"
    (a, rank), (b, _) = shape(match["left"]), shape(match["right"])
    if rank * (a + b) >= a * b:
        return f"rank {rank} is not below break-even for {a} x {b}"
    return None


def _replace_product(match: Match, graph: Graph) -> Node:
    # The product is left @ rightᵀ, [a, b]; as a linear's weight it maps b to a, flipped a to b.
    root = match.root
    first, last = (
        (match["left"], match["right"]) if match["flipped"] else (match["right"], match["left"])
    )
    latent = emit(graph, root, root, F.linear, match["x"], transposed(graph, first, root), None)
    return emit(graph, root, root, F.linear, latent, last, match["b"])


def _floating(match: Match, context: Context) -> str | None:
    """Saves the passes over memory between the parts; integers promote in the parts but not in the whole."""
    value = val(match["x"])
    ok = value is not None and value.dtype.is_floating_point
    return (
        None
        if ok and value.dtype == val(match.root).dtype
        else f"{match['x']} is no floating tensor"
    )


def _replace_silu(match: Match, graph: Graph) -> Node:
    return emit(graph, match.root, match.root, F.silu, match["x"])


def _replace_gelu(match: Match, graph: Graph) -> Node:
    with graph.inserting_before(match.root):
        value = graph.call_function(F.gelu, (match["x"],), {"approximate": "tanh"})
    value.meta = dict(match.root.meta)
    return value


def _source(match: Match, graph: Graph) -> Node:
    return match["x"]


# GPT-2's gelu, Hendrycks & Gimpel (arXiv 1606.08415) section 2: 0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))).
_X = Var("x")
_CUBE = Call("mul", input=Is(0.044715), other=Call("pow", input=_X, exponent=Is(3.0)))
_INNER = Call(
    "mul",
    input=Var("k", lambda v: isinstance(v, float) and math.isclose(v, math.sqrt(2 / math.pi))),
    other=Call("add", input=_X, other=_CUBE),
)
_GELU_TANH = Call(
    "mul",
    input=Call("mul", input=Is(0.5), other=_X),
    other=Call("add", input=Is(1.0), other=Call("tanh", input=_INNER)),
)

NORMALIZE: tuple[Rewrite, ...] = (
    Rewrite(
        "dropout",
        "dropout in eval mode -> its input",
        Call("dropout", input=Var("x")),
        _source,
        _evaluates,
    ),
    Rewrite(
        "cast",
        "a cast to the dtype and device it has -> its input",
        Call("cast", input=Var("x")),
        _source,
        _noop_cast,
        quiet=True,
    ),
    Rewrite(
        "contiguous",
        "contiguous() of a contiguous value -> its input",
        Call("contiguous", input=Var("x")),
        _source,
        _contiguous_already,
        quiet=True,
    ),
    Rewrite(
        "slice",
        "a slice that takes everything -> its input",
        Call("getitem", input=Var("x")),
        _source,
        _takes_all,
        quiet=True,
    ),
    Rewrite(
        "reshape",
        "view, flatten, unsqueeze and chains of them -> one reshape, or nothing",
        _find_reshape,
        _replace_reshape,
        repeat=True,
    ),
    Rewrite(
        "scaled_sum",
        "add(x, y, alpha=a) -> add(x, mul(y, a))",
        _find_scaled_sum,
        _replace_scaled_sum,
        _scaled_sum_guard,
        quiet=True,
    ),
    Rewrite(
        "in_place",
        "`x += y`, `x.mul_(y)`, `relu_(x)` on a value nobody else holds -> the out-of-place operation",
        _find_in_place,
        _replace_in_place,
        _in_place_guard,
        repeat=True,
    ),
    *COUNTERS,
    Rewrite(
        "addmm",
        "addmm(b, x, w) -> linear(x, wᵀ, b)",
        Call("addmm", input=Var("b"), mat1=Var("x"), mat2=Var("w")),
        _replace_addmm,
        _addmm_guard,
    ),
    Rewrite(
        "matmul",
        "x @ w with a weight w -> linear(x, wᵀ)",
        Call("matmul", input=Var("x"), other=Var("w")),
        _replace_matmul,
        _matmul_guard,
        quiet=True,
    ),
    Rewrite(
        "outer",
        "x @ y over one product, [..., n, 1] @ [..., 1, m] -> x · y",
        Call("matmul", input=Var("x"), other=Var("y")),
        _replace_outer,
        _outer_guard,
        quiet=True,
    ),
    Rewrite(
        "rows",
        "linear(reshape(x)) that only rearranges rows -> reshape(linear(x))",
        Call(
            "linear",
            input=Call("reshape", input=Var("x"), bind="rows"),
            weight=Var("w"),
            bias=Var("b"),
        ),
        _replace_rows,
        _rows_guard,
        repeat=True,
        quiet=True,
    ),
    Rewrite(
        "restored_rows",
        "reshape(linear(reshape(x))) that only rearranges rows -> linear(x), linear(reshape(heads))",
        _find_restored_rows,
        _replace_restored_rows,
        _restored_rows_guard,
        quiet=True,
    ),
    Rewrite(
        "reshape_again",
        "what moving reshapes below linears left -> one reshape, or nothing",
        _find_reshape,
        _replace_reshape,
        repeat=True,
    ),
    Rewrite(
        "bias",
        "linear(x, w) + b -> linear(x, w, b)",
        Call(
            "add",
            input=Call("linear", input=Var("x"), weight=Var("w"), bias=Is(None)),
            other=Var("b"),
        ),
        _replace_bias,
        _bias_guard,
        quiet=True,
    ),
    Rewrite(
        "weight_product",
        "linear(x, u @ v) -> linear(linear(x, v), u)",
        _find_weight_product,
        _replace_product,
        _product_guard,
    ),
    Rewrite(
        "silu",
        "x · sigmoid(x) -> silu(x)",
        Call("mul", input=_X, other=Call("sigmoid", input=_X)),
        _replace_silu,
        _floating,
    ),
    Rewrite(
        "gelu_tanh",
        "the tanh polynomial of GPT-2 -> gelu(x, 'tanh')",
        _GELU_TANH,
        _replace_gelu,
        _floating,
    ),
)
