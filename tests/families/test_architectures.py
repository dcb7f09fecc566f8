"""Tiny models of many architectures, factorized, written by transformers and read: every value is what it was.

What transformers stores under other names, in pieces or not at all differs from model to model and version to version.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig

import fsvd_compile
from fsvd_compile import LowRankLinear, factorize

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
TEXT = SIZES | {"vocab_size": 97, "max_position_embeddings": 64}
GROUPED = TEXT | {"num_key_value_heads": 2}
IMAGE = SIZES | {"image_size": 16, "patch_size": 8}
GPT = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
SPEECH = SIZES | {
    "conv_dim": [16, 16], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
BOTH = {
    "vocab_size": 97, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 1, "decoder_start_token_id": 1,
}  # fmt: skip
WINDOWS = {
    "image_size": 16, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 24, "num_experts": 3, "num_experts_per_tok": 2}
CAUSAL = {
    "bloom": {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "codegen": GPT | {"rotary_dim": 4},
    "cohere": GROUPED,
    "deepseek_v3": TEXT | EXPERTS | {
        "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
        "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    },
    "falcon": {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "gemma2": GROUPED | {"head_dim": 8},
    "gemma3_text": GROUPED | {"head_dim": 8},
    "glm": GROUPED | {"head_dim": 8, "pad_token_id": 0},
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_neo": {
        "vocab_size": 97, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64,
        "attention_types": [[["global", "local"], 1]],
    },
    "gpt_neox": TEXT,
    "gpt_oss": GROUPED | {"head_dim": 8, "num_local_experts": 3, "num_experts_per_tok": 2},
    "gptj": GPT | {"rotary_dim": 4},
    "granitemoe": GROUPED | {"num_local_experts": 3, "num_experts_per_tok": 2},
    "llama": GROUPED,
    "mamba": {"vocab_size": 97, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2},
    "mamba2": {
        "vocab_size": 97, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8,
        "n_groups": 1,
    },
    "mixtral": GROUPED | {"num_local_experts": 3},
    "mpt": {"vocab_size": 97, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    "olmo2": GROUPED,
    "olmoe": GROUPED | EXPERTS,
    "opt": TEXT | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi": GROUPED,
    "phi3": GROUPED | {"pad_token_id": 0},
    "phimoe": GROUPED | {"num_local_experts": 3},
    "qwen2": GROUPED | {"tie_word_embeddings": True},
    "qwen2_moe": GROUPED | EXPERTS | {"shared_expert_intermediate_size": 40},
    "qwen3": GROUPED | {"head_dim": 8},
    "qwen3_moe": GROUPED | EXPERTS | {"head_dim": 8},
    "stablelm": GROUPED,
    "starcoder2": GROUPED,
    "xglm": {
        "vocab_size": 97, "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4,
        "max_position_embeddings": 64,
    },
}  # fmt: skip
BASE = {
    "albert": TEXT | {"embedding_size": 16},
    "bart": BOTH,
    "beit": IMAGE,
    "bert": TEXT,
    "clip": {"text_config": TEXT, "vision_config": IMAGE},
    "convbert": TEXT,
    "deberta-v2": TEXT,
    "deit": IMAGE,
    "dinov2": IMAGE | {"use_swiglu_ffn": True},
    "distilbert": {
        "vocab_size": 97, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64,
    },
    "electra": TEXT | {"embedding_size": 16},
    "fnet": TEXT,
    "hubert": SPEECH,
    "imagegpt": GPT,
    "marian": BOTH,
    "modernbert": TEXT | {"pad_token_id": 0},
    "roberta": TEXT,
    "swin": WINDOWS,
    "swinv2": WINDOWS,
    "t5": {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    "vit": IMAGE,
    "wav2vec2": SPEECH,
}  # fmt: skip
INPUTS = {
    "input_ids": lambda: torch.randint(5, 90, (2, 9)),
    "pixel_values": lambda: torch.randn(2, 3, 16, 16),
    "input_values": lambda: torch.randn(2, 400),
}


@torch.no_grad()
def outputs(model, kind):
    torch.manual_seed(1)
    given = {model.main_input_name: INPUTS[model.main_input_name]()}
    if kind == "clip":
        given["pixel_values"] = INPUTS["pixel_values"]()
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = torch.randint(5, 90, (2, 4))
    leaves = tree_leaves(model(**given).to_tuple())
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("kind", [*CAUSAL, *BASE])
def test_round_trip(kind, tmp_path):
    auto = transformers.AutoModelForCausalLM if kind in CAUSAL else transformers.AutoModel
    try:
        config = AutoConfig.for_model(kind, **(CAUSAL | BASE)[kind])
    except ValueError:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    torch.manual_seed(0)
    model = auto.from_config(config).eval()
    factorize(model, 0.8, progress=False)
    assert any(isinstance(module, LowRankLinear) for module in model.modules())
    expected = outputs(model, kind)
    model.save_pretrained(tmp_path)
    for read in (fsvd_compile.load, type(model).from_pretrained):
        rubbish = [
            torch.full((n,), 7.5e30) for n in (64, 256, 1024, 4096, 16384) for _ in range(20)
        ]
        del rubbish  # what is left without values now has these
        loaded = read(tmp_path)
        values = dict(model.named_buffers()) | dict(model.named_parameters())
        for key, value in (*loaded.named_buffers(), *loaded.named_parameters()):
            assert torch.equal(value, values.pop(key)), key
        assert not values
        for actual, wanted in zip(outputs(loaded, kind), expected, strict=True):
            torch.testing.assert_close(actual, wanted)
        if (
            read is fsvd_compile.load
        ):  # of its own loading transformers 5.0 makes other names in BERT
            loaded.save_pretrained(tmp_path / "again")
            folders = (tmp_path, tmp_path / "again")
            names = [load_file(folder / "model.safetensors").keys() for folder in folders]
            assert names[0] == names[1]
