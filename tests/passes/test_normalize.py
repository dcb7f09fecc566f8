"""One spelling per idea: each rewrite alone, and above all what must stay as it was written."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from harness import assert_close, rewrite
from torch import nn

K = 37


def x_and(*shapes):
    return [torch.randn(3, 5, K), *(torch.randn(s) for s in shapes)]


# name -> (function of x and y, both [3, 5, 37]; how many in-place operations go)
def _iadd(x, y):
    z = x * 2
    z += y
    return z


def _chain(x, y):
    z = x * 2
    z += y
    z *= 3
    z.add_(1).relu_()
    return z + 1


def _same_value_twice(x, y):
    z = x * 2
    w = z.add_(y)
    return z + w


def _view_after(x, y):
    z = x * 2
    z.mul_(y)
    return z.view(-1) + 1, z[0]


def _alias_only_before(x, y):
    z = x * 2
    s = z.view(-1).sum()
    z.add_(y)
    return z, s


def _itself(x, y):
    z = x * 2
    z += z
    return z


def _transposed(x, y):
    z = x.transpose(0, 1) * 2
    z += 1
    return z, z.stride(0) * y


def _of_a_view(x, y):
    z = (x * 2).view(-1)
    z.add_(1)
    return z


IN_PLACE = {
    "+=": (_iadd, 1),
    "add_": (lambda x, y: (x * 2).add_(y), 1),
    "mul_": (lambda x, y: (x * 2).mul_(y), 1),
    "mul_-number": (lambda x, y: (x * 2).mul_(0.5), 1),
    "relu_": (lambda x, y: (x * 2).relu_(), 1),
    "torch.relu_": (lambda x, y: torch.relu_(x * 2), 1),
    "broadcast-operand": (lambda x, y: (x * 2).add_(y[0, 0]), 1),
    "several-in-a-row": (_chain, 4),
    "result-and-target-read": (_same_value_twice, 1),
    "views-taken-afterwards": (_view_after, 1),
    "views-read-before-only": (_alias_only_before, 1),
    "added-to-itself": (_itself, 1),
    "transposed": (_transposed, 1),
    "through-the-only-view": (_of_a_view, 1),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_becomes_out_of_place(name):
    fn, count = IN_PLACE[name]
    result = rewrite(fn, *x_and((3, 5, K)))
    assert result.matches.get("in_place", 0) == count, result.misses
    assert not any(op.endswith("_") or op in ("iadd", "imul") for op in result.after), result.text()


def _view_read_after(x, y):
    z = x * 2
    row = z[0]
    z += y
    return row + 1


def _base_read_after(x, y):
    z = x * 2
    row = z[0]
    row.add_(1)
    return z


def _second_write_through_a_view_of_the_first_result(x, y):
    z = x * 2
    z.add_(1)
    v = z.view(-1)
    v.mul_(2)
    return z


def _chunk_read_after(x, y):
    z = x * 2
    left, right = z.split((10, 27), -1)
    z.add_(1)
    return left + 1, right


def _chunk_written(x, y):
    z = x * 2
    left, right = z.split((10, 27), -1)
    left.add_(1)
    return z, right


def _view_returned(x, y):
    z = x * 2
    v = z.view(-1)
    z += 1
    return z, v


def _detached(x, y):
    z = x * 2
    d = z.detach()
    z += 1
    return d + 1


def _cast_alias(x, y):
    z = x * 2
    w = z.to(torch.float32)
    w += y
    return z


def _dropout_alias(x, y):
    z = x * 2
    w = F.dropout(z, 0.5, training=False)
    w += y
    return z


def _dropout_of_the_input(x, y):
    F.dropout(x, 0.5, training=False).add_(1)
    return x + y


def _contiguous_alias(x, y):
    z = x * 2
    z.contiguous().mul_(3)
    return z


def _input_through_views(x, y):
    x.view(-1)[3:].mul_(2)
    return x + y


def _transposed_strides(x, y):
    z = (x * 2).transpose(0, 1)
    z[1:, ::2].relu_()
    return z


def _fresh_of_other_layout(x, y):
    z = torch.empty(5, 3, K).transpose(0, 1)
    z.copy_(x)
    z += y
    return torch.as_strided(z, (5, 3, K), (3 * K, K, 1)) + 1


STAYS = {
    "a-view-is-read-after": _view_read_after,
    "the-base-is-read-after": _base_read_after,
    "second-write-through-a-view": _second_write_through_a_view_of_the_first_result,
    "a-chunk-is-read-after": _chunk_read_after,
    "a-chunk-is-written": _chunk_written,
    "a-view-is-returned": _view_returned,
    "detached": _detached,
    "cast-that-aliases": _cast_alias,
    "eval-dropout-that-aliases": _dropout_alias,
    "eval-dropout-of-an-input": _dropout_of_the_input,
    "contiguous-that-aliases": _contiguous_alias,
    "an-input": lambda x, y: x.mul_(2) + y,
    "an-input-+=": lambda x, y: x.add_(y).sum(),
    "an-input-relu_": lambda x, y: torch.relu_(x) + y,
    "an-input-through-views": _input_through_views,
    "part-of-a-transposed": _transposed_strides,
    "setitem": lambda x, y: (z := x * 2).__setitem__(0, y[0]) or z,
    "setitem-of-an-input": lambda x, y: x.__setitem__((0, 1), 0.0) or x + y,
    "out=": lambda x, y: torch.add(x, y, out=x) + 1,
    "out=-of-an-intermediate": lambda x, y: torch.add(x, y, out=(z := x * 2)) + z,
    "wider-operand": lambda x, y: (x * 2).half().add_(y),
    "sub_": lambda x, y: (x * 2).sub_(y),
    "other-layout-read-by-strides": _fresh_of_other_layout,
}


@pytest.mark.parametrize("name", STAYS)
def test_in_place_stays(name):
    """Values, inputs and sharing are compared in `rewrite`; most of these would be wrong if rewritten."""
    rewrite(STAYS[name], *x_and((3, 5, K)), limit=1e-3 if name == "wider-operand" else 1e-5)


SCALED_SUMS = {
    "add": lambda x, y: torch.add(x, y, alpha=3),
    "method": lambda x, y: x.add(y, alpha=-0.5),
    "broadcast": lambda x, y: torch.add(x, y[0, :1], alpha=2),
    "in place": lambda x, y: (x * 2).add_(y, alpha=3) + 1,
    "in place, nobody reads it": lambda x, y: ((z := x * 2).add_(y, alpha=3), z.sin())[1],
    "in place on an input": lambda x, y: x.add_(y, alpha=2).sum(),
    "in place on a part": lambda x, y: ((z := x * 2)[:, 1:3].add_(y[:, :2], alpha=2), z)[1],
}


@pytest.mark.parametrize("name", SCALED_SUMS)
def test_scaled_sum(name):
    result = rewrite(SCALED_SUMS[name], *x_and((3, 5, K)))
    assert result.matches["scaled_sum"] == 1 and "mul" in result.after
    assert not any("alpha" in node.kwargs for node in result.graph.nodes)


@pytest.mark.parametrize(
    "fn",
    (
        lambda x, y: torch.add(x, y, alpha=1),
        lambda x, y: torch.add(x, y.half(), alpha=2),  # rounded to fp16 first it would be another
        lambda x, y: torch.add(x.long(), y.long(), alpha=2),
        lambda x, y: torch.sub(x, y, alpha=2),
        lambda x, y: torch.add(x, 2.0, alpha=2),
    ),
)
def test_scaled_sum_left_alone(fn):
    assert not rewrite(fn, *x_and((3, 5, K))).only("scaled_sum")


@pytest.mark.parametrize("kernels", ("auto", "ops"))
def test_a_product_times_alpha_keeps_its_factor(kernels):
    """Inductor of torch 2.13 loses it on a CPU where the product is of matrices."""
    w = torch.randn(K, K)
    for fn in (
        lambda x, y: torch.add(y, F.linear(x, w), alpha=2),
        lambda x, y: torch.add(F.linear(x, w), y, alpha=0.5),
        lambda x, y: (y * 1).add_(F.linear(x, w), alpha=2),
    ):
        x, y = torch.randn(5, K), torch.randn(5, K)
        compiled = torch.compile(fn, backend="flashsvd", options={"kernels": kernels})
        with torch.no_grad():
            assert_close("y", compiled(x, y), fn(x, y), 2e-6)


def test_a_write_to_a_view_with_readers_keeps_both():
    result = rewrite(_second_write_through_a_view_of_the_first_result, *x_and((3, 5, K)))
    assert result.matches["in_place"] == 1 and result.after["mul_"] == 1


def test_in_place_on_buffers():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(K))
            self.norm = nn.BatchNorm1d(K)

        def forward(self, x):
            self.seen.add_(x.mean((0, 1)))
            self.seen *= 0.5
            return self.norm(x.view(-1, K)) + self.seen

    result = rewrite(Counter().train(), torch.randn(3, 5, K))
    assert "in_place" not in result.matches


NO_OPS = {
    "to-dtype": ("cast", lambda x: x.to(torch.float32) + 1),
    "to-device": ("cast", lambda x: x.to("cpu") + 1),
    "to-like": ("cast", lambda x: x.to(x) + 1),
    "float": ("cast", lambda x: x.float() + 1),
    "type_as": ("cast", lambda x: x.type_as(x) + 1),
    "type": ("cast", lambda x: x.type(torch.float32) + 1),
    "contiguous": ("contiguous", lambda x: x.contiguous() + 1),
    "dropout-eval": ("dropout", lambda x: F.dropout(x, 0.5, training=False) + 1),
    "dropout-p-0": ("dropout", lambda x: F.dropout(x, 0.0, training=True) + 1),
    "dropout-module": ("dropout", nn.Sequential(nn.Dropout(0.2), nn.Softplus()).eval()),
    "dropout-in-place-eval": ("dropout", lambda x: F.dropout(x, 0.5, False, True) + 1),
    "view-back": ("reshape", lambda x: x.view(-1, K).view(3, 5, K) + 1),
    "flatten-unflatten": ("reshape", lambda x: x.flatten(0, 1).unflatten(0, (3, 5)) + 1),
    "view-of-the-shape": ("reshape", lambda x: x.view(3, 5, K) + 1),
    "unsqueeze-squeeze": ("reshape", lambda x: x.unsqueeze(1).squeeze(1) + 1),
    "view_as": ("reshape", lambda x: x.view_as(x) + 1),
}


@pytest.mark.parametrize("name", NO_OPS)
def test_what_does_nothing_goes(name):
    kind, fn = NO_OPS[name]
    result = rewrite(fn, torch.randn(3, 5, K))
    assert result.matches.keys() >= {kind}
    assert sum(result.after.values()) == 1, result.text()


COPIES = {
    "to-copy": lambda x: x.to(torch.float32, copy=True).mul_(2),
    "to-copy-device": lambda x: x.to("cpu", copy=True),
    "to-other-dtype": lambda x: x.to(torch.bfloat16),
    "to-memory-format": lambda x: x[None].to(memory_format=torch.channels_last).contiguous(),
    "type-name": lambda x: x.double(),
    "contiguous-transposed": lambda x: x.transpose(0, 1).contiguous().add_(1),
    "contiguous-expanded": lambda x: x[:1].expand(4, 5, K).contiguous().add_(1),
    "contiguous-slice": lambda x: x[:, ::2].contiguous().add_(1),
    "clone": lambda x: x.clone().add_(1),
    "reshape-of-transposed": lambda x: x.transpose(0, 1).reshape(-1).add_(1),
    "reshape-there-and-back": lambda x: x.transpose(0, 1).reshape(-1).view(5, 3, K).add_(1),
    "flatten-there-and-back-returned": lambda x: (
        x.transpose(0, 1).flatten().unflatten(0, (5, 3, K))
    ),
    "view-dtype": lambda x: x.view(torch.int32) + 1,
    "view-dtype-back": lambda x: x.view(torch.int32).view(torch.float32),
    "view-other-width": lambda x: x[..., :36].contiguous().view(torch.float64).view(torch.float32),
}


@pytest.mark.parametrize("name", COPIES)
def test_what_does_something_stays(name):
    rewrite(COPIES[name], torch.randn(3, 5, K))


def test_a_reshape_that_copied_is_read_where_it_was_made():
    def fn(x):
        flat = x.transpose(0, 1).reshape(-1)
        x.mul_(2)
        return flat.view(5, 3, K) + 1, flat.view(15, K)

    rewrite(fn, torch.randn(3, 5, K))


def test_active_dropout_stays():
    for module in (nn.Dropout(1.0), nn.Sequential(nn.Dropout(1.0, inplace=True))):
        result = rewrite(module.train(), torch.randn(3, K))
        assert result.matches == {} and result.misses["dropout"] == [
            "dropout is active (training mode)"
        ]


def test_dropout_whose_mode_is_an_argument():
    def fn(x, training):
        return F.dropout(x, 1.0, training)

    assert rewrite(fn, torch.randn(3, K), True).after["dropout"] == 1
    assert rewrite(fn, torch.randn(3, K), False).after["dropout"] == 0


MATMULS = {
    "x@w": (lambda x, w, b: x @ w, 1),
    "mm": (lambda x, w, b: torch.mm(x[0], w), 1),
    "x@w+b": (lambda x, w, b: x @ w + b, 1),
    "x@w.T.T": (lambda x, w, b: x @ w.T.T, 1),
    "1-D@2-D": (lambda x, w, b: x[0, 0] @ w, 1),
    "2-D@1-D": (lambda x, w, b: x @ b.new_ones(K), 0),
    "3-D@3-D": (lambda x, w, b: x @ w.expand(3, K, 9), 0),
    "w@x": (lambda x, w, b: w.T @ x.mT, 0),
    "x@transpose(0,0)": (lambda x, w, b: x @ w.transpose(0, 0), 0),
    "x@x.mT": (lambda x, w, b: x @ x.mT, 0),
    "computed-weight": (lambda x, w, b: x @ (w * 2), 0),
    "mm-out": (lambda x, w, b: torch.mm(x[0], w, out=x.new_empty(5, 9)), 0),
    "integers": (lambda x, w, b: x.long() @ w.long(), 0),
}


@pytest.mark.parametrize("name", MATMULS)
def test_matmul(name):
    fn, count = MATMULS[name]
    result = rewrite(fn, *x_and((K, 9), (9,)))
    assert result.matches.get("matmul", 0) == count
    assert result.after["linear"] == count


ROWS = {
    "flat": (lambda x, w: F.linear(x.view(-1, K), w).view(3, 5, 9), 1, 0),
    "flat-left-flat": (lambda x, w: F.linear(x.view(-1, K), w), 1, 1),
    "other-rows": (lambda x, w: F.linear(x.reshape(5, 3, K), w), 1, 1),
    "both-read": (
        lambda x, w: ((y := F.linear(x.view(-1, K), w)).view(3, 5, 9).sin(), y.cos()),
        1,
        1,
    ),
    "written-afterwards": (
        lambda x, w: ((y := F.linear(x.view(-1, K), w)).view(3, 5, 9).mul_(2), y.cos()),
        1,
        1,
    ),
    "features-split": (lambda x, w: F.linear(x.reshape(K, 5, 3), w[:, :3]), 0, 1),
    "heads-merged": (
        lambda x, w: F.linear(x.view(3, 5, 1, K).transpose(1, 2).reshape(3, 5, K), w),
        1,
        2,
    ),
    "vector-weight": (lambda x, w: F.linear(x.view(-1, K), w[0]).view(3, 5), 0, 2),
}


@pytest.mark.parametrize("rows", (1, 5))
@pytest.mark.parametrize("batch", (1, 3))
def test_outer_of_frequencies_and_positions(batch, rows):
    """As transformers 5.17 has it for Llama."""

    def fn(frequencies, positions):
        wide = frequencies[None, :, None].float().expand(positions.shape[0], -1, 1)
        return (wide @ positions[:, None, :].float()).transpose(1, 2).cos()

    result = rewrite(fn, torch.randn(8), torch.arange(rows).expand(batch, rows).contiguous())
    assert result.matches["outer"] == 1
    assert not result.after["matmul"]


def test_outer_of_sizes_that_depend_on_data():
    def fn(x, w):
        rows = x[0].nonzero().squeeze(1)
        return x[:, rows] @ w[rows]

    x, w = torch.eye(3, 5), torch.randn(5, 4)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True), torch.no_grad():
        compiled = torch.compile(fn, backend="flashsvd", fullgraph=True)
        assert torch.allclose(compiled(x, w), fn(x, w))


# name -> (function of x [3, 5, 37], how many slices go)
SLICES = {
    "all": (lambda x: x.sin()[:, 0:, :].cos(), 1),
    "ellipsis": (lambda x: x.sin()[...] + 1, 1),
    "to the end": (lambda x: x.sin()[:, -9:].cos(), 1),
    "returned": (lambda x: x.sin()[:], 1),
    "of an input": (lambda x: x[:, :5].cos(), 1),
    "written through": (lambda x: x.sin()[:].add_(1), 1),
    "a part": (lambda x: x.sin()[:, 1:].cos(), 0),
    "a step": (lambda x: x.sin()[:, ::2].cos(), 0),
    "another dimension": (lambda x: x.sin()[:, None].cos(), 0),
    "rows by number": (lambda x: x.sin()[[0, 1, 2]].cos(), 0),
    "one of equal ones": (lambda x: x.sin()[:1].expand(4, 5, K)[1:].cos(), 0),
    "the first of one": (lambda x: x.sin()[:1][0].cos(), 0),
}


@pytest.mark.parametrize("name", SLICES)
def test_slice(name):
    fn, count = SLICES[name]
    result = rewrite(fn, torch.randn(3, 5, K))
    assert result.matches.get("slice", 0) == count
    assert result.before["getitem"] - result.after["getitem"] == count


def _transposed_factor(x, y):
    z = x.transpose(1, 2).unsqueeze(-1) @ y
    z.view(-1)[:3] = 7  # a view of what is contiguous
    return z


# name -> (function, shapes of its arguments, how many are rewritten)
OUTER = {
    "table of RoPE": (lambda f, p: (f @ p).transpose(1, 2), ((2, 7, 1), (2, 1, 5)), 1),
    "batch is broadcast": (torch.matmul, ((3, 1, 7, 1), (2, 1, 5)), 1),
    "matrices": (lambda x, y: torch.mm(x, y * 2), ((7, 1), (1, 5)), 1),
    "a weight": (torch.mm, ((7, 1), (1, 5)), 0),  # a linear layer
    "one row": (torch.matmul, ((2, 1, 1), (2, 1, 5)), 1),
    "transposed factor": (_transposed_factor, ((2, 5, 3), (2, 1, 1, 4)), 0),
    "transposed and returned": (lambda x, y: x.mT[..., None] @ y, ((2, 5, 3), (2, 1, 1, 4)), 0),
    "integers": (lambda x, y: x.long() @ y.long(), ((2, 7, 1), (2, 1, 5)), 0),
    "two products": (torch.matmul, ((2, 7, 2), (2, 2, 5)), 0),
    "a vector": (torch.matmul, ((1,), (2, 1, 5)), 0),
    "a sum over rows": (torch.matmul, ((7, 1), (1,)), 0),
}


@pytest.mark.parametrize("name", OUTER)
def test_outer(name):
    fn, shapes, count = OUTER[name]
    result = rewrite(fn, *(torch.randn(s) for s in shapes))
    assert result.matches.get("outer", 0) == count
    left = result.after["matmul"] + result.after["mm"] + result.after["linear"]
    assert left == (count == 0)


@pytest.mark.parametrize("name", ROWS)
def test_rows(name):
    fn, count, reshapes = ROWS[name]
    result = rewrite(fn, *x_and((9, K)))
    assert result.matches.get("rows", 0) == count, result.text()
    assert result.after["reshape"] == reshapes, result.text()


def test_restored_rows():
    """GPT-2's projection of merged heads: the rows come back before the linears instead of after them."""

    def fn(x, w, u):
        flat = x.transpose(1, 2).reshape(-1, 4 * 8)
        return F.linear(F.linear(flat, w), u).view(2, 3, 32) + 1

    result = rewrite(fn, torch.randn(2, 4, 3, 8), torch.randn(5, 32), torch.randn(32, 5))
    assert result.matches["restored_rows"] == 1 and result.after["reshape"] == 1


@pytest.mark.parametrize(
    "fn",
    [
        pytest.param(
            lambda x, w, u: F.linear(x.mT.reshape(-1, 32), w).view(2, 15),
            id="features-merged-after",
        ),
        pytest.param(
            lambda x, w, u: ((y := F.linear(x.mT.reshape(-1, 32), w)).view(2, 3, 5), y),
            id="read-as-it-is",
        ),
        pytest.param(
            lambda x, w, u: F.linear(x.mT.reshape(-1, 32), w, u[:6, :1]).view(2, 3, 5),
            id="bias-by-row",
        ),
        pytest.param(
            lambda x, w, u: F.linear(x.mT.reshape(-1, 32), w[0]).view(2, 3), id="vector-weight"
        ),
        pytest.param(
            lambda x, w, u: F.linear(x.mT.reshape(-1, 192), u.new_ones(1, 192)).view(()),
            id="to-a-scalar",
        ),
    ],
)
def test_rows_not_restored(fn):
    result = rewrite(fn, torch.randn(2, 3, 32), torch.randn(5, 32), torch.randn(32, 5))
    assert "restored_rows" not in result.matches


@pytest.mark.parametrize(
    "fn,matched",
    [
        pytest.param(lambda x, w, b: F.linear(x, w) + b, True, id="after"),
        pytest.param(lambda x, w, b: b + F.linear(x, w), True, id="before"),
        pytest.param(lambda x, w, b: torch.add(F.linear(x, w), b), True, id="torch.add"),
        pytest.param(lambda x, w, b: F.linear(x, w, b) + b, False, id="has-a-bias"),
        pytest.param(lambda x, w, b: F.linear(x, w) + b * 2, False, id="computed"),
        pytest.param(lambda x, w, b: F.linear(x, w) - b, False, id="minus"),
        pytest.param(lambda x, w, b: F.linear(x, w).add(b, alpha=3), False, id="alpha"),
        pytest.param(lambda x, w, b: (y := F.linear(x, w)) + b + y, False, id="linear-read-twice"),
        pytest.param(
            lambda x, w, b: F.linear(x[0, :, :], w) + b[:, None].expand(9, 9)[:5],
            False,
            id="by-row",
        ),
        pytest.param(lambda x, w, b: F.linear(x, w) + 1.0, False, id="number"),
    ],
)
def test_bias(fn, matched):
    assert ("bias" in rewrite(fn, *x_and((9, K), (9,))).matches) is matched


def test_a_vector_weight_has_no_bias():
    """[5, 5] rows times a vector of 5 is [5]; `+ b` adds by row."""
    result = rewrite(
        lambda x, w, b: F.linear(x, w) + b, torch.randn(5, 5), torch.randn(5), torch.randn(5)
    )
    assert "bias" not in result.matches


def test_a_bias_written_before_it_is_added():
    def fn(x, w, b):
        y = F.linear(x, w)
        b.add_(1)
        z = y + b
        w.mul_(2)
        return z

    result = rewrite(fn, *x_and((9, K), (9,)))
    assert result.matches["bias"] == 1  # reads b where the sum read it

    def moved(x, w, b):
        y = F.linear(x, w)
        w.mul_(2)
        return y + b

    assert "bias" not in rewrite(moved, *x_and((9, K), (9,))).matches


def test_a_weight_product_read_twice():
    def fn(x, u, v):
        w = u @ v
        return F.linear(x, w), w.sum()

    result = rewrite(fn, *x_and((22, 5), (5, K)))
    assert "weight_product" not in result.matches
    assert "is also read by" in result.misses["weight_product"][0]


def test_a_weight_product_with_a_factor_written_in_between():
    def fn(x, u, v):
        w = u @ v
        v.zero_()
        return F.linear(x, w)

    assert "weight_product" not in rewrite(fn, *x_and((22, 5), (5, K))).matches


@pytest.mark.parametrize(
    "x", [torch.randint(0, 9, (3, 4)), torch.rand(3, 4) > 0.5], ids=["int", "bool"]
)
def test_silu_of_integers_stays(x):
    assert rewrite(lambda x: x * torch.sigmoid(x), x).matches == {}
