"""Adapters that PEFT itself makes and saves, against what PEFT itself computes with them."""

from __future__ import annotations

import pytest
import torch
import transformers

import fsvd_compile
from fsvd_compile.errors import CheckpointError, FactorError

peft = pytest.importorskip("peft")

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
QV = ["q_proj", "v_proj"]


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


def tied():
    return transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**SIZES, tie_word_embeddings=True)
    )


def phi():
    model = transformers.PhiForCausalLM(transformers.PhiConfig(**SIZES))
    torch.nn.init.normal_(model.lm_head.bias)
    return model


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    )


def mixtral():
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=3))


def adapted(folder, make, **config):
    """A base and an adapter on disk, and PEFT's model of both."""
    torch.manual_seed(0)
    make().save_pretrained(folder / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(**config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape)
    model.save_pretrained(folder / "adapter")
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=torch.arange(5, 27).view(2, 11)).logits


PATTERNS = {
    "rank_pattern": {"^model.layers.0.self_attn.q_proj": 3, "layers.1.mlp.up_proj": 6},
    "alpha_pattern": {r"layers\.0\..*": 5},
}
READ = {
    "all linear": (llama, {"target_modules": "all-linear"}),
    "patterns": (llama, {"target_modules": "all-linear", **PATTERNS}),
    "rslora": (llama, {"target_modules": "all-linear", "use_rslora": True, "r": 5}),
    "some layers": (llama, {"target_modules": QV, "layers_to_transform": [1]}),
    "a head": (llama, {"target_modules": [*QV, "lm_head"]}),
    "a head as it is": (llama, {"target_modules": QV, "modules_to_save": ["lm_head", "norm"]}),
    "a head with a bias": (phi, {"target_modules": [*QV, "lm_head"]}),
    "an embedding as it is": (tied, {"target_modules": QV, "modules_to_save": ["embed_tokens"]}),
    "and its head": (
        tied,
        {"target_modules": QV, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "conv1d": (gpt2, {"target_modules": "all-linear", "fan_in_fan_out": True}),
    "experts": (mixtral, {"target_modules": QV}),
}
MERGED = {
    "an embedding": (llama, {"target_modules": ["embed_tokens"], "rank_pattern": {"embed_tokens": 3}}),
    "a tied head": (tied, {"target_modules": [*QV, "lm_head"]}),
    "a tied embedding": (tied, {"target_modules": [*QV, "embed_tokens"]}),
    "both": (tied, {"target_modules": [*QV, "embed_tokens"], "ensure_weight_tying": True}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", [*READ, *MERGED])
def test_what_peft_computes(name, tmp_path):
    make, config = (READ | MERGED)[name]
    expected = logits(adapted(tmp_path, make, **config))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert (logits(base) - expected).norm() > 1e-2 * expected.norm()
    for merge in (True, False):
        if name in MERGED and not merge:
            with pytest.raises(CheckpointError, match="beside it no branch is kept"):
                fsvd_compile.load(tmp_path / "base", adapter=tmp_path / "adapter", merge=False)
            continue
        ours = fsvd_compile.load(tmp_path / "base", adapter=tmp_path / "adapter", merge=merge)
        assert (logits(ours) - expected).norm() < 2e-6 * expected.norm()


REFUSED = {
    "alora_invocation_tokens": {"alora_invocation_tokens": [5, 6], "task_type": "CAUSAL_LM"},
    "use_dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "bias='lora_only'": {"bias": "lora_only"},
    "init_lora_weights='olora'": {"init_lora_weights": "olora"},
    "layer_replication": {"layer_replication": [[0, 2], [1, 2]]},
    "trainable_token_indices": {"trainable_token_indices": [3, 4]},
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("says", REFUSED)
def test_other_functions_are_refused(says, tmp_path):
    adapted(tmp_path, llama, target_modules=QV, **REFUSED[says])
    with pytest.raises(CheckpointError, match=f"{says}.*merge it with PEFT"):
        fsvd_compile.load(tmp_path / "base", adapter=tmp_path / "adapter")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_has_an_adapter_stays_dense(tmp_path):
    model = adapted(tmp_path, llama, target_modules=QV)
    expected = logits(model)
    report = fsvd_compile.factorize(model, 0.8, select=["*q_proj", "*k_proj"], progress=False)
    assert [m.name.rpartition(".")[2] for m in report.modules] == ["k_proj", "k_proj"]
    reason = "it has an adapter of PEFT, to be merged first"
    assert [why for name, why in report.dense.items() if name.endswith("q_proj")] == [reason] * 2
    expected = logits(model)
    merged = model.merge_and_unload()
    assert (logits(merged) - expected).norm() < 2e-6 * expected.norm()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_merge_into_factors_is_refused(tmp_path):
    """PEFT adds in place to the weight of what it adapts."""
    model = adapted(tmp_path, llama, target_modules=QV)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.base_layer = fsvd_compile.LowRankLinear(32, 32, 8, bias=False)
    with pytest.raises(FactorError, match="would be lost"):
        model.merge_and_unload()
