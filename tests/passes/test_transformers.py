"""Tiny models of transformers, factorized: what matches in each, caches and all, and golden graphs of four of them.

After a change that is meant, `EXPECTTEST_ACCEPT=1 pytest tests/passes -k golden` writes the golden files.
"""

from __future__ import annotations

import copy
import os
import pathlib
import re

import pytest
import torch
import transformers
from harness import Recorder, compare, dump, rewrite
from torch import nn
from transformers import StaticCache
from transformers.pytorch_utils import Conv1D

GOLDEN = pathlib.Path(__file__).with_name("golden")
SLOTS = 13
SIZES = {
    "vocab_size": 53, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
GPT = {"vocab_size": 53, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
KINDS = {
    "Llama": SIZES,
    "Qwen3": SIZES,
    "Qwen2": SIZES,  # biases on q, k, v
    "Mistral": SIZES | {"sliding_window": 6},
    "Gemma2": SIZES | {"sliding_window": 6},
    "Gemma": SIZES,
    "Phi": SIZES | {"partial_rotary_factor": 0.5},
    "GPTNeoX": SIZES | {"rotary_pct": 0.25, "num_key_value_heads": 4},
    "GPTJ": GPT | {"rotary_dim": 4},
    "OPT": SIZES | {"ffn_dim": 44, "word_embed_proj_dim": 32, "num_key_value_heads": 4},
    "GPT2": GPT,
    "Bert": SIZES,
}


def factorized(model: nn.Module, rank: int = 5) -> nn.Module:
    """Every projection inside a layer replaced by two of the same kind, as a foreign checkpoint might hold them."""
    for name, module in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        if not re.search(r"\.\d+\.", name) or not isinstance(module, (nn.Linear, Conv1D)):
            continue
        wide, narrow = (
            (module.in_features, module.out_features)
            if isinstance(module, nn.Linear)
            else module.weight.shape
        )
        if isinstance(module, nn.Linear):
            pair = (
                nn.Linear(wide, rank, bias=False),
                nn.Linear(rank, narrow, bias=module.bias is not None),
            )
        else:
            pair = Conv1D(rank, wide), Conv1D(narrow, rank)
        for part in pair:
            nn.init.normal_(part.weight, std=0.3)
        setattr(model.get_submodule(parent), child, nn.Sequential(*pair))
    return model.eval()


def tiny(kind: str, head: str = "", layers: int = 1, **sizes) -> nn.Module:
    sizes = {**KINDS[kind], **sizes}
    sizes["n_layer" if "n_layer" in sizes else "num_hidden_layers"] = layers
    config = getattr(transformers, kind + "Config")(**sizes)
    head = head or {"GPT2": "LMHeadModel", "Bert": "Model"}.get(kind, "ForCausalLM")
    return factorized(getattr(transformers, kind + head)(config))


def cache_of(model: nn.Module, batch: int = 2) -> StaticCache:
    config = model.config
    cache = StaticCache(config, max_cache_len=SLOTS)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache.early_initialization(batch, heads, head, torch.float32, torch.device("cpu"))
    return cache


def tokens(count: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(0, 53, (batch, count))


def prefilled(model: nn.Module, count: int = 5, batch: int = 2) -> StaticCache:
    cache = cache_of(model, batch)
    with torch.no_grad():
        model(input_ids=tokens(count, batch), past_key_values=cache, use_cache=True)
    return cache


# Per decoder layer; what a model has beside is in no layer.
LLAMA = {"lowrank_chain": 7, "siblings": 2, "gated_mlp": 1, "norm_prologue": 2, "residual": 2}
LLAMA |= {"rope_append": 1, "attention": 1}
DECODERS = {
    "Llama": LLAMA,
    "Qwen2": LLAMA,
    "Qwen3": LLAMA,
    "Mistral": LLAMA,
    "Gemma": LLAMA,
    # Scores are soft-capped, so attention is written out, and norms follow the projections.
    "Gemma2": {
        "lowrank_chain": 7,
        "siblings": 2,
        "gated_mlp": 1,
        "norm_prologue": 2,
        "rope_append": 1,
    },
    # Half of each head is rotated; one norm feeds attention and MLP, so all four projections are one group.
    "Phi": {"lowrank_chain": 6, "siblings": 1, "norm_prologue": 1, "residual": 1, "attention": 1},
    # A quarter is rotated; q, k and v are one matrix already; two norms of one stream.
    "GPTNeoX": {
        "lowrank_chain": 4,
        "activation": 1,
        "norm_prologue": 2,
        "residual": 1,
        "attention": 1,
    },
    # Pairs of neighbours are rotated, and attention is written out up to transformers 5.23.
    "GPTJ": {"lowrank_chain": 6, "siblings": 1, "norm_prologue": 1, "residual": 1},
    "GPT2": {
        "lowrank_chain": 4,
        "activation": 1,
        "norm_prologue": 2,
        "residual": 2,
        "attention": 1,
    },
}


@pytest.mark.parametrize("kind", DECODERS)
def test_decode_with_a_static_cache(kind):
    """One token after a prompt; the cache is among the inputs, so what is written to it is compared."""
    model = tiny(kind)
    result = rewrite(model, input_ids=tokens(1), past_key_values=prefilled(model), use_cache=True)
    expected = DECODERS[kind]
    if kind == "GPTJ" and getattr(model, "_supports_sdpa", False):
        expected = expected | {"attention": 1}
    both = min(expected.get(name, 0) for name in ("rope_append", "attention"))
    joined = {"decode_attention": both} if both else {}
    assert result.only() == expected | joined, result.misses
    assert result.matches["counters"] == 1
    assert not result.after.keys() & ({"fsvd.rope_append", "fsvd.attention"} if both else set())
    assert result.guards == 0


def test_prefill_with_a_static_cache():
    model = tiny("Llama", layers=2)
    result = rewrite(model, input_ids=tokens(7), past_key_values=cache_of(model), use_cache=True)
    assert result.only() == {name: 2 * count for name, count in LLAMA.items()}, result.misses


@pytest.mark.parametrize("kind", ["OPT", "Bert", "Llama"])
def test_without_a_cache(kind):
    expected = {
        "OPT": {
            "lowrank_chain": 6,
            "siblings": 1,
            "activation": 1,
            "norm_prologue": 2,
            "residual": 2,
        },
        # Norms follow the sums: each feeds the next layer and its residual.
        "Bert": {"lowrank_chain": 6, "siblings": 1, "activation": 1, "residual": 2},
        "Llama": {n: c for n, c in LLAMA.items() if n != "rope_append"},
    }[kind]
    kwargs = {} if kind == "Bert" else {"use_cache": False}
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[1, :2] = 0
    if kind == "Bert":
        mask = mask.flip(1)
    result = rewrite(tiny(kind), input_ids=tokens(5), attention_mask=mask, **kwargs)
    assert result.only("lowrank_chain", *expected) == expected, result.misses
    assert "rope_append" not in result.matches


def test_left_padded_prompts_and_several_steps():
    """Batch of two prompts, one shorter: prefill and three steps on one cache, each by its compiled graph."""
    model = tiny("Llama", layers=2)
    recorder = Recorder()
    mine, theirs = cache_of(model), cache_of(model)
    compiled = recorder.compile(copy.deepcopy(model), dynamic=False)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :3] = 0
    ids = tokens(6)
    with torch.no_grad():
        for _ in range(4):
            positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
            given = {
                "input_ids": ids,
                "attention_mask": mask,
                "position_ids": positions,
                "use_cache": True,
            }
            actual = compiled(**given, past_key_values=mine)
            expected = model(**given, past_key_values=theirs)
            compare("logits", actual.logits, expected.logits, 1e-5)
            compare("cache", mine, theirs, 1e-5)
            ids = expected.logits[:, -1:].argmax(-1)
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    assert all(g.matches["rope_append"] == g.matches["attention"] == 2 for g in recorder.graphs)


@pytest.mark.parametrize("kind", ["Mistral", "Gemma2"])
def test_a_full_sliding_window_rolls_on(kind):
    model = tiny(kind)
    cache = prefilled(model, 5)
    with torch.no_grad():  # past the window of 6
        for _ in range(3):
            model(input_ids=tokens(1), past_key_values=cache, use_cache=True)
    result = rewrite(model, input_ids=tokens(1), past_key_values=cache, use_cache=True)
    assert result.matches["lowrank_chain"] == 7


def test_a_dynamic_cache_is_no_static_one():
    model = tiny("Llama")
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=tokens(4), past_key_values=cache, use_cache=True)
    result = rewrite(model, input_ids=tokens(1), past_key_values=cache, use_cache=True)
    assert "rope_append" not in result.matches
    assert result.only("siblings", "gated_mlp", "residual") == {
        "siblings": 2,
        "gated_mlp": 1,
        "residual": 2,
    }


def test_training_mode():
    model = tiny("GPT2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).train()
    assert rewrite(model, input_ids=tokens(5), use_cache=False).matches["residual"] == 2


@pytest.mark.parametrize("lowered", [False, True], ids=["ops", "lowered"])
def test_bfloat16(lowered):
    """Against the same model in fp32: no further off than eager bf16 is."""
    model = tiny("Llama", layers=2).bfloat16()
    wide = copy.deepcopy(model).float()
    given = {"input_ids": tokens(9), "use_cache": False}
    with torch.no_grad():
        exact, eager = wide(**given).logits, model(**given).logits.float()
    allowed = 1.2 * ((eager - exact).norm() / exact.norm()).item()
    result = rewrite(model, limit=1.0, lowered=lowered, **given)
    compare("logits", result.output.logits.float(), exact, allowed)
    assert result.matches["norm_prologue"] == 4


GOLDENS = {
    "llama_decode": ("Llama", 1, True),
    "llama_prefill": ("Llama", 7, True),
    "gpt2": ("GPT2", 5, False),
    "bert": ("Bert", 5, False),
}


@pytest.mark.parametrize("name", GOLDENS)
def test_golden(name):
    """The rewritten layer, line for line; what surrounds it differs between versions of transformers."""
    kind, count, cached = GOLDENS[name]
    model = tiny(kind)
    given = {"input_ids": tokens(count)} | ({} if kind == "Bert" else {"use_cache": cached})
    if cached:
        given["past_key_values"] = prefilled(model) if count == 1 else cache_of(model)
    actual = dump(rewrite(model, **given).graph, in_layer)
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("EXPECTTEST_ACCEPT"):
        path.write_text(actual)
    assert actual == path.read_text(), "EXPECTTEST_ACCEPT=1 accepts the new graph"


def in_layer(node: torch.fx.Node) -> bool:
    modules = [str(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    return (
        any(re.search(r"(layers?|h)(\.|\[')?\d", path) for path in modules)
        and node.meta.get("example_value") is not None
    )
