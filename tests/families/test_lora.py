"""LoRA adapters: exact as further ranks of factors, merged into dense weights or kept beside them, else refused."""

from __future__ import annotations

import json
import pathlib

import checkpoints
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import fsvd_compile
from fsvd_compile import BranchedLinear, LowRankLinear, cli, factorize, families
from fsvd_compile.errors import CheckpointError
from fsvd_compile.families import native

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
        (
            {"a_setting_of_tomorrow": {"beta": 1}},
            r"a_setting_of_tomorrow=\{'beta': 1\}: only plain LoRA",
        ),
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


def branches(model):
    return {n: m.branch.rank for n, m in model.named_modules() if isinstance(m, BranchedLinear)}


def dense_llama(tmp_path, dtype=torch.float32, **config):
    """A dense base on disk, rounded to a dtype, and the same in fp32."""
    made = checkpoints.GENERATORS["ablinear-llama"](tmp_path / "factorized").reference
    model = type(made)(transformers.LlamaConfig(**{**made.config.to_dict(), **config})).eval()
    model.to(dtype).save_pretrained(tmp_path / "base")
    return type(model).from_pretrained(tmp_path / "base", dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_kept_beside_a_dense_base(dtype, tmp_path):
    """W x + s B (A x) in fp32, whatever the base was rounded to; merged, it is rounded with it."""
    reference = dense_llama(tmp_path, dtype)
    targets = ["lm_head", *(f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up", "down"))]
    weights = {n: reference.get_submodule(n).weight.clone() for n in targets}
    adapter = checkpoints.lora(tmp_path / "lora", reference, targets)
    base = tmp_path / "base"
    model = families.load(base, adapter=adapter, merge=False, dtype=torch.float32)
    assert error(model, reference) < 2e-6
    assert branches(model) == dict(zip(targets, (4, 3, 5, 4), strict=True))
    for name, weight in weights.items():
        module = model.get_submodule(name)
        assert torch.equal(module.base.weight, weight)
        dense = weight + module.branch.dense_weight()
        torch.testing.assert_close(dense, reference.get_submodule(name).weight, atol=1e-6, rtol=0)
    merged = families.load(base, adapter=adapter, dtype=torch.float32)
    assert not branches(merged)
    assert (error(merged, reference) > 1e-5) is (dtype != torch.float32)
    kept = families.load(base, adapter=adapter, merge=False)
    assert {p.dtype for p in kept.parameters()} == {dtype}


def test_branches_in_the_common_format(tmp_path):
    """Written by us and by transformers, read by both, with the factors of other modules."""
    found = families.inspect(
        checkpoints.GENERATORS["ablinear-llama"](tmp_path / "look").path, spectra=False
    )
    made, adapter = adapt(tmp_path, "ablinear-llama", [*found.dense, found.rows[0].name])
    out = tmp_path / "out"
    done = families.convert(made.path, out, adapter=adapter, merge=False, dtype=torch.float32)
    assert set(done.adapted.kept) == set(found.dense) and len(done.adapted.joined) == 1
    assert not done.adapted.merged
    assert f"kept beside {len(found.dense)} dense weights" in str(done)
    looked = families.inspect(out, spectra=False)
    text = str(looked)
    assert f"{len(found.rows)} factorized modules, {len(found.dense)} dense, " in text
    assert f"{len(found.dense)} of them with a branch" in text and "lm_head.branch" in text
    assert [r.name for r in looked.branches] == [f"{n}.branch" for n in found.dense]
    assert looked.dense_parameters == found.dense_parameters
    pairs = (*looked.rows, *looked.branches)
    extra = {r.name: r.rank * (r.in_features + r.out_features) for r in pairs}
    before = sum(r.rank * (r.in_features + r.out_features) for r in found.rows)
    assert looked.parameters == found.parameters + sum(extra.values()) - before
    assert looked.bytes == 4 * looked.parameters
    card = (out / "README.md").read_text()
    assert f"{len(found.rows)} linear layers are held as two factors" in card
    assert f"{len(found.dense)} linear layers are dense with a branch" in card
    model = families.load(out)
    assert error(model, made.reference) < 2e-6
    assert branches(model).keys() == set(found.dense)
    model.save_pretrained(tmp_path / "own")
    for folder in (out, tmp_path / "own"):
        for read in (type(model).from_pretrained(folder), families.load(folder)):
            assert torch.equal(output(read), output(model))
            assert branches(read) == branches(model) and ranks(read) == ranks(model)


def test_branches_of_gpt2(tmp_path):
    """Conv1D is a base like any other; its tied head is not."""
    reference = checkpoints._gpt2()
    reference.save_pretrained(tmp_path / "base")
    targets = ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_proj"]
    adapter = checkpoints.lora(tmp_path / "lora", reference, targets, fan_in_fan_out=True)
    model = families.load(tmp_path / "base", adapter=adapter, merge=False)
    assert error(model, reference) < 2e-6 and branches(model).keys() == set(targets)
    fsvd_compile.save(model, tmp_path / "out")
    assert torch.equal(output(type(model).from_pretrained(tmp_path / "out")), output(model))
    assert torch.equal(output(families.load(tmp_path / "out")), output(model))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["modules"].keys() == {f"{n}.branch" for n in targets}
    assert "held as two factors" not in (tmp_path / "out" / "README.md").read_text()
    adapter = checkpoints.lora(tmp_path / "head", reference, ["lm_head"])
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is .* tied to another"):
        families.load(tmp_path / "base", adapter=adapter, merge=False)


def test_a_further_adapter_on_a_branch(tmp_path):
    """Joined to the branch, or merged into the weight beside it."""
    reference = dense_llama(tmp_path)
    name = "model.layers.0.mlp.down_proj"
    first = checkpoints.lora(tmp_path / "first", reference, [name])
    out = tmp_path / "out"
    families.convert(tmp_path / "base", out, adapter=first, merge=False)
    second = checkpoints.lora(tmp_path / "second", reference, ["lm_head", name])
    for merge, expected in ((False, {name: 7, "lm_head": 4}), (True, {name: 4})):
        model = families.load(out, adapter=second, merge=merge)
        assert error(model, reference) < 2e-6 and branches(model) == expected


def test_a_base_that_is_low_rank_in_disguise_takes_its_branch(tmp_path):
    made = checkpoints.DISGUISED["fp32"](tmp_path / "base")
    name = max(made.ranks, key=lambda n: made.reference.get_submodule(n).weight.shape[0])
    adapter = checkpoints.lora(tmp_path / "lora", made.reference, [name])
    model = families.load(made.path, adapter=adapter, merge=False, refactor=True)
    assert ranks(model) == made.ranks | {name: made.ranks[name] + 4} and not branches(model)
    assert error(model, made.reference) < 2e-6
    done = families.convert(
        made.path, tmp_path / "out", adapter=adapter, merge=False, refactor=True
    )
    assert done.adapted.joined == {name: 4} and not done.adapted.kept


def test_factorized_beside_branches(tmp_path):
    reference = dense_llama(tmp_path)
    name = "model.layers.0.mlp.down_proj"
    adapter = checkpoints.lora(tmp_path / "lora", reference, [name])
    model = families.load(tmp_path / "base", adapter=adapter, merge=False)
    report = factorize(model, 0.5, progress=False)
    assert len(report.modules) == 13 and name in report.dense
    model.save_pretrained(tmp_path / "own")
    read = type(model).from_pretrained(tmp_path / "own")
    assert torch.equal(output(read), output(model)) and branches(read) == {name: 4}


def test_whole_tensors_beside_branches(tmp_path):
    reference = dense_llama(tmp_path)
    adapter = checkpoints.lora(
        tmp_path / "lora", reference, ["model.layers.0.mlp.up_proj"], modules_to_save=["lm_head"]
    )
    head = torch.randn(97, 48)
    edited(adapter, lambda s: s.update({"base_model.model.lm_head.weight": head}))
    reference.lm_head.weight.data = head
    model = families.load(tmp_path / "base", adapter=adapter, merge=False)
    assert error(model, reference) < 2e-6 and len(branches(model)) == 1


def test_branches_that_cannot_be_kept(tmp_path):
    made, adapter = adapt(tmp_path, "ablinear-llama")
    with pytest.raises(CheckpointError, match="merge=False says how an adapter is held"):
        families.load(made.path, merge=False)
    tied = dense_llama(tmp_path, tie_word_embeddings=True)
    head = checkpoints.lora(tmp_path / "head", tied, ["lm_head"])
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is .*\(merge=True\)"):
        families.convert(tmp_path / "base", out, adapter=head, merge=False)
    assert not out.exists()
    basis = checkpoints.GENERATORS["basis-sharing-llama"](tmp_path / "basis")
    key = KEY.replace("q_proj", "q_basis")
    pair = {f"{key}A.weight": torch.ones(4, 48), f"{key}B.weight": torch.ones(31, 4)}
    save_file(pair, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"q_basis\.weight is a factor itself"):
        families.load(basis.path, adapter=adapter, merge=False)


@pytest.mark.parametrize(
    "edit,says",
    [
        (lambda s, n: s.pop(f"{n}.branch.u.weight"), "its factors are u None"),
        (lambda s, n: s.pop(f"{n}.base.weight"), r"down_proj\.base\.weight is missing"),
        (lambda s, n: s[f"{n}.branch.v.weight"].fill_(float("nan")), "v of .* holds NaN"),
        (
            lambda s, n: s.update({f"{n}.branch.v.weight": torch.ones(4, 87)}),
            r"beside a \[48, 88\]",
        ),
        (lambda s, n: s.update({f"{n}.u.weight": torch.ones(48, 4)}), "belong to no module"),
    ],
)
def test_damaged_branches_are_found(edit, says, tmp_path):
    name, out = "model.layers.0.mlp.down_proj", tmp_path / "out"
    adapter = checkpoints.lora(tmp_path / "lora", dense_llama(tmp_path), [name])
    families.convert(tmp_path / "base", out, adapter=adapter, merge=False)
    state = load_file(out / "model.safetensors")
    edit(state, name)
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=says):
        families.load(out)


@pytest.mark.parametrize(
    "entries",
    [
        {"lm_head.branch": {"rank": 4, "bias": True}},
        {"lm_head.branch": {"rank": 4}, "lm_head": {"rank": 4}},
        {"model.norm.branch": {"rank": 4}},
        {"model.nothing.branch": {"rank": 4}},
    ],
    ids=str,
)
def test_entries_that_no_branch_can_be_made_of(entries):
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=88, num_hidden_layers=1, num_attention_heads=4
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    with pytest.raises(CheckpointError, match="config: "):
        native.swap_in(model, entries)


def test_command_line_without_merging(tmp_path, capsys):
    reference = dense_llama(tmp_path)
    name = "model.layers.0.mlp.down_proj"
    adapter = checkpoints.lora(tmp_path / "lora", reference, [name])
    out = tmp_path / "out"
    command = ["convert", str(tmp_path / "base"), str(out), "--no-merge"]
    assert cli.main(command) == 2 and not out.exists()
    assert cli.main([*command, "--adapter", str(adapter)]) == 0
    assert "kept beside 1 dense weights" in capsys.readouterr().out
    assert cli.main(["inspect", str(out), "--skip-spectra"]) == 0
    assert "1 of them with a branch" in capsys.readouterr().out
    assert error(families.load(out), reference) < 2e-6


def test_branches_made_by_hand(tmp_path):
    """Shared first factors stay shared; beside a head that is the embedding nothing is written."""
    model = checkpoints._gpt2()
    v = torch.randn(3, 48)
    layers = model.transformer.h
    for layer in layers:
        pair = LowRankLinear.from_factors(torch.randn(144, 3), v)
        layer.attn.c_attn = BranchedLinear(layer.attn.c_attn, pair)
    fsvd_compile.save(model, tmp_path / "out")
    for read in (type(model).from_pretrained(tmp_path / "out"), families.load(tmp_path / "out")):
        assert torch.equal(output(read), output(model))
        first, second = (layer.attn.c_attn.branch.v.weight for layer in read.transformer.h)
        assert first is second
    model.lm_head = BranchedLinear(model.lm_head, LowRankLinear(48, 97, 3, bias=False))
    with pytest.raises(CheckpointError, match=r"shared tensors .*lm_head\.base\.weight"):
        fsvd_compile.save(model, tmp_path / "tied")
    assert not (tmp_path / "tied").exists()
    config = {"lm_head.branch": {"rank": 3, "bias": False}}
    with pytest.raises(CheckpointError, match="its weight tied to another"):
        native.swap_in(checkpoints._gpt2(), config)


def test_a_branch_too_small_for_half_precision(tmp_path):
    """What counts is the sum: digits that fp16 loses of a tiny B are nothing beside the weight."""
    reference = dense_llama(tmp_path, torch.float16)
    name = "model.layers.0.mlp.down_proj"
    adapter = checkpoints.lora(tmp_path / "lora", reference, [name])
    key = f"base_model.model.{name}.lora_B.weight"
    edited(adapter, lambda s: s.update({key: s[key] * 1e-6}))
    model = families.load(tmp_path / "base", adapter=adapter, merge=False)
    assert branches(model) == {name: 4} and model.dtype == torch.float16
