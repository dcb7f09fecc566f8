"""LoRA adapters: exact as further ranks of factors, merged into dense weights, else refused."""

from __future__ import annotations

import json
import pathlib

import checkpoints
import pytest
import torch
from safetensors.torch import load_file, save_file

import fsvd_compile
from fsvd_compile import LowRankLinear, cli, families
from fsvd_compile.errors import CheckpointError

BASES = (
    "ablinear-llama-bias", "svd-llm-llama-pickle", "svd-llm-opt-pickle-mid-bias", "basis-sharing-llama",
    "lems-llama", "palu-llama-bias", "dobi-llama-remapped", "asvd-llama-head", "fwsvd-bert",
)  # fmt: skip


@torch.no_grad()
def output(model):
    out = model(torch.arange(1, 19).view(2, 9))
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def error(model, reference):
    expected = output(reference)
    return ((output(model) - expected).norm() / expected.norm()).item()


def ranks(model):
    return {
        n: m.rank
        for n, m in model.named_modules(remove_duplicate=False)
        if isinstance(m, LowRankLinear)
    }


def adapt(tmp_path, base, targets=None, **options):
    made = checkpoints.GENERATORS[base](tmp_path / "base")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        targets = list(made.ranks) if targets is None else targets
        return made, checkpoints.lora(tmp_path / "lora", made.reference, targets, **options)


@pytest.mark.parametrize("base", BASES)
def test_joined_to_factors(base, tmp_path):
    made, adapter = adapt(tmp_path, base)
    assert error(families.load(made.path, dtype=torch.float32), made.reference) > 1e-2
    model = families.load(made.path, adapter=adapter, dtype=torch.float32)
    assert error(model, made.reference) < 2e-6
    config = json.loads((adapter / "adapter_config.json").read_text())
    grown = {n: r + config["rank_pattern"].get(n, 4) for n, r in made.ranks.items()}
    assert ranks(model) == grown
    fsvd_compile.save(model, tmp_path / "out")
    assert torch.equal(output(type(model).from_pretrained(tmp_path / "out")), output(model))


@pytest.mark.parametrize(
    "options",
    [{"use_rslora": True}, {"safe": False}, {"dtype": torch.bfloat16}, {"dtype": torch.float16}],
    ids=str,
)
def test_kinds_of_adapters(options, tmp_path):
    made, adapter = adapt(tmp_path, "ablinear-llama", **options)
    model = families.load(made.path, adapter=adapter, dtype=torch.float32)
    # s B of a 16-bit adapter is rounded once more unless the factors are wider.
    assert error(model, made.reference) < (3e-3 if "dtype" in options else 2e-6)


def test_only_what_is_adapted_loses_its_shared_factor(tmp_path):
    made = checkpoints.GENERATORS["basis-sharing-llama"](tmp_path / "count")
    group = next(iter(made.shared))
    name = min(group)
    made, adapter = adapt(tmp_path, "basis-sharing-llama", [name])
    modules = dict(families.load(made.path, adapter=adapter).named_modules(remove_duplicate=False))
    for others in made.shared:
        owners = {id(modules[n].v.weight) for n in others}
        assert len(owners) == 1 + (name in others)


def test_merged_into_dense_weights_beside_factors(tmp_path):
    base = "ablinear-llama"
    found = families.inspect(checkpoints.GENERATORS[base](tmp_path / "look").path, spectra=False)
    made, adapter = adapt(tmp_path, base, found.dense, merged_dtype=torch.float16)
    model = families.load(made.path, adapter=adapter, dtype=torch.float32)
    assert error(model, made.reference) < 2e-4  # a rounding to fp16 may fall to the other side
    assert ranks(model) == made.ranks
    done = families.convert(made.path, tmp_path / "out", adapter=adapter)
    assert {*done.adapted.merged} == {f"{name}.weight" for name in found.dense}
    assert "merged into" in str(done) and not done.adapted.joined


def test_an_adapted_head_is_no_longer_tied(tmp_path):
    made = checkpoints.GENERATORS["ablinear-llama-sharded-tied"](tmp_path / "base")
    embedding = made.reference.get_input_embeddings().weight.clone()
    made.reference.lm_head.weight = torch.nn.Parameter(embedding.clone())
    adapter = checkpoints.lora(tmp_path / "lora", made.reference, ["lm_head"])
    model = families.load(made.path, adapter=adapter, dtype=torch.float32)
    assert not model.config.tie_word_embeddings
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    assert error(model, made.reference) < 2e-3


def test_on_a_dense_base(tmp_path):
    model = checkpoints._gpt2()
    model.save_pretrained(tmp_path / "base")
    targets = ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_proj"]
    adapter = checkpoints.lora(tmp_path / "lora", model, targets, fan_in_fan_out=True)
    loaded = families.load(tmp_path / "base", adapter=adapter)
    assert error(loaded, model) < 2e-6 and not ranks(loaded)


def test_before_dense_weights_are_taken_apart(tmp_path):
    made = checkpoints.DISGUISED["fp32"](tmp_path / "base")
    name = max(made.ranks, key=lambda n: made.reference.get_submodule(n).weight.shape[0])
    adapter = checkpoints.lora(tmp_path / "lora", made.reference, [name])
    model = families.load(made.path, adapter=adapter, refactor=True)
    assert ranks(model) == made.ranks | {name: made.ranks[name] + 4}
    assert error(model, made.reference) < 2e-6


def test_on_the_factors_themselves(tmp_path):
    """Trained on SVD-LLM's own modules, as its second stage is, and not merged."""
    made = checkpoints.GENERATORS["svd-llm-llama-saved"](tmp_path / "base")
    rank, name = made.ranks["model.layers.0.self_attn.q_proj"], "model.layers.0.self_attn.q_u_proj"
    adapter = tmp_path / "lora"
    fake = torch.nn.Module()
    fake.get_submodule = {name: torch.nn.Linear(rank, 48, bias=False)}.__getitem__
    checkpoints.lora(adapter, fake, [name])
    state = load_file(adapter / "adapter_model.safetensors")
    b, a = (state[f"base_model.model.{name}.lora_{side}.weight"] for side in "BA")
    plain = families.load(made.path, dtype=torch.float32).model.layers[0].self_attn.q_proj
    adapted = families.load(made.path, adapter=adapter, dtype=torch.float32)
    adapted = adapted.model.layers[0].self_attn.q_proj
    torch.testing.assert_close(adapted.u.weight, plain.u.weight + 6 / 4 * b @ a)
    assert torch.equal(adapted.v.weight, plain.v.weight) and adapted.rank == rank


def test_whole_tensors_of_an_adapter(tmp_path):
    made, adapter = adapt(tmp_path, "ablinear-llama", modules_to_save=["lm_head"])
    file = adapter / "adapter_model.safetensors"
    head = torch.randn(97, 48)
    save_file(load_file(file) | {"base_model.model.lm_head.weight": head}, file)
    made.reference.lm_head.weight.data = head
    assert (
        error(families.load(made.path, adapter=adapter, dtype=torch.float32), made.reference) < 2e-6
    )
    save_file(load_file(file) | {"base_model.model.lm_head.weight": head[:-1].clone()}, file)
    with pytest.raises(CheckpointError, match=r"brings lm_head\.weight \[96, 48\]"):
        families.load(made.path, adapter=adapter)


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


def edited(adapter, edit):
    state = load_file(adapter / "adapter_model.safetensors")
    edit(state)
    save_file({k: t.contiguous() for k, t in state.items()}, adapter / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "edit,says",
    [
        (lambda s: s.pop(f"{KEY}A.weight"), r"q_proj has lora_B \[48, 4\]"),
        (lambda s: s.update({f"{KEY}A.weight": s[f"{KEY}A.weight"][:-1]}), r"takes A \[r, in\]"),
        (
            lambda s: s.update({f"{KEY}A.weight": s[f"{KEY}A.weight"][:, :-1]}),
            r"adapted by a \[48, 47\]",
        ),
        (lambda s: s[f"{KEY}B.weight"].fill_(float("nan")), "holds NaN"),
        (
            lambda s: s.update({f"{KEY}A.other.weight": s[f"{KEY}A.weight"].clone()}),
            "more than one adapter",
        ),
        (lambda s: s.update({f"{KEY}magnitude_vector": torch.ones(3)}), "is not lora_A or lora_B"),
        (lambda s: s.update({"base_model.model.x.bias": torch.ones(3)}), "is not lora_A or lora_B"),
        (
            lambda s: s.update(
                {k.replace("layers.0", "layers.7"): s[k].clone() for k in list(s) if KEY in k}
            ),
            "no such",
        ),
        (lambda s: s.clear(), "no tensor"),
        (
            lambda s: s.update(
                {f"{KEY}A.weight": torch.ones(0, 48), f"{KEY}B.weight": torch.ones(48, 0)}
            ),
            "takes A",
        ),
    ],
)
def test_bad_tensors(edit, says, tmp_path):
    made, adapter = adapt(tmp_path, "ablinear-llama")
    edited(adapter, edit)
    with pytest.raises(CheckpointError, match=says):
        families.load(made.path, adapter=adapter)


@pytest.mark.parametrize(
    "config,says",
    [
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias='all'"),
        ({"init_lora_weights": "pissa"}, "'pissa'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"r": 7}, "rank 7"),
        ({"lora_alpha": None}, "alpha None"),
        ({"alpha_pattern": {"(": 3}}, "is no pattern"),
    ],
)
def test_bad_configs(config, says, tmp_path):
    made, adapter = adapt(tmp_path, "ablinear-llama", **{"rank_pattern": {}, **config})
    with pytest.raises(CheckpointError, match=says):
        families.load(made.path, adapter=adapter)


def test_missing_files_and_one_of_several_owners(tmp_path):
    made, adapter = adapt(tmp_path, "basis-sharing-llama")
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json"):
        families.load(made.path, adapter=tmp_path / "nowhere")
    (adapter / "adapter_model.safetensors").rename(tmp_path / "weights")
    with pytest.raises(CheckpointError, match="weight files: none"):
        families.load(made.path, adapter=adapter)
    basis = KEY.replace("q_proj", "q_basis")
    pair = {f"{basis}A.weight": torch.ones(4, 48), f"{basis}B.weight": torch.ones(31, 4)}
    save_file(pair, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="one tensor of several modules"):
        families.load(made.path, adapter=adapter)


def test_command_line(tmp_path, capsys):
    made, adapter = adapt(tmp_path, "ablinear-llama")
    out = tmp_path / "out"
    assert cli.main(["convert", str(made.path), str(out), "--adapter", str(adapter)]) == 0
    assert f"joined to the factors of {len(made.ranks)} modules" in capsys.readouterr().out
    assert error(families.load(out, dtype=torch.float32), made.reference) < 2e-3
    (pathlib.Path(adapter) / "adapter_config.json").unlink()
    assert (
        cli.main(["convert", str(made.path), str(out), "--adapter", str(adapter), "--overwrite"])
        == 2
    )
