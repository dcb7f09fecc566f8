"""fsvd::attention against its reference and against torch: ATen, the Triton kernels, the op."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from harness import assert_close
from opcases import LIMITS

from fsvd_compile.errors import FactorError
from fsvd_compile.kernels import attention_aten, attention_reference, attention_triton

OP = torch.ops.fsvd.attention.default
# (batch, query heads, KV heads, tokens, length, head dim, value head dim)
SHAPES = (
    (2, 6, 2, 1, 100, 64, 64),
    (1, 4, 4, 3, 70, 20, 14),
    (2, 3, 1, 17, 130, 33, 33),
    (1, 2, 1, 65, 65, 80, 80),
)
ARGUMENTS = pytest.mark.parametrize(
    "shape", SHAPES, ids=["B{}-Hq{}-Hkv{}-M{}-S{}-D{}-Dv{}".format(*s) for s in SHAPES]
)
MASKS = ("none", "decode", "rows", "heads", "additive", "expanded", "matrix", "finfo", "column")


def case(shape, mask="none", *, dtype=torch.float32, device="cpu"):
    """Arguments of one call: q in projection order, K as a cache, V in projection order."""
    b, hq, hkv, m, s, d, dv = shape
    make = {"dtype": dtype, "device": device}
    q = torch.randn(b, m, hq, d, **make).transpose(1, 2)
    k = torch.randn(b, hkv, s, d, **make)
    v = torch.randn(b, s, hkv, dv, **make).transpose(1, 2)
    return q, k, v, mask_of(mask, b, hq, m, s, dtype, device), 1.3 * d**-0.5


def mask_of(kind, b, hq, m, s, dtype, device):
    def visible(*shape):
        seen = torch.rand(*shape, device=device) > 0.4
        # A row that sees nothing, and a long hidden tail.
        seen[..., -1, :] &= shape[-2] == 1
        seen[..., 70:] = False
        return seen

    def additive(seen):
        return torch.where(seen, torch.randn(seen.shape, device=device), float("-inf")).to(dtype)

    return {
        "none": lambda: None,
        "decode": lambda: visible(b, 1, 1, s),
        "rows": lambda: visible(b, 1, m, s),
        "heads": lambda: visible(1, hq, m, s),
        "additive": lambda: additive(visible(b, 1, m, s)),
        "expanded": lambda: additive(visible(1, 1, 1, s)).expand(b, hq, m, s),
        "matrix": lambda: visible(m, s),
        # All rows "hidden" by a finite number: they attend to everything, as eager does.
        "finfo": lambda: torch.full((b, 1, m, s), torch.finfo(torch.float32).min, device=device),
        "column": lambda: torch.zeros(b, 1, m, 1, dtype=dtype, device=device),
    }[kind]()


@ARGUMENTS
@pytest.mark.parametrize("mask", MASKS)
def test_aten(dtype, mask, shape):
    args = case(shape, mask, dtype=dtype)
    assert_close("o", attention_aten(*args), attention_reference(*args), LIMITS[dtype])


@ARGUMENTS
@pytest.mark.parametrize("mask", ("none", "rows", "additive", "expanded"))
def test_reference_is_torchs(mask, shape):
    q, k, v, m, scale = case(shape, mask)
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=m, scale=scale)
    assert_close("o", attention_reference(q, k, v, m, scale), expected, 2e-6)


@pytest.mark.parametrize("mask", ("none", "decode", "rows", "additive"))
def test_aten_takes_the_flash_kernel(mask, monkeypatch):
    """On a CPU: grouped queries are folded, so nothing keeps torch from its flash kernel."""
    flash = int(torch.nn.attention.SDPBackend.FLASH_ATTENTION)
    chosen = []
    sdpa = F.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, scale=None):
        assert k.shape[1] == 2
        chosen.append(torch._fused_sdp_choice(q, k, v, attn_mask, 0.0, False, scale=scale))
        return sdpa(q, k, v, attn_mask=attn_mask, scale=scale)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    attention_aten(*case((2, 6, 2, 5, 100, 64, 64), mask, dtype=torch.bfloat16))
    assert chosen == [flash]


@pytest.mark.interpret
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("splits", (1, 3))
def test_triton_masks(splits, mask, poisoned):
    args = case((2, 6, 2, 3, 200, 16, 16), mask)
    assert_close("o", attention_triton(*args, splits=splits), attention_reference(*args), 2e-6)


@pytest.mark.interpret
@pytest.mark.parametrize("splits", (1, 3))
def test_what_is_not_finite_comes_out(splits, poisoned):
    """A split that saw NaN is not one that saw nothing."""
    args = case((1, 4, 2, 3, 200, 16, 16))
    args[1][:, :, 5] = float("nan")
    assert attention_triton(*args, splits=splits).isnan().all()


@ARGUMENTS
@pytest.mark.interpret
def test_triton(interpreted_dtype, shape, poisoned):
    args = case(shape, "rows", dtype=interpreted_dtype)
    limit = LIMITS[interpreted_dtype]
    assert_close("o", attention_triton(*args), attention_reference(*args), limit)


@pytest.mark.interpret
@pytest.mark.parametrize("dim", (64, 80, 96, 128, 256, 5))
def test_triton_head_dims(dim, poisoned):
    args = case((1, 4, 2, 1, 90, dim, dim), "decode", dtype=torch.float16)
    assert_close("o", attention_triton(*args), attention_reference(*args), 2e-3)


@pytest.mark.interpret
def test_triton_interpreted_bf16(poisoned):
    args = case((1, 4, 2, 2, 90, 32, 32), "additive", dtype=torch.bfloat16)
    assert_close("o", attention_triton(*args), attention_reference(*args), 1e-2)


@pytest.mark.interpret
def test_triton_more_splits_than_blocks(poisoned):
    args = case((1, 2, 1, 1, 70, 16, 16))
    assert_close("o", attention_triton(*args, splits=7), attention_reference(*args), 2e-6)


@pytest.mark.interpret
@pytest.mark.parametrize("kind", ("bool", "additive"))
@pytest.mark.parametrize("splits", (1, 2))
def test_triton_does_not_read_hidden_blocks(splits, kind, poisoned):
    """A cache of 512 of which 64 are filled: the rest may hold anything, NaN included."""
    q, k, v, _, scale = case((1, 4, 2, 1, 512, 16, 16))
    seen = torch.zeros(1, 1, 1, 512, dtype=torch.bool)
    seen[..., :64] = True
    expected = attention_reference(q, k[:, :, :64], v[:, :, :64], None, scale)
    k[:, :, 64:] = v[:, :, 64:] = float("nan")
    mask = seen if kind == "bool" else torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))
    actual = attention_triton(q, k, v, mask, scale, splits=splits)
    assert_close("o", actual, expected, 2e-6)


@pytest.mark.interpret
@pytest.mark.parametrize("kind", ("bool", "additive"))
@pytest.mark.parametrize("splits", (1, 2))
def test_hidden_rows_are_zero(splits, kind, poisoned):
    q, k, v, _, scale = case((2, 4, 2, 1, 100, 16, 16))
    mask = torch.zeros(2, 1, 1, 100, dtype=torch.bool)
    mask[1] = True
    if kind == "additive":
        mask = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    for o in (attention_aten(q, k, v, mask, scale), OP(q, k, v, mask, scale)):
        assert not o[0].any() and o[1].all()
    o = attention_triton(q, k, v, mask, scale, splits=splits)
    assert not o[0].any() and o[1].all()


@pytest.mark.parametrize("mask", ("none", "decode", "rows", "expanded", "matrix"))
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_opcheck(shape, mask):
    torch.library.opcheck(OP, case(shape, mask))


def test_opcheck_contiguous():
    q, k, v, mask, scale = case(SHAPES[1], "heads")
    torch.library.opcheck(OP, (q.contiguous(), k, v.contiguous(), mask, scale))


@pytest.mark.interpret
def test_layout(poisoned):
    """Memory in the order of the projection that follows: the transpose after it copies nothing."""
    args = case(SHAPES[1])
    for o in (attention_aten(*args), attention_triton(*args), OP(*args)):
        assert o.shape == (1, 4, 3, 14)
        assert o.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("mask", ("none", "decode", "rows"))
@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
def test_compiles(dynamic, mask):
    args = case((2, 6, 2, 3, 100, 16, 16), mask)
    compile = torch.compile(fullgraph=True, backend="aot_eager", dynamic=dynamic)
    fn = compile(lambda *args: OP(*args).transpose(1, 2).flatten(2))
    expected = attention_reference(*args).transpose(1, 2).flatten(2)
    assert_close("o", fn(*args), expected, 2e-6)


@pytest.mark.interpret
def test_no_tokens_and_empty_cache():
    assert attention_triton(*case((1, 4, 2, 0, 10, 8, 8))).shape == (1, 4, 0, 8)
    assert not attention_triton(*case((1, 4, 2, 1, 0, 8, 8))).any()


def test_errors():
    q, k, v, _, scale = case((2, 4, 2, 3, 10, 8, 8))
    with pytest.raises(FactorError, match="must be a multiple"):
        OP(q[:, :3], k, v, None, scale)
    with pytest.raises(FactorError, match="k has shape"):
        OP(q, k[..., :4], v, None, scale)
    with pytest.raises(FactorError, match="v has shape"):
        OP(q, k, v[:, :, :4], None, scale)
    with pytest.raises(FactorError, match="must broadcast"):
        OP(q, k, v, torch.ones(2, 2, 3, 10, dtype=torch.bool), scale)
    with pytest.raises(FactorError, match="bool or floating"):
        OP(q, k, v, torch.ones(3, 10, dtype=torch.int32), scale)
    with pytest.raises(FactorError, match=r"torch\.float16"):
        OP(q, k.half(), v, None, scale)


@pytest.mark.gpu
class TestGpu:
    @pytest.mark.parametrize("mask", MASKS)
    @pytest.mark.parametrize("tokens", (1, 5, 64, 200))
    @pytest.mark.parametrize("dims", ((64, 64), (80, 80), (128, 128), (256, 256), (192, 128)))
    def test_op(self, dims, tokens, mask):
        args = case((2, 32, 8, tokens, 1500, *dims), mask, dtype=torch.bfloat16, device="cuda")
        if tokens == 200 and mask == "finfo":
            pytest.skip("prefill narrows an fp32 mask to bf16")
        actual, expected = OP(*args), attention_reference(*args)
        if (
            tokens == 200
        ):  # prefill is torch's attention, which makes up values where nothing is seen
            assert actual.isfinite().all()
            seen = (expected != 0).any(-1)
            actual, expected = actual[seen], expected[seen]
        assert_close("o", actual, expected, 1e-2)

    @pytest.mark.parametrize("splits", (1, 4, None))
    @pytest.mark.parametrize("mask", ("none", "decode"))
    def test_pdl_is_bitwise(self, mask, splits):
        args = case((1, 32, 8, 1, 4096, 128, 128), mask, dtype=torch.bfloat16, device="cuda")
        on, off = (attention_triton(*args, pdl=pdl, splits=splits) for pdl in (True, False))
        assert torch.equal(on, off)

    def test_hidden_blocks(self):
        q, k, v, _, scale = case(
            (1, 32, 8, 1, 32768, 128, 128), dtype=torch.bfloat16, device="cuda"
        )
        mask = torch.zeros(1, 1, 1, 32768, dtype=torch.bool, device="cuda")
        mask[..., :1024] = True
        expected = attention_reference(q, k[:, :, :1024], v[:, :, :1024], None, scale)
        k[:, :, 1024:] = v[:, :, 1024:] = float("nan")
        assert_close("o", OP(q, k, v, mask, scale), expected, 1e-2)

    def test_cuda_graph(self):
        args = case((1, 32, 8, 1, 4096, 128, 128), "decode", dtype=torch.bfloat16, device="cuda")
        OP(*args)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o = OP(*args)
        args[0].normal_()
        graph.replay()
        assert_close("o", o, attention_reference(*args), 1e-2)
