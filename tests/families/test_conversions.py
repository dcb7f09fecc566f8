"""Models that transformers stores under other names than their own, or in other pieces."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import fsvd_compile
from fsvd_compile import LowRankLinear, factorize, families
from fsvd_compile.errors import CheckpointError

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
TEXT = SIZES | {"vocab_size": 97, "num_key_value_heads": 2, "max_position_embeddings": 64}
IMAGE = SIZES | {"image_size": 16, "patch_size": 8}
MAPPED = pytest.importorskip(
    "transformers.conversion_mapping", reason="transformers 5 has the table"
)


def causal(kind, **config):
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **TEXT, **config))


def llava():
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=transformers.CLIPVisionConfig(**IMAGE),
        image_token_index=96,
    )
    return transformers.LlavaForConditionalGeneration(config)


MODELS = {
    "mixtral": lambda: causal("mixtral", num_local_experts=3),
    "qwen2_moe": lambda: causal(
        "qwen2_moe", moe_intermediate_size=24, shared_expert_intermediate_size=40, num_experts=3,
        num_experts_per_tok=2,
    ),
    "granitemoe": lambda: causal("granitemoe", num_local_experts=3, num_experts_per_tok=2),
    "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**IMAGE)),
    "llava": llava,
}  # fmt: skip


@torch.no_grad()
def output(model):
    torch.manual_seed(1)
    if model.main_input_name == "pixel_values":
        return model(pixel_values=torch.randn(2, 3, 16, 16)).logits
    return model(input_ids=torch.randint(5, 90, (2, 9))).logits


@pytest.mark.parametrize("name", MODELS)
def test_factorized_saved_and_loaded(name, tmp_path):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    factorize(model, 0.8, progress=False)
    expected = output(model)
    model.save_pretrained(tmp_path / "theirs")
    stored = load_file(tmp_path / "theirs/model.safetensors").keys()
    if stored <= model.state_dict().keys():
        pytest.skip(f"transformers {transformers.__version__} stores it under the model's names")
    loaded = fsvd_compile.load(tmp_path / "theirs")
    factorized = {n for n, m in model.named_modules() if isinstance(m, LowRankLinear)}
    assert factorized == {n for n, m in loaded.named_modules() if isinstance(m, LowRankLinear)}
    torch.testing.assert_close(output(loaded), expected)
    fsvd_compile.save(loaded, tmp_path / "ours")
    torch.testing.assert_close(output(fsvd_compile.load(tmp_path / "ours")), expected)
    assert families.inspect(tmp_path / "theirs").rows


def experts(tmp_path, edit):
    model = MODELS["mixtral"]().eval()
    factorize(model, 0.8, progress=False)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    edit(state)
    save_file(state, file, metadata={"format": "pt"})
    return tmp_path


FIRST = "model.layers.0.block_sparse_moe.experts"


@pytest.mark.parametrize(
    "edit",
    [
        lambda s: s.pop(f"{FIRST}.1.w1.weight"),
        lambda s: [s.pop(f"{FIRST}.{i}.w3.weight") for i in range(3)],
        lambda s: s.update({f"{FIRST}.1.w2.weight": torch.ones(32, 47)}),
    ],
    ids=["an expert", "a half of all", "a size"],
)
def test_pieces_that_do_not_make_a_whole(edit, tmp_path):
    with pytest.raises(CheckpointError, match="transformers cannot build the model"):
        fsvd_compile.load(experts(tmp_path, edit))


@pytest.mark.parametrize(
    "edit,says",
    [
        (
            lambda s: [s.pop(f"{FIRST}.{i}.w{j}.weight") for i in range(3) for j in (1, 3)],
            r"1 are missing: model\.layers\.0\.mlp\.experts\.gate_up_proj",
        ),
        (
            lambda s: s.update({f"{FIRST}.1.w4.weight": torch.ones(32, 48)}),
            r"1 tensors belong to no module: model\.layers\.0\.block_sparse_moe\.experts\.1\.w4",
        ),
        (
            lambda s: s.update({"model.layers.0.mlp.gate.weight": torch.ones(3, 32)}),
            r"are both model\.layers\.0\.mlp\.gate\.weight",
        ),
    ],
    ids=["missing", "left over", "twice"],
)
def test_what_is_missing_left_over_or_there_twice_is_named(edit, says, tmp_path):
    with pytest.raises(CheckpointError, match=says):
        fsvd_compile.load(experts(tmp_path, edit))


def test_an_infinity_in_a_config(tmp_path):
    """JSON has none; transformers writes an object in its place."""
    config = transformers.Mamba2Config(
        vocab_size=97, hidden_size=32, state_size=8, num_hidden_layers=2, num_heads=8, head_dim=8, n_groups=1
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Mamba2ForCausalLM(config).eval()
    factorize(model, 0.8, progress=False)
    model.save_pretrained(tmp_path)
    assert "Infinity" in (tmp_path / "config.json").read_text()
    loaded = fsvd_compile.load(tmp_path)
    assert tuple(loaded.config.time_step_limit) == (0.0, float("inf"))
    torch.testing.assert_close(output(loaded), output(model))


def nomic():
    torch.manual_seed(0)
    config = transformers.NomicBertConfig(vocab_size=97, **SIZES)
    return transformers.NomicBertModel(config).eval()


@pytest.mark.skipif(
    not hasattr(transformers, "NomicBertModel"), reason="newer transformers have it"
)
@pytest.mark.parametrize(
    "keep", [0.8, {"*q_proj": 0.9, "*": 0.6}, {"*q_proj": 0.8}, {"*down_proj": 0.8}]
)
def test_factors_are_not_joined_as_dense_weights_are(keep, tmp_path):
    """Published files hold q, k and v as one weight; factors of q, k and v have ranks of their own."""
    model = nomic()
    factorize(model, keep, progress=False)
    with torch.no_grad():
        expected = model(torch.arange(5, 23).view(2, 9)).last_hidden_state
    model.save_pretrained(tmp_path / "theirs")
    fsvd_compile.save(model, tmp_path / "ours")
    for folder in ("theirs", "ours"):
        for read in (fsvd_compile.load, type(model).from_pretrained):
            with torch.no_grad():
                actual = read(tmp_path / folder)(torch.arange(5, 23).view(2, 9)).last_hidden_state
            torch.testing.assert_close(actual, expected)


@pytest.mark.skipif(
    not hasattr(transformers, "NomicBertModel"), reason="newer transformers have it"
)
def test_a_dense_model_is_written_as_ever(tmp_path):
    nomic().save_pretrained(tmp_path)
    assert any("Wqkv" in key for key in load_file(tmp_path / "model.safetensors"))
