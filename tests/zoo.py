"""Tiny random models of every kind the backend must get right, factorized by hand in the ways people write it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 128,
}
GQA = {**SIZES, "num_key_value_heads": 2}


def _llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**GQA))


def _mistral():
    return transformers.MistralForCausalLM(transformers.MistralConfig(**GQA, sliding_window=16))


def _qwen2():
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**GQA))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.5)  # zeros would hide a dropped bias
    return model


def _qwen3():
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**GQA, head_dim=8))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, mean=1.0, std=0.3)
    return model


def _gemma2():
    config = transformers.Gemma2Config(
        **GQA, head_dim=8, sliding_window=16, query_pre_attn_scalar=8
    )
    return transformers.Gemma2ForCausalLM(config)


def _gpt2():
    config = transformers.GPT2Config(
        vocab_size=97,
        n_embd=48,
        n_layer=2,
        n_head=6,
        n_positions=128,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


def _opt():
    config = transformers.OPTConfig(
        vocab_size=97, hidden_size=48, ffn_dim=88, num_hidden_layers=2, num_attention_heads=6,
        max_position_embeddings=128, word_embed_proj_dim=48,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config)


def _bert():
    return transformers.BertModel(transformers.BertConfig(**SIZES))


def _mlp():
    return nn.Sequential(
        nn.Linear(48, 88), nn.GELU(), nn.Linear(88, 48), nn.LayerNorm(48), nn.Linear(48, 30)
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gpt2": _gpt2,
    "opt": _opt,
    "bert": _bert,
    "mlp": _mlp,
}


class Foreign(nn.Module):
    """SVD-LLM's spelling: u_proj(v_proj(x)), the bias on u_proj."""

    def __init__(self, v: torch.Tensor, u: torch.Tensor, bias: torch.Tensor | None):
        super().__init__()
        self.v_proj = nn.Linear(v.shape[1], v.shape[0], bias=False)
        self.u_proj = nn.Linear(u.shape[1], u.shape[0], bias=bias is not None)
        self.v_proj.weight.data, self.u_proj.weight.data = v, u
        if bias is not None:
            self.u_proj.bias.data = bias

    def forward(self, x):
        return self.u_proj(self.v_proj(x))


class Transposed(nn.Module):
    """x @ L @ R + b with L [in, r] and R [r, out]."""

    def __init__(self, v: torch.Tensor, u: torch.Tensor, bias: torch.Tensor | None):
        super().__init__()
        self.lhs, self.rhs = nn.Parameter(v.t().contiguous()), nn.Parameter(u.t().contiguous())
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x):
        y = torch.matmul(torch.matmul(x, self.lhs), self.rhs)
        return y if self.bias is None else y + self.bias


def _sequential(v: torch.Tensor, u: torch.Tensor, bias: torch.Tensor | None) -> nn.Sequential:
    pair = nn.Sequential(
        nn.Linear(v.shape[1], v.shape[0], bias=False),
        nn.Linear(u.shape[1], u.shape[0], bias=bias is not None),
    )
    pair[0].weight.data, pair[1].weight.data = v, u
    if bias is not None:
        pair[1].bias.data = bias
    return pair


SPELLINGS: dict[str, Callable[..., nn.Module]] = {
    "sequential": _sequential,
    "foreign": Foreign,
    "transposed": Transposed,
}


def factorized(name: str, spelling: str = "sequential", layers: int | None = None) -> nn.Module:
    """A model of the zoo with every linear but the head factorized by plain SVD, ranks odd and different.

    Dynamo traces every layer, which is most of a test's time: `layers=1` (llama) where more show nothing.
    """
    torch.manual_seed(7)
    model = MODELS[name]()
    if layers is not None:
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for path, module in list(model.named_modules()):
        if not isinstance(module, (nn.Linear, Conv1D)) or module is head:
            continue
        weight = module.weight.data if isinstance(module, nn.Linear) else module.weight.data.t()
        bias = None if module.bias is None else module.bias.data
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        out_features, in_features = weight.shape
        parent, _, child = path.rpartition(".")
        rank = (
            out_features * in_features // (out_features + in_features) * 3 // 4 - ord(child[0]) % 3
        )
        root = s[:rank].sqrt()
        v, u = (root[:, None] * vh[:rank]).contiguous(), (u[:, :rank] * root).contiguous()
        pair = SPELLINGS[spelling](v, u, bias)
        setattr(model.get_submodule(parent), child, pair)
    return model.eval().requires_grad_(False)


def static_cache(model: nn.Module, batch: int, length: int, device="cpu", dtype=torch.float32):
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = transformers.StaticCache(config=config, max_cache_len=length)
    cache.early_initialization(batch, heads, head_dim, dtype, torch.device(device))
    return cache
