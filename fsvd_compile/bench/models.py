"""The models that are measured, and the text in their KV cache: shapes with random weights, or what was saved."""

from __future__ import annotations

import pathlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fsvd_compile.errors import BenchError
from fsvd_compile.factorize.select import oriented_weight, select_targets
from fsvd_compile.factorized import LowRankLinear
from fsvd_compile.kept_cache import argument

if TYPE_CHECKING:
    from fsvd_compile.bench.decode import Setting

# Arguments of transformers' LlamaConfig.
MODELS = {
    "llama-7b": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32,
    },
    "llama3-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "rope_theta": 500000.0, "max_position_embeddings": 65536,
    },
    "smollm2-135m": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4,
    },
}  # fmt: skip


def check_model(model: str) -> None:
    """Raises BenchError unless it is a key of `MODELS` or a directory with a configuration."""
    if model not in MODELS and not (pathlib.Path(model) / "config.json").is_file():
        raise BenchError(
            f"model={model!r} is neither one of {', '.join(MODELS)} nor a directory with a "
            "config.json. Name one of these, or a directory that save_pretrained wrote."
        )


def build(setting: Setting, keep: float, layers: int | None = None) -> nn.Module:
    """The model in evaluation mode on its device, with the ranks of `keep` and `setting.round`.

    Of a shape of `MODELS` only so many layers, if `layers` is given.
    """
    path = setting.path
    model = shape(setting.model, layers) if path is None else _load(path, setting.dtype)
    if keep < 1:
        factorize_randomly(model, keep, setting.round)
    model = model.to(setting.dtype).eval().requires_grad_(False)
    if path is not None:
        return model.to(setting.device)
    model.to_empty(device=setting.device)
    model.tie_weights()
    # The frequencies are computed, not stored: allocating the weights left them unset.
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(setting.device)
    for name, parameter in model.named_parameters():
        nn.init.ones_(parameter) if "norm" in name else nn.init.normal_(parameter, std=0.03)
    return model


def shape(name: str, layers: int | None = None) -> nn.Module:
    """A model of `MODELS` without memory."""
    transformers = need_transformers()
    config = transformers.LlamaConfig(**MODELS[name])
    if layers is not None:
        config.num_hidden_layers = layers
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


def _load(path: pathlib.Path, dtype: torch.dtype) -> nn.Module:
    try:
        return need_transformers().AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, local_files_only=True
        )
    except Exception as error:  # files and models are of many hands
        raise BenchError(
            f"model={str(path)!r}: AutoModelForCausalLM.from_pretrained cannot load it: {error}"
        ) from error


def factorize_randomly(model: nn.Module, keep: float, multiple: int) -> None:
    """Replaces every linear layer but the head, in place, by one of the same size with random factors."""
    targets, _ = select_targets(model, keep, None)
    for target in targets:
        m, n = oriented_weight(target.module).shape
        rank = (target.rank or 0) // multiple * multiple
        if not rank:
            raise BenchError(
                f"keep={keep:g} and round={multiple} leave rank 0 for {target.name!r} "
                f"([{m}, {n}]: {target.rank or 0} before rounding). Use a larger keep or a smaller "
                "round."
            )
        old = target.module.weight
        made = LowRankLinear(n, m, rank, bias=False, device=old.device, dtype=old.dtype)
        if old.device.type != "meta":
            nn.init.normal_(made.v.weight, std=0.03)
            nn.init.normal_(made.u.weight, std=0.03)
        made.u.bias = target.module.bias
        parent, _, child = target.name.rpartition(".")
        setattr(model.get_submodule(parent), child, made)


def check_positions(model: nn.Module, setting: Setting) -> None:
    """Raises BenchError if a loaded model has fewer positions; a shape of `MODELS` stands for any context."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if setting.path is not None and most is not None and setting.cache > most:
        raise BenchError(
            f"cache={setting.cache}, but the model in {setting.model} takes at most {most} "
            "positions (max_position_embeddings). Use a shorter cache and context."
        )


@torch.no_grad()
def fill(model: nn.Module, prompt: torch.Tensor, length: int) -> Any:
    """A static KV cache of that length that holds the prompt `[batch, context]`.

    Raises:
        BenchError: a layer keeps its state in another way than keys and values for each position.
    """
    static = need_transformers().cache_utils
    cache = static.StaticCache(config=model.config, max_cache_len=length)
    others = {type(layer).__name__ for layer in cache.layers} - {"StaticLayer"}
    if others:
        raise BenchError(
            f"{type(model).__name__} keeps its context in {', '.join(sorted(others))}; a step can "
            "be repeated at one position only for full attention in every layer (StaticLayer). "
            "Use a model without sliding windows and recurrent layers."
        )
    for part in prompt.split(512, dim=1):  # bounds the memory of long prompts
        model(part, use_cache=True, logits_to_keep=1, **{argument(model): cache})
    return cache


def weight_bytes(model: nn.Module) -> int:
    """Bytes of weights a step reads: every parameter once, but no embedding table, of which only
    rows are looked up, unless the head multiplies by it. Experts count as if all were used."""
    head = model.get_output_embeddings()
    tables = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Embedding) and (head is None or module.weight is not head.weight)
    }
    return sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in tables)


def kv_bytes(cache: Any, context: int) -> int:
    """Bytes of keys and values of `context` tokens of each sequence."""
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(t[:, :, :context].numel() * t.element_size() for t in tensors)


def rewind(cache: Any, context: int) -> None:
    """Makes a static cache forget what lies behind so many tokens."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(context)


def need_transformers() -> ModuleType:
    """transformers. Raises BenchError where it is not installed."""
    try:
        import transformers
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise BenchError(
            "The benchmark builds its models with transformers, which is not installed: "
            "pip install 'fsvd-compile[transformers]'."
        ) from error
    return transformers
