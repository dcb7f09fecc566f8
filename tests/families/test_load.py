"""Every family's layout, written by `checkpoints.py`, loads exactly, and nothing half-loads or half-writes."""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
import sys

import checkpoints
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import fsvd_compile
from fsvd_compile import LowRankLinear, cli, families
from fsvd_compile.errors import CheckpointError

FAMILIES = {
    "svd-llm": "SVD-LLM", "ablinear": "LowRankArena", "asvd": "ASVD", "dobi": "Dobi-SVD",
    "basis-sharing": "Basis Sharing", "lems": "LEMS / KFAC-SVD", "zs-svd": "ZS-SVD", "aa-svd": "AA-SVD",
    "fwsvd": "FWSVD", "pela": "PELA", "palu": "Palu",
}  # fmt: skip


@pytest.fixture(scope="module", params=list(checkpoints.GENERATORS))
def checkpoint(request, tmp_path_factory):
    return checkpoints.GENERATORS[request.param](tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def ablinear(tmp_path):
    """A checkpoint to damage, and its one weight file."""
    made = checkpoints.GENERATORS["ablinear-llama"](tmp_path / "source")
    (weights,) = pathlib.Path(made.path).glob("*.safetensors")
    return made, weights


@torch.no_grad()
def output(model):
    ids = torch.arange(1, 19).view(2, 9)
    out = model(ids)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def factorized(model):
    return {
        n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, LowRankLinear)
    }


def test_outputs_ranks_and_shared_factors(checkpoint):
    model = families.load(checkpoint.path, dtype=torch.float32)
    assert error(output(model), output(checkpoint.reference)) < 2e-6
    modules = factorized(model)
    assert {name: module.rank for name, module in modules.items()} == checkpoint.ranks
    for group in checkpoint.shared:
        assert len({id(modules[name].v.weight) for name in group}) == 1
    shared = sum(len(group) - 1 for group in checkpoint.shared)
    assert len({id(m.v.weight) for m in modules.values()}) == len(modules) - shared
    assert not model.training and type(model) is type(checkpoint.reference)


def test_inspect(checkpoint):
    found = families.inspect(checkpoint.path)
    assert found.family == FAMILIES[checkpoint.family]
    assert {row.name: row.rank for row in found.rows} == checkpoint.ranks
    assert sum(row.shared for row in found.rows) == sum(len(g) - 1 for g in checkpoint.shared)
    dense = sum(p.numel() for p in checkpoint.reference.parameters())
    assert found.dense_parameters == pytest.approx(dense, rel=0.05)
    assert found.family in str(found) and "dense" in str(found)


def test_saved_and_read_by_transformers(checkpoint, tmp_path):
    model = families.load(checkpoint.path, dtype=torch.float32)
    fsvd_compile.save(model, tmp_path / "out")
    read = type(model).from_pretrained(tmp_path / "out")
    assert torch.equal(output(read), output(model))
    again = families.load(tmp_path / "out")
    assert torch.equal(output(again), output(model))
    # Shared factors stand once, in memory and on disk, also after transformers' own saving.
    shared = sum(len(group) - 1 for group in checkpoint.shared)
    read.save_pretrained(tmp_path / "twice")
    for folder in ("out", "twice"):
        state = load_file(tmp_path / folder / "model.safetensors")
        assert sum(k.endswith(".v.weight") for k in state) == len(checkpoint.ranks) - shared
        reread = type(model).from_pretrained(tmp_path / folder)
        assert torch.equal(output(reread), output(model))
        assert (
            len({id(m.v.weight) for m in factorized(reread).values()})
            == len(factorized(reread)) - shared
        )


@pytest.mark.parametrize(
    "name", ["svd-llm-llama-pickle", "basis-sharing-llama", "ablinear-llama-bf16"]
)
def test_dtypes(name, tmp_path):
    made = checkpoints.GENERATORS[name](tmp_path)
    plain = families.load(made.path)
    assert len({p.dtype for p in plain.parameters()}) == 1
    half = families.load(made.path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert error(output(half).float(), output(made.reference)) < 0.05


def saves(module):
    m, n = module.out_features, module.in_features
    return module.rank * (m + n) < m * n


def test_a_loaded_model_compiles(cheap, tmp_path):
    made = checkpoints.GENERATORS["svd-llm-llama-pickle"](tmp_path)
    model = families.load(made.path, dtype=torch.float32).requires_grad_(False)
    compiled = torch.compile(model, backend="flashsvd")
    assert error(output(compiled), output(made.reference)) < 2e-6
    found = fsvd_compile.explain(compiled, torch.arange(1, 19).view(2, 9))
    worth = [m for m in factorized(model).values() if saves(m)]
    assert found.matches()["lowrank_chain"] == len(worth) > 15


@pytest.mark.parametrize("order", ["fsvd_compile, transformers", "transformers, fsvd_compile"])
def test_from_pretrained_in_a_new_process(order, tmp_path):
    model = families.load(
        checkpoints.GENERATORS["basis-sharing-llama"](tmp_path / "in").path, dtype=torch.float32
    )
    fsvd_compile.save(model, tmp_path / "out")
    torch.save(output(model), tmp_path / "logits.pt")
    script = f"""
import {order}, torch
model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / "out")!r}, device_map="cpu")
with torch.no_grad():
    logits = model(torch.arange(1, 19).view(2, 9)).logits
assert torch.equal(logits, torch.load({str(tmp_path / "logits.pt")!r}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_command_line(ablinear, tmp_path, capsys):
    made, _ = ablinear
    (made.path / "tokenizer_config.json").write_text("{}")
    assert cli.main(["inspect", str(made.path)]) == 0
    assert "LowRankArena" in capsys.readouterr().out
    out = tmp_path / "out"
    assert cli.main(["convert", str(made.path), str(out), "--dtype", "float32"]) == 0
    assert (out / "tokenizer_config.json").is_file() and (out / "README.md").is_file()
    assert not list(out.glob("*.py")), "remote code is not taken along"
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert error(output(model), output(made.reference)) < 2e-6
    assert cli.main(["convert", str(made.path), str(out)]) == 2
    assert "exists" in capsys.readouterr().err
    assert cli.main(["convert", str(made.path), str(out), "--overwrite"]) == 0
    assert cli.main(["inspect", str(out)]) == 0
    assert cli.main(["inspect", str(tmp_path / "nowhere")]) == 2


def change(file, edit):
    state = load_file(file)
    edit(state)
    save_file({k: t.contiguous() for k, t in state.items()}, file, metadata={"format": "pt"})


def drop_embedding(state):
    del state["model.embed_tokens.weight"]


def poison(state):
    key = next(k for k in state if k.endswith("ALinear.weight"))
    state[key] = state[key].clone()
    state[key].view(-1)[3] = float("nan")


def cut(state):
    key = next(k for k in state if k.endswith("ALinear.weight"))
    state[key] = state[key][:-1]


def add_unknown(state):
    state["model.layers.0.adapter.weight"] = torch.ones(3)


def make_codes(state):
    key = next(k for k in state if k.endswith("ALinear.weight"))
    state[key] = state[key].to(torch.uint8)


def only_dense(state):
    for key in list(state):
        if "Linear.weight" in key:
            del state[key]


def no_second_factors(state):
    for key in list(state):
        if key.endswith("ALinear.weight"):
            state[f"{key.removesuffix('ALinear.weight')}C.weight"] = state.pop(key)


def unheard_of(state):
    no_second_factors(state)
    for key in list(state):
        if key.endswith("BLinear.weight"):
            state[f"{key.removesuffix('BLinear.weight')}D.weight"] = state.pop(key)


@pytest.mark.parametrize(
    "edit,says",
    [
        (drop_embedding, "missing: model.embed_tokens.weight"),
        (poison, "NaN or inf"),
        (cut, "do not multiply to"),
        (add_unknown, "belong to no module: model.layers.0.adapter.weight"),
        (make_codes, "quantized without the scales"),
        (only_dense, "no factor pair"),
        (no_second_factors, r"Dobi-SVD or ASVD or LowRankArena, after which \d+ are named"),
        (unheard_of, "nearest family is none: no name is that of a factor"),
    ],
)
def test_bad_tensors(ablinear, edit, says):
    made, weights = ablinear
    change(weights, edit)
    with pytest.raises(CheckpointError, match=says):
        families.load(made.path)


@pytest.mark.parametrize(
    "config,says",
    [
        ({"model_type": "nonesuch", "architectures": ["NoneSuch"]}, "Set both in config.json"),
        ({"hidden_size": 64}, "do not multiply to"),
        ({"num_hidden_layers": 9}, "are missing"),
    ],
)
def test_a_config_that_contradicts_the_tensors(ablinear, config, says):
    made, _ = ablinear
    file = made.path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    with pytest.raises(CheckpointError, match=says):
        families.load(made.path)


@pytest.mark.parametrize("told", [True, False])
def test_square_factors_in_the_order_of_the_others(told, tmp_path):
    """`ALinear` is V in Dobi-SVD and U in LowRankArena: of a square pair only its neighbours' shapes tell which."""
    names = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.o_proj")
    generate = checkpoints._seeded(checkpoints.dobi_directory, full=names, told=told)
    made = generate(tmp_path)
    model = families.load(made.path, dtype=torch.float32)
    assert error(output(model), output(made.reference)) < 2e-6
    assert factorized(model)[names[0]].rank == 48
    assert families.inspect(made.path).family == ("Dobi-SVD" if told else "LowRankArena")


def test_missing_files(ablinear, tmp_path):
    made, weights = ablinear
    with pytest.raises(CheckpointError, match="no such file"):
        families.load(tmp_path / "nowhere")
    (made.path / "config.json").rename(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        families.load(made.path)
    (made.path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        families.load(made.path)
    weights.write_bytes(weights.read_bytes()[:-100])
    shutil.copy(tmp_path / "config.json", made.path / "config.json")
    with pytest.raises(CheckpointError, match="damaged"):
        families.load(made.path)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        families.load(made.path)


def test_a_missing_shard_is_named(tmp_path):
    made = checkpoints.GENERATORS["ablinear-llama-sharded-tied"](tmp_path)
    shard = sorted(made.path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        families.load(made.path)


def test_save_refuses_before_it_writes(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=88,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    dense = transformers.LlamaForCausalLM(config)
    with pytest.raises(CheckpointError, match="no LowRankLinear"):
        fsvd_compile.save(dense, tmp_path / "out")
    with pytest.raises(CheckpointError, match="no transformers model"):
        fsvd_compile.save(torch.nn.Linear(2, 2), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_is_interrupted_never_looks_finished(ablinear, tmp_path, monkeypatch):
    """A full disk, or an interrupt, while the weights are written: what was there before is there still."""
    made, _ = ablinear
    model = families.load(made.path)
    out = tmp_path / "out"
    fsvd_compile.save(model, out)
    before = sorted(f.name for f in out.iterdir())

    def full(self, folder, **kwargs):
        (pathlib.Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    def interrupted(self, folder, **kwargs):
        raise KeyboardInterrupt

    for fails, raised in ((full, CheckpointError), (interrupted, KeyboardInterrupt)):
        monkeypatch.setattr(type(model), "save_pretrained", fails)
        with pytest.raises(raised):
            fsvd_compile.save(model, out, overwrite=True)
        with pytest.raises(raised):
            fsvd_compile.save(model, tmp_path / "new")
    assert sorted(f.name for f in out.iterdir()) == before
    assert sorted(f.name for f in tmp_path.iterdir()) == ["out", "source"]
    assert getattr(model.config, "quantization_config", None) is not None  # it came from `load`
