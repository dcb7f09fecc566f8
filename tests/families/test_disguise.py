"""Dense weights of low rank are found and taken apart; nothing else is."""

from __future__ import annotations

import functools
import logging
import pathlib

import checkpoints
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fsvd_compile import LowRankLinear, cli, families
from fsvd_compile.errors import CheckpointError
from fsvd_compile.families.disguise import undisguised

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SHAPES = ((48, 48), (24, 48), (88, 48), (48, 88), (320, 64), (257, 129))


def product(m, n, rank, seed=0):
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(m, rank, generator=generator, dtype=torch.float64)
    return 0.02 * u @ torch.randn(rank, n, generator=generator, dtype=torch.float64)


def with_spectrum(m, n, values, seed=0):
    generator = torch.Generator().manual_seed(seed)
    u, v = (
        torch.linalg.qr(torch.randn(d, len(values), generator=generator, dtype=torch.float64)).Q
        for d in (m, n)
    )
    return u * values @ v.T


def most(m, n):
    """The largest rank below break-even."""
    return (m * n - 1) // (m + n)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_taken_apart(shape, dtype):
    for rank in (1, 3, most(*shape) // 2, most(*shape)):
        weight = product(*shape, rank).to(dtype)
        found = undisguised("w", weight)
        assert found.rank == rank and found.u.dtype == found.v.dtype == dtype
        again = found.u.double() @ found.v.double()
        error = (again - weight.double()).norm() / weight.double().norm()
        assert found.error == pytest.approx(error.item(), rel=1e-6)
        assert error < torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_others_are_left(shape, dtype):
    size = min(shape)
    i = torch.arange(size, dtype=torch.float64)
    weights = {
        "random": torch.randn(shape, generator=torch.Generator().manual_seed(1)),
        "above break-even": product(*shape, most(*shape) + 1),
        "1/i": with_spectrum(*shape, 1 / (1 + i)),
        "1/i^2": with_spectrum(*shape, 1 / (1 + i) ** 2),
        "exponential": with_spectrum(*shape, torch.exp2(-i)),
        "a tail above the noise": product(*shape, 5)
        + 64 * torch.finfo(dtype).eps * with_spectrum(*shape, torch.ones(size)),
    }
    for name, weight in weights.items():
        assert undisguised(name, weight.to(dtype)) is None, name


def test_precision_is_that_of_the_values():
    """A 16-bit model saved in fp32 has the noise of 16 bits."""
    for dtype in (torch.float16, torch.bfloat16):
        found = undisguised("w", product(48, 88, 11).to(dtype).float())
        assert found.rank == 11 and found.u.dtype == torch.float32
        assert found.error < torch.finfo(dtype).eps / 2


def test_extreme_weights():
    assert undisguised("zeros", torch.zeros(48, 48)).error == 0
    assert undisguised("codes", torch.zeros(48, 48, dtype=torch.uint8)) is None
    assert undisguised("one output", torch.randn(1, 48)) is None
    for scale in (1e-4, 1e3):  # below fp16's normal numbers, and large
        found = undisguised("scaled", (scale * product(48, 88, 5) / 0.02).to(torch.float16))
        assert found is None or found.error < 1e-3
    with pytest.raises(CheckpointError, match=r"w\.x holds NaN"):
        undisguised("w.x", torch.full((48, 48), float("nan")))


@pytest.fixture(params=list(checkpoints.DISGUISED))
def made(request, tmp_path):
    return checkpoints.DISGUISED[request.param](tmp_path / "source")


@torch.no_grad()
def output(model):
    return model(torch.arange(1, 19).view(2, 9)).logits


def ranks(model):
    return {n: m.rank for n, m in model.named_modules() if isinstance(m, LowRankLinear)}


def test_load_inspect_and_convert(made, tmp_path, caplog):
    with pytest.raises(CheckpointError, match="refactor=True"):
        families.load(made.path)
    found = families.inspect(made.path)
    assert {r.name: r.rank for r in found.disguised} == made.ranks and not found.rows
    assert "dense in disguise" in str(found) and "dense: lm_head" in str(found)
    assert not families.inspect(made.path, spectra=False).disguised
    with caplog.at_level(logging.INFO, logger="fsvd_compile.families"):
        model = families.load(made.path, refactor=True, dtype=torch.float32)
    assert ranks(model) == made.ranks
    assert "recovered from a dense weight" in caplog.text
    # The noise of 14 layers' rounding, of which only fp32's is too small to see.
    bound = 40 * max(r.error for r in found.disguised)
    assert (output(model) - output(made.reference)).norm() < bound * output(made.reference).norm()
    done = families.convert(made.path, tmp_path / "out", refactor=True)
    assert {r.name: r.rank for r in done.recovered} == made.ranks and not done.disguised
    assert done.parameters < found.parameters == done.dense_parameters
    assert ranks(type(model).from_pretrained(tmp_path / "out")) == made.ranks


def test_conv1d(tmp_path):
    """GPT-2 stores its weights transposed, the square ones too."""
    model = checkpoints._gpt2()
    block = model.transformer.h[1]
    for linear, rank in ((block.attn.c_proj, 7), (block.mlp.c_fc, 11)):
        linear.weight.data = product(*linear.weight.shape, rank).float()
    model.save_pretrained(tmp_path)
    loaded = families.load(tmp_path, refactor=True)
    assert ranks(loaded) == {"transformer.h.1.attn.c_proj": 7, "transformer.h.1.mlp.c_fc": 11}
    torch.testing.assert_close(output(loaded), output(model), rtol=1e-4, atol=1e-5)


def test_beside_factors_of_another_family(tmp_path):
    made = checkpoints.GENERATORS["ablinear-llama-bf16"](tmp_path)
    dense = next(name for name in families.inspect(made.path).dense if "mlp" in name)
    (file,) = pathlib.Path(made.path).glob("*.safetensors")
    state = load_file(file)
    state[f"{dense}.weight"] = product(*state[f"{dense}.weight"].shape, 9).to(torch.bfloat16)
    save_file(state, file, metadata={"format": "pt"})
    assert ranks(families.load(made.path)) == made.ranks
    model = families.load(made.path, refactor=True)
    assert ranks(model) == made.ranks | {dense: 9}
    expected = families.load(made.path)
    torch.testing.assert_close(output(model), output(expected), rtol=0.1, atol=0.1)


def test_what_cannot_be_refactored(tmp_path):
    full = checkpoints._llama()
    full.save_pretrained(tmp_path / "full")
    assert "dense in disguise" not in str(families.inspect(tmp_path / "full"))
    with pytest.raises(CheckpointError, match="none of 15 dense weights is of low rank"):
        families.load(tmp_path / "full", refactor=True)
    full.model.layers[1].mlp.down_proj.weight.data[3, 4] = float("nan")
    full.save_pretrained(tmp_path / "nan")
    for call in (families.inspect, functools.partial(families.load, refactor=True)):
        with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj holds NaN"):
            call(tmp_path / "nan")


def test_command_line(tmp_path, capsys):
    made = checkpoints.DISGUISED["fp16"](tmp_path / "source")
    assert cli.main(["inspect", str(made.path)]) == 0
    assert "dense in disguise: model.layers.*.self_attn.q_proj" in capsys.readouterr().out
    assert cli.main(["inspect", "--skip-spectra", str(made.path)]) == 0
    assert "disguise" not in capsys.readouterr().out
    assert cli.main(["convert", str(made.path), str(tmp_path / "out")]) == 2
    assert cli.main(["convert", "--refactor", str(made.path), str(tmp_path / "out")]) == 0
    assert "recovered from a dense weight" in capsys.readouterr().out
    assert ranks(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")) == made.ranks
