"""fsvd::expand against its reference: ATen, the Triton kernels, the op itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from harness import assert_close
from opcases import LIMITS, STORAGE, stored

from fsvd_compile.errors import FactorError
from fsvd_compile.kernels import expand_aten, expand_reference, expand_triton
from fsvd_compile.kernels.expand import ACTIVATIONS, GATES
from fsvd_compile.phase import Phase

OP = torch.ops.fsvd.expand.default
TOKENS = (1, 2, 3, 17, 65)
PHASES = pytest.mark.parametrize("phase", (Phase.DECODE, Phase.FEW), ids=lambda p: p.value)


def case(
    shape,
    rows,
    ranks,
    *,
    dtype=torch.float32,
    activation="none",
    bias=True,
    residual=False,
    storage="contiguous",
    device="cpu",
):
    """Arguments of one call; z is a slice of a wider latent, with a gap in front of every block."""
    make = {"dtype": dtype, "device": device}
    offsets = [3 * (i + 1) + sum(ranks[:i]) for i in range(len(ranks))]
    z = torch.randn(*shape, offsets[-1] + ranks[-1] + 9, **make)[..., : offsets[-1] + ranks[-1]]
    weights = [
        stored(torch.randn(n, r, **make) / r**0.5, storage)
        for n, r in zip(rows, ranks, strict=True)
    ]
    biases = [torch.randn(n, **make) if bias and i != 1 else None for i, n in enumerate(rows)]
    n = rows[0] if activation.endswith("_mul") else sum(rows)
    # A transposed residual: the same values as a contiguous one, in another order.
    res = torch.randn(*shape[:-1], n, shape[-1], **make).transpose(-1, -2) if residual else None
    return z, weights, biases, offsets, res, activation


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("residual", (False, True), ids=("plain", "residual"))
def test_aten(dtype, residual, tokens):
    args = case((tokens,), (37, 64), (13, 100), dtype=dtype, residual=residual)
    assert_close("y", expand_aten(*args), expand_reference(*args), LIMITS[dtype])


@pytest.mark.parametrize("activation", ACTIVATIONS + GATES)
def test_aten_activation(dtype, activation):
    args = case((5,), (37, 37), (13, 19), dtype=dtype, activation=activation, residual=True)
    assert_close("y", expand_aten(*args), expand_reference(*args), LIMITS[dtype])


@pytest.mark.parametrize("storage", STORAGE)
def test_aten_storage(storage):
    args = case((2, 3), (37, 64, 5), (13, 100, 8), storage=storage)
    assert_close("y", expand_aten(*args), expand_reference(*args), 2e-6)


def test_reference_is_torchs_swiglu():
    args = case((4,), (37, 37), (13, 19), activation="silu_mul")
    z, (gate, up), biases, offsets, *_ = args
    z_gate, z_up = (z[..., o : o + r] for o, r in zip(offsets, (13, 19), strict=True))
    expected = F.silu(F.linear(z_gate, gate, biases[0])) * F.linear(z_up, up)
    assert_close("y", expand_reference(*args), expected, 2e-6)


@pytest.mark.interpret
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("residual", (False, True), ids=("plain", "residual"))
def test_triton(interpreted_dtype, residual, tokens, poisoned):
    args = case((tokens,), (37, 64), (13, 100), dtype=interpreted_dtype, residual=residual)
    limit = LIMITS[interpreted_dtype]
    assert_close("y", expand_triton(*args), expand_reference(*args), limit)


@PHASES
@pytest.mark.interpret
@pytest.mark.parametrize("activation", ACTIVATIONS[1:] + GATES)
def test_triton_activation(activation, phase, poisoned):
    args = case((2,), (37, 37), (13, 19), activation=activation, residual=True)
    assert_close("y", expand_triton(*args, phase=phase), expand_reference(*args), 2e-6)


@PHASES
@pytest.mark.interpret
@pytest.mark.parametrize("activation", ("none", "silu_mul"))
@pytest.mark.parametrize("storage", STORAGE)
def test_triton_storage(storage, activation, phase, poisoned):
    args = case((3,), (37, 37), (13, 24), storage=storage, activation=activation)
    assert_close("y", expand_triton(*args, phase=phase), expand_reference(*args), 2e-6)


@PHASES
@pytest.mark.interpret
@pytest.mark.parametrize("activation", ("none", "silu_mul"))
def test_biases_with_gaps_and_of_one_number(activation, phase, poisoned):
    z, weights, _, *rest = case((3,), (37, 37), (13, 24), activation=activation)
    biases = [stored(torch.randn(37, 1), "strided")[:, 0], torch.randn(1).expand(37)]
    assert [b.stride() for b in biases] == [(2,), (0,)]
    args = z, weights, biases, *rest
    assert_close("y", expand_triton(*args, phase=phase), expand_reference(*args), 2e-6)


@pytest.mark.interpret
@pytest.mark.parametrize("ranks", ((0,), (5, 0), (0, 5)))
def test_triton_rank_zero(ranks, poisoned):
    args = case((1,), (9,) * len(ranks), ranks)
    assert_close("y", expand_triton(*args), expand_reference(*args), 2e-6)


@pytest.mark.interpret
@pytest.mark.parametrize(
    "rank, gap, start",
    ((1, 0, 0), (7, 0, 0), (63, 0, 0), (65, 0, 1), (63, 1, 0), (9, 2, 0)),
)
def test_triton_rows_that_start_anywhere(rank, gap, start, poisoned):
    """Every distance of a row from a multiple of 16 bytes, with NaN on both sides of it."""
    room = torch.full((start + 19 * (rank + gap),), float("nan"), dtype=torch.float16)
    w = room[start:].view(19, rank + gap)[:, :rank].copy_(torch.randn(19, rank))
    z = torch.full((2, rank + 8), float("nan"), dtype=torch.float16)
    z[:, 3 : 3 + rank] = torch.randn(2, rank)
    for weights, act in (([w], "none"), ([w, w.roll(1, 0)], "silu_mul")):
        args = (z, weights, [None] * len(weights), [3] * len(weights), None, act)
        for tokens in (z[:1], z):
            y = expand_triton(tokens, *args[1:], phase=Phase.DECODE)
            assert_close("y", y, expand_reference(tokens, *args[1:]), LIMITS[torch.float16])


@PHASES
@pytest.mark.interpret
@pytest.mark.parametrize("count", (1, 3, 4, 5))
def test_triton_counts(count, phase, poisoned):
    rows, ranks = (7, 40, 8, 1, 19)[:count], (13, 37, 1, 24, 5)[:count]
    args = case((3,), rows, ranks, residual=True, bias=count > 1)
    assert_close("y", expand_triton(*args, phase=phase), expand_reference(*args), 2e-6)


@pytest.mark.interpret
@pytest.mark.parametrize("activation", ("none", "silu_mul"))
def test_triton_long_rank(activation, poisoned):
    """Ranks longer than a single tile, of which one ends a tile earlier."""
    args = case((2,), (5, 5), (16500, 100), activation=activation)
    assert_close("y", expand_triton(*args), expand_reference(*args), 2e-6)


@pytest.mark.interpret
@pytest.mark.parametrize("offset", (0, 1, 8))
def test_triton_strided_latent(offset, poisoned):
    z = torch.randn(3, 2 * (offset + 13))[:, ::2]
    args = (z, [torch.randn(37, 13)], [None], [offset], None, "none")
    for phase in (Phase.DECODE, Phase.FEW):
        assert_close("y", expand_triton(*args, phase=phase), expand_reference(*args), 2e-6)


@pytest.mark.interpret
def test_triton_large_values_stay_finite(poisoned):
    """Activations of values whose exponentials overflow."""
    for activation in ("silu", "gelu_tanh", "gelu"):
        z, weights, *rest = case((1,), (37,), (13,), activation=activation)
        args = (z * 1e4, weights, *rest)
        assert_close(activation, expand_triton(*args), expand_reference(*args), 2e-6)


@pytest.mark.interpret
def test_triton_interpreted_bf16(poisoned):
    for phase in (Phase.DECODE, Phase.FEW):
        args = case((2,), (37, 37), (13, 19), dtype=torch.bfloat16, activation="silu_mul")
        assert_close("y", expand_triton(*args, phase=phase), expand_reference(*args), 1e-2)


@pytest.mark.parametrize("shape", ((5,), (2, 3), (1, 1)), ids=str)
@pytest.mark.parametrize("activation", ("none", "gelu", "silu_mul"))
def test_opcheck(shape, activation):
    rows = (37, 37) if activation != "gelu" else (37,)
    args = case(shape, rows, (13, 8)[: len(rows)], activation=activation, residual=True)
    torch.library.opcheck(OP, args)


def test_opcheck_permuted():
    z, *rest = case((2, 3), (37,), (13,), storage="transposed")
    torch.library.opcheck(OP, (z.transpose(0, 1), *rest))


@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
def test_compiles(dynamic):
    z, *rest = case((2, 3), (37, 37), (13, 8), activation="silu_mul")
    compile = torch.compile(fullgraph=True, backend="aot_eager", dynamic=dynamic)
    fn = compile(lambda z: OP(z, *rest) + 1)
    assert_close("y", fn(z), expand_reference(z, *rest) + 1, 2e-6)


@pytest.mark.interpret
def test_no_tokens():
    args = case((0,), (37, 37), (13, 8), activation="silu_mul")
    assert expand_aten(*args).shape == expand_triton(*args).shape == (0, 37)


def test_errors():
    z, w = torch.randn(2, 10), torch.randn(4, 6)

    def call(weights=(w,), biases=(None,), offsets=(0,), residual=None, activation="none"):
        return OP(z, list(weights), list(biases), list(offsets), residual, activation)

    with pytest.raises(FactorError, match=r"z\[\.\.\., 5:11\]"):
        call(offsets=(5,))
    with pytest.raises(FactorError, match="2 offsets"):
        call(offsets=(0, 1))
    with pytest.raises(FactorError, match="exactly two blocks"):
        call(activation="silu_mul")
    with pytest.raises(FactorError, match="not known"):
        call(activation="swish")
    with pytest.raises(FactorError, match="nothing is broadcast"):
        call(residual=torch.randn(4))
    with pytest.raises(FactorError, match=r"asks for \[4\]"):
        call(biases=(torch.randn(5),))
    with pytest.raises(FactorError, match=r"torch\.float16"):
        call(weights=(w.half(),))


@pytest.mark.gpu
class TestGpu:
    @pytest.mark.parametrize("tokens", (1, 2, 8, 64, 300))
    @pytest.mark.parametrize(
        "rows, ranks, activation",
        (
            ((4096,) * 3, (1024,) * 3, "none"),
            ((11008,) * 2, (1488,) * 2, "silu_mul"),
            ((4096,), (1791,), "gelu"),
        ),
    )
    def test_op(self, rows, ranks, activation, tokens):
        args = case(
            (tokens,),
            rows,
            ranks,
            dtype=torch.bfloat16,
            activation=activation,
            residual=True,
            device="cuda",
        )
        assert_close("y", OP(*args), expand_reference(*args), 1e-2)

    @pytest.mark.parametrize("storage", STORAGE)
    @pytest.mark.parametrize("tokens", (1, 2, 8))
    def test_storage(self, storage, tokens):
        args = case(
            (tokens,), (512, 99), (96, 64), dtype=torch.float16, storage=storage, device="cuda"
        )
        assert_close("y", OP(*args), expand_reference(*args), 2e-3)

    @pytest.mark.parametrize("tokens", (1, 8))
    def test_pdl_is_bitwise(self, tokens):
        args = case(
            (tokens,),
            (11008,) * 2,
            (1488,) * 2,
            dtype=torch.bfloat16,
            activation="silu_mul",
            device="cuda",
        )
        on, off = (expand_triton(*args, pdl=pdl) for pdl in (True, False))
        assert torch.equal(on, off)

    @pytest.mark.parametrize("tokens", (1, 8))
    def test_chain_in_cuda_graph(self, tokens):
        """Dependent launches back to back: each expand reads what the shrink before it wrote."""
        x = torch.randn(tokens, 4096, dtype=torch.bfloat16, device="cuda")
        down = torch.randn(1024, 4096, dtype=torch.bfloat16, device="cuda") / 64
        up = torch.randn(4096, 1024, dtype=torch.bfloat16, device="cuda") / 32

        def chain(shrink, expand, x):
            for _ in range(16):
                z = shrink(x, [down], [None], "rms", None, None, 1e-5, 0.0)
                x = expand(z, [up], [None], [0], x, "none")
            return x

        chain(torch.ops.fsvd.shrink, OP, x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = chain(torch.ops.fsvd.shrink, OP, x)
        x.normal_()
        graph.replay()
        replayed = y.clone()
        graph.replay()
        assert torch.equal(replayed, y)
        from fsvd_compile.kernels import shrink_aten

        assert_close("y", y, chain(shrink_aten, expand_aten, x), 2e-2)
