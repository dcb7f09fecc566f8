"""Factors stored as 8-bit codes or in blocks: what is exact, what is multiplied out, what is refused."""

from __future__ import annotations

import functools
import json
import pathlib
import shutil
import zipfile

import checkpoints
import pytest
import torch
from safetensors.torch import load_file, save_file

from fsvd_compile import LowRankLinear, families
from fsvd_compile.errors import CheckpointError
from fsvd_compile.families.codes import dequantized, dynamic_map

REMAPPED = "remapping_weight.pt"
Q, K, DOWN = (
    f"model.layers.1.{name}" for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
)


def map_by_bits() -> torch.Tensor:
    """The signed dynamic type bit by bit: a sign, zeros for the decade, a one, a linear fraction."""
    values = []
    for code in range(128):
        bits = f"{code:07b}"
        decade = len(bits) - len(bits.lstrip("0"))
        fraction = bits[decade + 1 :]
        if decade == 7:
            values += [0.0, 1.0]
            continue
        parts = 2 ** len(fraction)
        part = int(fraction or "0", 2)
        value = (0.1 + 0.9 * (part + 0.5) / parts) * 10.0**-decade
        values += [value, -value]
    return torch.tensor(sorted(values))


def test_the_dynamic_map():
    table = dynamic_map()
    torch.testing.assert_close(table, map_by_bits(), rtol=3e-7, atol=0)
    assert table.dtype == torch.float32 and len(set(table.tolist())) == 256
    assert torch.equal(table, table.sort().values)
    # Zero and one have no negative twin; all others have.
    twins = table[(table != 0) & (table != 1)]
    assert torch.equal(twins, -twins.flip(0)) and len(twins) == 254
    assert table[-1] == 1 and table[0] == pytest.approx(-0.99296875)
    # Values known from the type's publications: the next to one, and the least positive one.
    assert table[-2] == pytest.approx(0.99296875) and table[table > 0].min() == pytest.approx(
        5.5e-7
    )


def test_codes_are_near_what_they_were():
    rows = torch.randn(7, 500, generator=torch.Generator().manual_seed(0))
    again = dequantized(*checkpoints._quantized(rows, dynamic_map()))
    scale = rows.abs().amax(dim=1, keepdim=True)
    # Half a step of the widest fraction, 0.9 / 64 / 2 of the scale, and 1 at the end, rounded to fp16.
    assert ((again - rows).abs() <= 0.0075 * scale).all()


@torch.no_grad()
def output(model):
    return model(torch.arange(1, 19).view(2, 9)).logits


def ranks(model):
    return {n: m.rank for n, m in model.named_modules() if isinstance(m, LowRankLinear)}


def write(tmp_path, generator, *args, **options):
    return checkpoints._seeded(generator, *args, **options)(tmp_path / "source")


def test_what_is_no_smaller_as_factors_is_dense_and_told(tmp_path):
    made = checkpoints.GENERATORS["dobi-llama-remapped"](tmp_path / "dobi")
    found = families.inspect(made.path, spectra=False)
    assert found.multiplied and not {*found.multiplied} & {*made.ranks}
    assert {*found.multiplied, "lm_head"} == {*found.dense} and "multiplied out" in str(found)
    made = checkpoints.GENERATORS["palu-llama-some-above-break-even"](tmp_path / "palu")
    found = families.inspect(made.path, spectra=False)
    assert found.multiplied == {f"model.layers.{i}.self_attn.v_proj": 23 for i in range(2)}


def test_all_dense_after_loading(tmp_path):
    """Dobi-SVD's published Llama-7B at 0.8 is: it loads as the dense model it is, and is not saved as factors."""
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    made = write(
        tmp_path,
        checkpoints.dobi_remapped,
        ranks=dict.fromkeys(kinds, 40) | {"k_proj": 24, "v_proj": 24},
    )
    assert not made.ranks
    assert families.inspect(made.path, spectra=False).family == "Dobi-SVD"
    model = families.load(made.path, dtype=torch.float32)
    torch.testing.assert_close(output(model), output(made.reference), rtol=1e-4, atol=1e-4)
    assert not ranks(model)
    with pytest.raises(CheckpointError, match="no LowRankLinear"):
        families.convert(made.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_dense_weights_beside_the_codes(tmp_path):
    """OPT's MLP layers are in the model's file too; Dobi-SVD's loader takes the codes."""
    build = functools.partial(checkpoints._opt)
    made = write(tmp_path, checkpoints.dobi_remapped, build)
    state = torch.load(made.path / "pytorch_model.bin")
    assert "model.decoder.layers.0.fc1.weight" in state
    # Biases of attention layers are in no file, as the family writes them.
    with pytest.raises(
        CheckpointError, match=r"missing: model\.decoder\.layers\.0\.self_attn.*bias"
    ):
        families.load(made.path)
    for name, parameter in made.reference.named_parameters():
        if "self_attn" in name and name.endswith("bias"):
            state[name] = parameter.data.half()
    torch.save(state, made.path / "pytorch_model.bin")
    model = families.load(made.path, dtype=torch.float32)
    assert ranks(model) == made.ranks
    torch.testing.assert_close(output(model), output(made.reference), rtol=1e-4, atol=1e-4)


def drop(name):
    return lambda mapping: mapping[Q].pop(name)


def put(name, part, value):
    return lambda mapping: mapping[name].update({part: value(mapping[name][part])})


@pytest.mark.parametrize(
    "edit,says",
    [
        (drop("us_quan"), "has not all of us_quan"),
        (drop("vt_absmax"), "has not all of"),
        (put(Q, "us_quan", lambda t: t[:, :-1]), "us_quan is"),
        (put(Q, "us_quan", lambda t: t.short()), r"uint8"),
        (put(Q, "us_quan", lambda t: t[0]), "us_quan is"),
        (put(K, "vt_quan", lambda t: t[:-1]), "vt_quan is"),
        (put(K, "us_absmax", lambda t: t[:-1]), "us_absmax is"),
        (put(Q, "us_absmax", lambda t: t * float("nan")), "us_absmax holds NaN"),
        (put(DOWN, "tuple_info", lambda t: (t[0], t[1] * float("inf"))), "tuple_info holds NaN"),
        (put(DOWN, "tuple_info", lambda t: None), "tuple_info is NoneType"),
        (put(DOWN, "tuple_info", lambda t: t[1]), "tuple_info is NoneType"),
        (put(DOWN, "tuple_info", lambda t: (t[0], t[1].T)), "tuple_info is"),
        (put(DOWN, "tuple_info", lambda t: ("us", t[1])), "names 'us'"),
        (put(Q, "tuple_info", lambda t: ("us", torch.ones(2))), "names 'us'"),
        (lambda mapping: mapping.update({"model.layers.7.q": mapping[Q]}), "no linear module"),
        (lambda mapping: mapping.update({Q: None}), "has not all of"),
        (lambda mapping: mapping.pop(Q), f"missing: {Q}"),
        (lambda mapping: mapping.clear(), "not a dict of modules"),
    ],
)
def test_bad_codes(tmp_path, edit, says):
    made = checkpoints.GENERATORS["dobi-llama-remapped"](tmp_path)
    mapping = torch.load(made.path / REMAPPED)
    edit(mapping)
    torch.save(mapping, made.path / REMAPPED)
    with pytest.raises(CheckpointError, match=says):
        families.load(made.path)


def test_damaged_and_hostile_code_files(tmp_path):
    made = checkpoints.GENERATORS["dobi-llama-remapped"](tmp_path)
    file = made.path / REMAPPED
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match="cannot be read as tensors"):
        families.load(made.path)
    torch.save({Q: pathlib.PurePosixPath("/")}, file)
    with pytest.raises(CheckpointError, match="cannot be read as tensors"):
        families.load(made.path)


def test_a_text_is_no_checkpoint(tmp_path):
    (tmp_path / "text.txt").write_text("hello")
    with pytest.raises(
        CheckpointError, match=r"cannot be read as tensors: it is neither .* \(a zip\)"
    ):
        families.inspect(tmp_path / "text.txt")


VT, U = f"{K}.VT.weight", f"{K}.U"


@pytest.mark.parametrize(
    "edit,says",
    [
        (lambda s: s.pop(f"{U}.0.weight"), "no U.0.weight"),
        (lambda s: s.pop(f"{U}.1.bias"), "no U.1.bias"),
        (lambda s: (s.pop(f"{U}.1.weight"), s.pop(f"{U}.1.bias")), "VT"),
        (lambda s: s.update({VT: s[VT][:-1].clone()}), "ranks that add up"),
        (lambda s: s.update({f"{U}.1.weight": s[f"{U}.1.weight"][:-1].clone()}), "equal rows"),
        (lambda s: s.update({f"{U}.1.bias": s[f"{U}.1.bias"][:-1].clone()}), "equal rows"),
        (lambda s: s[f"{U}.1.weight"].fill_(float("nan")), "holds NaN"),
        (lambda s: s.update({VT: s[VT].to(torch.uint8)}), "uint8"),
        (lambda s: s.pop(VT), "no factor pair|belong to no module|missing"),
    ],
)
def test_bad_groups(tmp_path, edit, says):
    made = checkpoints.GENERATORS["palu-llama-bias"](tmp_path)
    (file,) = pathlib.Path(made.path).glob("*.safetensors")
    state = load_file(file)
    edit(state)
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=says):
        families.load(made.path)


def test_groups_that_the_config_contradicts(tmp_path):
    made = checkpoints.GENERATORS["palu-llama"](tmp_path)
    file = made.path / "config.json"
    config = json.loads(file.read_text())
    config["head_wise_ranks"][K][0] += 1
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="head_wise_ranks of the config says"):
        families.load(made.path)


def test_a_fused_palu_model_is_refused(tmp_path):
    """With V's U folded into o_proj the values have another size: no layer of the plain model."""
    made = checkpoints.GENERATORS["palu-llama"](tmp_path)
    (file,) = pathlib.Path(made.path).glob("*.safetensors")
    state = load_file(file)
    key = "model.layers.0.self_attn.o_proj.weight"
    state[key] = torch.ones(48, 20, dtype=torch.float16)
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="have another shape"):
        families.load(made.path)


def edit_info(file, old, new):
    """Replaces bytes of a pickled model's pickle, whose classes are nowhere to be saved from again."""
    with zipfile.ZipFile(file) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data.replace(old, new) if name.endswith("data.pkl") else data)


@pytest.mark.parametrize(
    "edit,says",
    [
        ((b"bnb_rowwise_uint8", b"bnb_colwise_uint8"), "mapping_info describes"),
        ((b"layer1.mlp.up_proj", b"layer9.mlp.up_proj"), "'layer9.mlp.up_proj' of kind"),
        ((b"lowrank", b"lowtank"), "of kind 'lowtank'"),
        ((b"u_absmax", b"u_abssum"), "codes and scales are .*NoneType"),
        ((b"mapping_info", b"mapping_none"), "quantized without the scales"),
    ],
)
def test_bad_rowwise_codes(tmp_path, edit, says):
    made = checkpoints.GENERATORS["zs-svd-llama-pickle-8-bit"](tmp_path)
    edit_info(made.path, *edit)
    with pytest.raises(CheckpointError, match=says):
        families.load(made.path)


AA = "model_layers_1_self_attn_q_proj"


@pytest.mark.parametrize(
    "kind,part,value,says",
    [
        ("directories", "V", None, r"U\.pt \(48, 9\), V\.pt None"),
        ("directories", "V", torch.ones(9, 48), r"takes U\.pt \[48, r\]"),
        ("directories", "U", torch.ones(48, 9) * float("inf"), "NaN or inf"),
        ("directories", "S", torch.ones(9), r"and S\.pt"),
        ("directories-8-bit", "VK_q", None, "has not all of"),
        ("directories-8-bit", "UK_absmax", torch.ones(3), "us_absmax is"),
    ],
)
def test_bad_directories(tmp_path, kind, part, value, says):
    made = checkpoints.GENERATORS[f"aa-svd-llama-{kind}"](tmp_path)
    file = made.path / AA / f"{part}.pt"
    if value is None:
        file.unlink()
    else:
        torch.save(value, file)
    with pytest.raises(CheckpointError, match=says):
        families.load(made.path)


def test_trained_norms_are_of_their_shape(tmp_path):
    made = checkpoints.GENERATORS["aa-svd-llama-directories"](tmp_path)
    torch.save(
        {"weight": torch.ones(3)}, made.path / "model_layers_0_input_layernorm/state_dict.pt"
    )
    with pytest.raises(CheckpointError, match="has no weight of the shape"):
        families.load(made.path)
    shutil.rmtree(made.path / "model_layers_0_input_layernorm")
    families.load(made.path)  # the base's norm
    (made.path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors"):
        families.load(made.path)


def test_codes_are_those_of_bitsandbytes():
    """Where that is installed, which the tests do not ask for."""
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    x = torch.randn(5, 64)
    assert torch.equal(functional.create_dynamic_map(signed=True).float(), dynamic_map())
    for row in x:
        quantized, state = functional.quantize_blockwise(row, blocksize=64)
        ours = dequantized(quantized.view(1, -1), state.absmax)
        assert torch.equal(ours.view(-1), functional.dequantize_blockwise(quantized, state))
