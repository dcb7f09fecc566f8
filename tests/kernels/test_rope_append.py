"""fsvd::rope_append against its reference: ATen, the Triton kernel, the op itself."""

from __future__ import annotations

import pytest
import torch
from harness import assert_close
from opcases import LIMITS

from fsvd_compile.errors import FactorError
from fsvd_compile.kernels import rope_append_aten, rope_append_reference, rope_append_triton

OP = torch.ops.fsvd.rope_append.default
# (batch, query heads, KV heads, tokens, head dim, value head dim)
SHAPES = ((2, 6, 2, 1, 64, 64), (1, 4, 4, 3, 20, 14), (2, 9, 3, 17, 10, 10), (1, 1, 1, 65, 80, 80))
ARGUMENTS = pytest.mark.parametrize(
    "shape", SHAPES, ids=["B{}-Hq{}-Hkv{}-M{}-D{}-Dv{}".format(*s) for s in SHAPES]
)


def case(
    shape, *, length=100, dtype=torch.float32, table=None, tables=1, packed=True, device="cpu"
):
    """Arguments of one call: q, k, v are views of a packed projection, positions are shuffled."""
    b, hq, hkv, m, d, dv = shape
    make = {"dtype": dtype, "device": device}
    if packed:
        qkv = torch.randn(b, m, hq * d + hkv * (d + dv), **make)
        q, k, v = qkv.split([hq * d, hkv * d, hkv * dv], -1)
        q, k, v = (
            t.unflatten(-1, (h, -1)).transpose(1, 2) for t, h in ((q, hq), (k, hkv), (v, hkv))
        )
    else:
        q, k = torch.randn(b, hq, m, d, **make), torch.randn(b, hkv, m, d, **make)
        v = torch.randn(b, hkv, m, dv, **make)
    angle = torch.rand(tables, m, d, device=device) * 6
    cos, sin = angle.cos().to(table or dtype), angle.sin().to(table or dtype)
    k_cache = torch.randn(b, hkv, length, d, **make)
    v_cache = torch.randn(b, length, hkv, dv, **make).transpose(1, 2)
    position = torch.randperm(length, device=device)[:m]
    return q, k, v, cos, sin, k_cache, v_cache, position


def check(fn, args, limit):
    """The returned q, the written rows, and that no other row of the caches changed by a bit."""
    *rest, k_cache, v_cache, position = args
    expected = rope_append_reference(*args)
    caches = k_cache.clone(), v_cache.clone()
    q = fn(*rest, *caches, position)
    others = torch.ones(k_cache.shape[2], dtype=torch.bool, device=k_cache.device)
    others[position] = False
    for name, actual, want in zip(("q", "k_cache", "v_cache"), (q, *caches), expected, strict=True):
        assert_close(name, actual, want, limit)
    for before, after in zip((k_cache, v_cache), caches, strict=True):
        assert torch.equal(before[:, :, others], after[:, :, others])
    assert q.transpose(1, 2).is_contiguous()


@ARGUMENTS
def test_aten(dtype, shape):
    check(rope_append_aten, case(shape, dtype=dtype), LIMITS[dtype])


@ARGUMENTS
@pytest.mark.interpret
def test_triton(interpreted_dtype, shape, poisoned):
    check(rope_append_triton, case(shape, dtype=interpreted_dtype), LIMITS[interpreted_dtype])


@pytest.mark.interpret
@pytest.mark.parametrize("packed", (True, False), ids=("packed", "contiguous"))
@pytest.mark.parametrize("tables", (1, 2))
@pytest.mark.parametrize("table", (torch.float32, torch.float16), ids=str)
def test_tables(table, tables, packed, poisoned):
    args = case(SHAPES[2], dtype=torch.float16, table=table, tables=tables, packed=packed)
    check(rope_append_aten, args, 2e-3)
    check(rope_append_triton, args, 2e-3)


@pytest.mark.interpret
def test_triton_interpreted_bf16(poisoned):
    check(rope_append_triton, case(SHAPES[1], dtype=torch.bfloat16), 1e-2)


def test_reference_rotates_halves():
    q, k, v, cos, sin, *rest = case((1, 2, 2, 3, 8, 8))
    left, right = q[..., :4], q[..., 4:]
    expected = q * cos[:, None] + torch.cat((-right, left), -1) * sin[:, None]
    assert_close("q", rope_append_reference(q, k, v, cos, sin, *rest)[0], expected, 1e-6)


@pytest.mark.interpret
def test_triton_leaves_out_positions_outside():
    new = case((1, 2, 2, 4, 8, 8), length=10)[:5]
    room = torch.zeros(2, 1, 2, 30, 8)
    inside = room[:, :, :, 10:20]
    position = torch.tensor([-3, 10, 4, 2**40])
    rope_append_triton(*new, inside[0], inside[1], position)
    touched = room.abs().sum((0, 1, 2, 4)).nonzero().flatten().tolist()
    assert touched == [14]


def test_aten_refuses_positions_outside():
    *rest, _ = case((1, 2, 2, 1, 8, 8), length=10)
    with pytest.raises((IndexError, RuntimeError)):
        rope_append_aten(*rest, torch.tensor([10]))


@pytest.mark.parametrize("packed", (True, False), ids=("packed", "contiguous"))
@pytest.mark.parametrize("shape", (SHAPES[0], SHAPES[1]), ids=str)
def test_opcheck(shape, packed):
    torch.library.opcheck(OP, case(shape, packed=packed))


@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
def test_compiles(dynamic):
    args = case(SHAPES[1])
    compile = torch.compile(fullgraph=True, backend="aot_eager", dynamic=dynamic)
    check(compile(lambda *args: OP(*args) * 1), args, 2e-6)


@pytest.mark.interpret
def test_no_tokens():
    args = case((2, 4, 2, 0, 8, 8))
    assert rope_append_triton(*args).shape == (2, 4, 0, 8)


def test_errors():
    q, k, v, cos, sin, k_cache, v_cache, position = case((2, 4, 2, 3, 8, 6))
    with pytest.raises(FactorError, match="k_cache has shape"):
        OP(q, k, v, cos, sin, k_cache[..., :4], v_cache, position)
    with pytest.raises(FactorError, match="v has shape"):
        OP(q, k, v[:, :1], cos, sin, k_cache, v_cache, position)
    with pytest.raises(FactorError, match="cos has shape"):
        OP(q, k, v, cos[..., :4], sin, k_cache, v_cache, position)
    with pytest.raises(FactorError, match="position is"):
        OP(q, k, v, cos, sin, k_cache, v_cache, position.int())
    with pytest.raises(FactorError, match="is odd"):
        OP(q[..., :7], k, v, cos, sin, k_cache, v_cache, position)


@pytest.mark.gpu
class TestGpu:
    @pytest.mark.parametrize("tokens", (1, 2, 300))
    @pytest.mark.parametrize("dim", (64, 80, 128))
    def test_op(self, dim, tokens):
        args = case(
            (2, 32, 8, tokens, dim, dim),
            length=1024,
            dtype=torch.bfloat16,
            table=torch.float32,
            device="cuda",
        )
        check(OP, args, 1e-2)

    def test_pdl_is_bitwise(self):
        args = case((1, 32, 8, 1, 128, 128), dtype=torch.bfloat16, device="cuda")
        results = []
        for pdl in (True, False):
            caches = args[5].clone(), args[6].clone()
            q = rope_append_triton(*args[:5], *caches, args[7], pdl=pdl)
            results.append((q, *caches))
        assert all(torch.equal(on, off) for on, off in zip(*results, strict=True))

    def test_cuda_graph(self):
        args = case((1, 32, 8, 1, 128, 128), dtype=torch.bfloat16, device="cuda")
        expected = rope_append_reference(*args)
        OP(*args)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            q = OP(*args)
        graph.replay()
        for name, actual, want in zip(
            ("q", "k_cache", "v_cache"), (q, args[5], args[6]), expected, strict=True
        ):
            assert_close(name, actual, want, 1e-2)
