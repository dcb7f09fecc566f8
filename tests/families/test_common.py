"""The common format: what is damaged is found, what is shared stays shared, what was there stays there."""

from __future__ import annotations

import copy
import json
import pathlib
import pickle
import shutil
import subprocess
import sys

import checkpoints
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import fsvd_compile
from fsvd_compile import LowRankLinear, factorize, families
from fsvd_compile.errors import CheckpointError, VersionError


def llama(layers=2, **more):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=88, num_hidden_layers=layers, num_attention_heads=4, **more
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@torch.no_grad()
def output(model):
    out = model(torch.arange(1, 19).view(2, 9))
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


@pytest.fixture
def saved(tmp_path):
    model = llama()
    factorize(model, 0.5, progress=False)
    fsvd_compile.save(model, tmp_path / "out")
    return model, tmp_path / "out"


def edit_weights(folder, edit):
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, edit):
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


DOWN = "model.layers.1.mlp.down_proj"


def nan(state):
    state[f"{DOWN}.u.weight"][0, 0] = float("nan")


@pytest.mark.parametrize(
    "edit,says",
    [
        (lambda s: s.pop(f"{DOWN}.u.weight"), "its factors are u None"),
        (lambda s: s.pop("model.norm.weight"), r"missing: model\.norm\.weight"),
        (nan, "NaN or inf"),
        (lambda s: s.update({f"{DOWN}.u.weight": s[f"{DOWN}.u.weight"][:, :-1].clone()}), "rank"),
    ],
)
def test_damaged_weights_are_found(saved, edit, says):
    _, folder = saved
    edit_weights(folder, edit)
    with pytest.raises(CheckpointError, match=says):
        families.load(folder)


def entry(config):
    return config["quantization_config"]


@pytest.mark.parametrize(
    "edit,says",
    [
        (lambda c: entry(c)["modules"].pop(DOWN), "missing"),
        (lambda c: entry(c)["modules"][DOWN].update(rank=5), "rank 5"),
        (lambda c: entry(c).update(modules=3), "no dict of dicts"),
        (lambda c: c.update(hidden_act="nonesuch"), "nonesuch"),
        (lambda c: c.update(num_attention_heads=0), "config"),
        (lambda c: c.update(architectures=5), "name no model|config is not valid"),
    ],
)
def test_damaged_configs_are_found(saved, edit, says):
    model, folder = saved
    edit_config(folder, edit)
    if says == "missing":  # a module that the config forgets is found by its factors
        assert torch.equal(output(families.load(folder)), output(model))
        return
    with pytest.raises(CheckpointError, match=says):
        families.load(folder)


def test_a_config_cannot_ask_for_foreign_kernels(saved, monkeypatch):
    _, folder = saved
    edit_config(folder, lambda c: c.update(attn_implementation="evil/kernel"))
    assert families.load(folder).config._attn_implementation == "sdpa"


def test_first_factors_on_one_memory_and_owners_in_any_order(tmp_path):
    """Written once whatever the sorted order of names ("layers.10" before "layers.9"), and shared again."""
    model = llama(layers=12)
    v = torch.randn(6, 48)
    layers = model.model.layers
    for i in (9, 10, 11):
        layers[i].self_attn.q_proj = LowRankLinear.from_factors(torch.randn(48, 6), v)
    layers[0].self_attn.q_proj = LowRankLinear.from_factors(torch.randn(48, 6), torch.randn(6, 48))
    layers[0].self_attn.k_proj = LowRankLinear.from_factors(
        torch.randn(48, 6), layers[0].self_attn.q_proj.v.weight
    )
    fsvd_compile.save(model, tmp_path / "out")
    for read in (families.load(tmp_path / "out"), type(model).from_pretrained(tmp_path / "out")):
        assert torch.equal(output(read), output(model))
        owners = {id(read.model.layers[i].self_attn.q_proj.v.weight) for i in (9, 10, 11)}
        assert len(owners) == 1


def test_factorized_further_and_saved_by_transformers(tmp_path):
    dense = llama()
    factorize(dense, 0.5, select=["*.mlp.*"], progress=False)
    fsvd_compile.save(dense, tmp_path / "mlp")
    model = type(dense).from_pretrained(tmp_path / "mlp")
    factorize(model, 0.5, select=["*.self_attn.*"], progress=False)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(output(type(dense).from_pretrained(tmp_path / "again")), output(model))
    assert model.half().dtype == torch.float16


def test_gpt2_whose_initialisation_reads_weights(tmp_path):
    config = transformers.GPT2Config(vocab_size=97, n_embd=48, n_layer=2, n_head=4, n_positions=64)
    model = transformers.GPT2LMHeadModel(config).eval()
    factorize(model, 0.5, progress=False)
    fsvd_compile.save(model, tmp_path / "out")
    for read in (families.load(tmp_path / "out"), type(model).from_pretrained(tmp_path / "out")):
        assert torch.equal(output(read), output(model))
    assert "GPT2LMHeadModel.from_pretrained" in (tmp_path / "out" / "README.md").read_text()


def test_falcon_whose_linear_layers_are_a_class_of_their_own(tmp_path):
    config = transformers.FalconConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, bias=True
    )
    torch.manual_seed(0)
    model = transformers.FalconForCausalLM(config).eval()
    dense = model.transformer.h[0].mlp.dense_h_to_4h
    assert len(factorize(model, 0.8, progress=False).modules) == 8
    x, factorized = torch.randn(3, 32), model.transformer.h[0].mlp.dense_h_to_4h
    left = (factorized(x) - dense(x)).norm() / dense(x).norm()
    values = torch.linalg.svdvals(dense.weight)
    assert left < 2 * values[factorized.rank :].norm() / values.norm()
    model.save_pretrained(tmp_path)
    for read in (families.load, type(model).from_pretrained):
        assert torch.equal(output(read(tmp_path)), output(model))


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize("loaded", [True, False])
def test_a_copy_describes_itself(loaded, copied, saved, tmp_path):
    """Also when the model that it was copied from has become another."""
    model = families.load(saved[1]) if loaded else saved[0]
    twin = copied(model)
    expected = output(model)
    down = model.get_submodule(DOWN)
    u, v = down.u.weight[:, :5].contiguous(), down.v.weight[:5].contiguous()
    model.get_submodule(DOWN.rpartition(".")[0]).down_proj = LowRankLinear.from_factors(u, v)
    for each, wanted in ((twin, expected), (model, output(model)), (model.model, None)):
        folder = tmp_path / str(id(each))
        each.save_pretrained(folder)
        wanted = output(each) if wanted is None else wanted
        for read in (families.load, type(each).from_pretrained):
            assert torch.equal(output(read(folder)), wanted)


def test_a_dense_model_of_a_factorized_ones_config(saved, tmp_path):
    """Its config.json describes factors that its files do not hold: nothing is made up for them."""
    model, _ = saved
    type(model)(model.config).save_pretrained(tmp_path / "dense")
    with pytest.raises(
        CheckpointError, match=r"14 modules are factorized.*delete quantization_config"
    ):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    edit_config(tmp_path / "dense", lambda config: config.pop("quantization_config"))
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not any(isinstance(module, LowRankLinear) for module in dense.modules())


def test_an_interrupted_import_of_transformers():
    """The format is registered by the import that succeeds."""
    script = """
import sys
import fsvd_compile
sys.modules["transformers.quantizers.quantizer_awq"] = None
try:
    import transformers.quantizers.auto
except ImportError:
    pass
else:
    sys.exit("imported")
del sys.modules["transformers.quantizers.quantizer_awq"]
import transformers.quantizers.auto as auto
assert "flashsvd" in auto.AUTO_QUANTIZER_MAPPING
assert not [f for f in sys.meta_path if type(f).__module__.startswith("fsvd_compile")]
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_model_that_is_dense_again(saved, tmp_path):
    model = saved[0]
    for name, module in [*model.named_modules()]:
        if isinstance(module, LowRankLinear):
            dense = torch.nn.Linear(module.in_features, module.out_features, bias=False)
            dense.weight.data = module.dense_weight()
            model.set_submodule(name, dense)
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    assert torch.equal(output(type(model).from_pretrained(tmp_path / "dense")), output(model))


def test_generation_settings_and_tied_heads(tmp_path):
    made = checkpoints.GENERATORS["ablinear-llama-sharded-tied"](tmp_path)
    folder = pathlib.Path(made.path)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9], "do_sample": true}')
    model = families.load(folder)
    assert model.generation_config.eos_token_id == [7, 9] and model.generation_config.do_sample
    families.convert(folder, tmp_path / "out")
    assert families.load(tmp_path / "out").generation_config.eos_token_id == [7, 9]


def test_a_bias_that_is_missing_is_named(tmp_path):
    made = checkpoints.GENERATORS["asvd-opt"](tmp_path)
    folder = pathlib.Path(made.path)
    (file,) = [f for f in folder.iterdir() if f.suffix in (".safetensors", ".bin")]
    state = load_file(file) if file.suffix == ".safetensors" else torch.load(file)
    key = next(k for k in state if k.endswith("ALinear.bias"))
    del state[key]
    save_file({k: t.clone() for k, t in state.items()}, folder / "model.safetensors")
    if file.suffix == ".bin":
        file.unlink()
    with pytest.raises(CheckpointError, match=key.replace("ALinear.", "").replace(".", r"\.")):
        families.load(folder)


def test_what_torch_compile_wrapped(tmp_path):
    made = checkpoints.GENERATORS["ablinear-llama"](tmp_path / "in")
    (file,) = pathlib.Path(made.path).glob("*.safetensors")
    state = {f"_orig_mod.{k}": t for k, t in load_file(file).items()}
    save_file(state, file, metadata={"format": "pt"})
    loaded = families.load(made.path, dtype=torch.float32)
    torch.testing.assert_close(output(loaded), output(made.reference), rtol=1e-4, atol=1e-4)


def test_the_old_directory_stays_until_the_new_one_is_there(saved, monkeypatch):
    model, folder = saved
    before = sorted(f.name for f in folder.iterdir())
    plain = pathlib.Path.rename

    def fails(self, target):
        if pathlib.Path(target) == folder and not self.name.endswith(".replaced"):
            raise OSError("no such luck")
        return plain(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", fails)
    with pytest.raises(CheckpointError, match="no such luck"):
        fsvd_compile.save(model, folder, overwrite=True)
    assert sorted(f.name for f in folder.iterdir()) == before
    monkeypatch.undo()
    shutil.rmtree(folder / "nothing", ignore_errors=True)
    fsvd_compile.save(model, folder, overwrite=True)
    assert sorted(f.name for f in folder.iterdir()) == before
    assert [f.name for f in folder.parent.iterdir()] == [folder.name]


def test_a_transformers_that_is_too_old(saved, monkeypatch):
    """4.57 builds and saves models, and has no table of what is tied."""
    start = transformers.PreTrainedModel.post_init

    def post_init(model):
        start(model)
        del model.all_tied_weights_keys

    monkeypatch.setattr(transformers.PreTrainedModel, "post_init", post_init)
    for read in (fsvd_compile.load, transformers.AutoModelForCausalLM.from_pretrained):
        with pytest.raises(VersionError, match=r"read with 5\.0 or later: pip install -U"):
            read(saved[1])


def test_a_whole_file_beside_the_index_of_shards_that_were_there(saved):
    model, folder = saved
    model.save_pretrained(folder, max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").is_file()
    for shard in folder.glob("model-*"):
        shard.unlink()
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(output(families.load(folder)), output(model))
