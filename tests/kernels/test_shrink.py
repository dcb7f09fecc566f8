"""fsvd::shrink against its reference: ATen, the Triton kernels, the op itself."""

from __future__ import annotations

import pytest
import torch
from harness import assert_close
from opcases import LIMITS, STORAGE, stored

from fsvd_compile.errors import FactorError
from fsvd_compile.kernels import _triton, attention, shrink_aten, shrink_reference, shrink_triton
from fsvd_compile.phase import Phase

OP = torch.ops.fsvd.shrink.default
TOKENS = (1, 2, 3, 17, 65)


def case(
    shape,
    ranks,
    *,
    k=100,
    dtype=torch.float32,
    norm="none",
    norm_weight=True,
    bias=True,
    storage="contiguous",
    device="cpu",
):
    """Arguments of one call; a mean and a spread that make a wrong norm visible."""
    make = {"dtype": dtype, "device": device}
    x = torch.randn(*shape, k, **make) * 3 + 1
    weights = [stored(torch.randn(r, k, **make) / k**0.5, storage) for r in ranks]
    # The first is left out, so that missing and present biases meet in one launch.
    biases = [torch.randn(r, **make) if bias and i else None for i, r in enumerate(ranks)]
    has = norm != "none" and norm_weight
    return (
        x,
        weights,
        biases,
        norm,
        torch.randn(k, **make) if has else None,
        torch.randn(k, **make) if has and norm == "layer" else None,
        1e-5,
        1.0 if norm == "rms" else 0.0,
    )


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("norm", ("none", "rms", "layer"))
def test_aten(dtype, norm, tokens):
    args = case((tokens,), (13, 37), dtype=dtype, norm=norm)
    assert_close("y", shrink_aten(*args), shrink_reference(*args), LIMITS[dtype])


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("ranks", ((13,), (13, 37, 8)), ids=str)
def test_aten_storage(storage, ranks):
    args = case((2, 3), ranks, storage=storage, norm="rms")
    assert_close("y", shrink_aten(*args), shrink_reference(*args), 2e-6)


def test_reference_is_torchs_norm():
    x, weights, biases, *_ = case((4,), (13,), bias=False)
    w, b = torch.randn(100), torch.randn(100)
    layer = torch.nn.functional.layer_norm(x, (100,), w, b, 1e-5) @ weights[0].t()
    rms = torch.nn.functional.rms_norm(x, (100,), w, 1e-5) @ weights[0].t()
    assert_close(
        "layer", shrink_reference(x, weights, biases, "layer", w, b, 1e-5, 0.0), layer, 2e-6
    )
    assert_close("rms", shrink_reference(x, weights, biases, "rms", w, None, 1e-5, 0.0), rms, 2e-6)


@pytest.mark.interpret
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("norm", ("none", "rms", "layer"))
def test_triton(interpreted_dtype, norm, tokens, poisoned):
    args = case((tokens,), (13, 37), dtype=interpreted_dtype, norm=norm)
    limit = LIMITS[interpreted_dtype]
    assert_close("y", shrink_triton(*args), shrink_reference(*args), limit)


@pytest.mark.interpret
@pytest.mark.parametrize("phase", (Phase.DECODE, Phase.FEW), ids=lambda p: p.value)
@pytest.mark.parametrize("storage", STORAGE)
def test_triton_storage(storage, phase, poisoned):
    args = case((2,), (13, 37, 8), storage=storage, norm="rms")
    assert_close("y", shrink_triton(*args, phase=phase), shrink_reference(*args), 2e-6)


@pytest.mark.interpret
@pytest.mark.parametrize("phase", (Phase.DECODE, Phase.FEW), ids=lambda p: p.value)
@pytest.mark.parametrize("ranks", ((40,), (8, 5, 3, 24), (7, 0, 9, 1, 2, 30)), ids=str)
def test_triton_counts(ranks, phase, poisoned):
    """One weight, four, and more than a launch takes, one of rank 0."""
    args = case((3,), ranks, k=37, norm="rms", norm_weight=False)
    assert_close("y", shrink_triton(*args, phase=phase), shrink_reference(*args), 2e-6)


@pytest.mark.interpret
def test_triton_mixed_storage(poisoned):
    x, weights, *rest = case((2,), (13, 37, 8))
    weights = [stored(w, how) for w, how in zip(weights, STORAGE, strict=False)]
    args = (x, weights, *rest)
    assert_close("y", shrink_triton(*args), shrink_reference(*args), 2e-6)


@pytest.mark.interpret
@pytest.mark.parametrize("norm", ("rms", "layer"))
@pytest.mark.parametrize("tokens", (1, 2))
def test_triton_long_k(tokens, norm, poisoned):
    """Rows longer than a single tile loop over K, the statistic as well."""
    args = case((tokens,), (5, 3), k=16500, norm=norm)
    assert_close("y", shrink_triton(*args), shrink_reference(*args), 2e-6)


@pytest.mark.interpret
def test_triton_views(poisoned):
    """x as a slice of something wider, and transposed."""
    args = case((3, 2), (13,), k=100)
    x = torch.randn(3, 2, 130)[..., 7:107]
    args = (x, *args[1:])
    assert_close("slice", shrink_triton(*args), shrink_reference(*args), 2e-6)
    args = (x.transpose(0, 1), *args[1:])
    assert_close("transposed", shrink_triton(*args), shrink_reference(*args), 2e-6)


@pytest.mark.interpret
@pytest.mark.parametrize("tokens", (1, 17))
def test_norm_parameters_with_gaps(tokens, poisoned):
    args = list(case((tokens,), (13, 9), norm="layer"))
    args[4:6] = (stored(p[:, None], "strided")[:, 0] for p in args[4:6])
    assert args[4].stride() == (2,)
    assert_close("y", shrink_triton(*args), shrink_reference(*args), LIMITS[torch.float32])


@pytest.mark.interpret
@pytest.mark.parametrize("phase", (Phase.DECODE, Phase.FEW), ids=lambda p: p.value)
def test_biases_with_gaps_and_of_one_number(phase, poisoned):
    x, weights, _, *norm = case((2,), (13, 9))
    biases = [stored(torch.randn(13, 1), "strided")[:, 0], torch.randn(1).expand(9)]
    assert [b.stride() for b in biases] == [(2,), (0,)]
    args = x, weights, biases, *norm
    assert_close("y", shrink_triton(*args, phase=phase), shrink_reference(*args), 2e-6)


@pytest.mark.interpret
def test_triton_interpreted_bf16(poisoned):
    """The interpreter holds bf16 as raw bits: right only because each load widens its values."""
    for phase in (Phase.DECODE, Phase.FEW):
        args = case((2,), (13,), dtype=torch.bfloat16, norm="rms")
        assert_close("y", shrink_triton(*args, phase=phase), shrink_reference(*args), 1e-2)


@pytest.mark.parametrize("shape", ((5,), (2, 3), (1, 1)), ids=str)
@pytest.mark.parametrize("ranks", ((13,), (13, 37)), ids=str)
def test_opcheck(shape, ranks):
    torch.library.opcheck(OP, case(shape, ranks, norm="rms"))


def test_opcheck_permuted():
    x, weights, *rest = case((2, 3), (13,), norm="layer", storage="transposed")
    torch.library.opcheck(OP, (x.transpose(0, 1), weights, *rest))


@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
def test_compiles(dynamic):
    x, *rest = case((2, 3), (13, 37), norm="rms")
    fn = torch.compile(
        lambda x: OP(x, *rest) + 1, fullgraph=True, backend="aot_eager", dynamic=dynamic
    )
    assert_close("y", fn(x), shrink_reference(x, *rest) + 1, 2e-6)


def test_no_tokens():
    args = case((0,), (13, 37))
    assert shrink_aten(*args).shape == (0, 50)


@pytest.mark.interpret
def test_no_tokens_triton():
    args = case((2, 0), (13, 37))
    assert shrink_triton(*args).shape == (2, 0, 50)


def test_errors():
    x, w = torch.randn(2, 10), torch.randn(3, 10)

    def call(x=x, weights=(w,), biases=(None,), norm="none", g=None, h=None):
        return OP(x, list(weights), list(biases), norm, g, h, 0.0, 0.0)

    with pytest.raises(FactorError, match="ends in 10"):
        call(weights=(torch.randn(3, 11),))
    with pytest.raises(FactorError, match="0 weights"):
        call(weights=(), biases=())
    with pytest.raises(FactorError, match=r"asks for \[3\]"):
        call(biases=(torch.randn(4),))
    with pytest.raises(FactorError, match=r"torch\.float16"):
        call(weights=(w.half(),))
    with pytest.raises(FactorError, match="none, rms, layer"):
        call(norm="batch")
    with pytest.raises(FactorError, match=r"must be \[10\]"):
        call(norm="rms", g=torch.randn(3))
    with pytest.raises(FactorError, match="norm_bias"):
        call(norm="rms", h=torch.randn(10))


@pytest.mark.gpu
class TestGpu:
    @pytest.mark.parametrize("tokens", (1, 2, 8, 64, 300))
    @pytest.mark.parametrize("k, ranks", ((4096, (1024,) * 3), (11008, (1488,)), (1234, (819, 5))))
    def test_op(self, k, ranks, tokens):
        norm = "none" if k == 11008 else "rms"
        args = case((tokens,), ranks, k=k, dtype=torch.bfloat16, norm=norm, device="cuda")
        assert_close("y", OP(*args), shrink_reference(*args), 1e-2)

    @pytest.mark.parametrize("storage", STORAGE)
    @pytest.mark.parametrize("tokens", (1, 2, 8))
    def test_storage(self, storage, tokens):
        args = case(
            (tokens,), (512, 99), k=1024, dtype=torch.float16, storage=storage, device="cuda"
        )
        assert_close("y", OP(*args), shrink_reference(*args), 2e-3)

    @pytest.mark.parametrize("k, ranks", ((88, (22,)), (4096, (1024, 512))))
    @pytest.mark.parametrize("tokens", (1, 2, 14))
    def test_fp32(self, tokens, k, ranks):
        args = case((tokens,), ranks, k=k, device="cuda")
        assert_close("y", OP(*args), shrink_reference(*args), 2e-6)

    @pytest.mark.parametrize("tokens", (1, 8))
    def test_pdl_is_bitwise(self, tokens):
        args = case((tokens,), (1024,) * 2, k=4096, dtype=torch.bfloat16, norm="rms", device="cuda")
        on, off = (shrink_triton(*args, pdl=pdl) for pdl in (True, False))
        assert torch.equal(on, off)

    @pytest.mark.parametrize("tokens", (1, 8))
    def test_cuda_graph(self, tokens):
        args = case((tokens,), (1024,), k=4096, dtype=torch.bfloat16, norm="rms", device="cuda")
        OP(*args)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = OP(*args)
        args[0].normal_()
        graph.replay()
        assert_close("y", y, shrink_reference(*args), 1e-2)


def test_columns_that_are_further_apart_than_32_bits_are_copied():
    """A kernel multiplies a column by its stride in 32 bits; on "meta", where such a tensor has no memory."""
    far = torch.empty_strided((1, 40), (1, 1 << 26), device="meta")
    near = torch.empty_strided((1, 32), (1, 1 << 26), device="meta")
    assert _triton.near(far).stride(1) == 1 and _triton.near(near) is near
    mask = torch.empty_strided((1, 1, 1, 40), (1, 1, 1, 1 << 26), dtype=torch.bool, device="meta")
    assert attention.mask_argument(mask, (1, 2, 1, 40))[1].stride(3) == 1
    assert attention.mask_argument(mask[..., :32], (1, 2, 1, 32))[1].stride(3) == 1 << 26
