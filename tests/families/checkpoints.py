"""Tiny checkpoints of the public SVD-compression families, written the way each family's own code writes them.

Every factorized layer computes y = U (V x) + b, with V of shape [rank, in] and U of shape [out, rank];
families differ in what they call the two, where the bias goes and how the whole is stored. Each generator
draws random factors, writes them in one family's layout and returns, beside the path, the dense model that
a loader has to reproduce.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import math
import pathlib
import sys
import types
from collections.abc import Callable, Iterable, Iterator

import safetensors.torch
import torch
import transformers
from torch import nn
from transformers.models.llama import modeling_llama

from fsvd_compile.families.codes import dynamic_map

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
LLAMA_SIZES = {**SIZES, "intermediate_size": 88, "num_key_value_heads": 2}
RANKS = (7, 13, 5, 11, 17, 3, 9, 19)
REMOTE_CODE = 'raise RuntimeError("a loader ran the code that came with a checkpoint")\n'


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk and what is true of it."""

    path: pathlib.Path
    """What a user passes to a loader: a directory or a `.pt` file."""
    family: str
    reference: transformers.PreTrainedModel
    """The same function as a plain dense model: fp32, eval mode, each factorized weight replaced by U @ V."""
    ranks: dict[str, int]
    """By the module's name in transformers, the rank of the stored factors (whatever attributes claim)."""
    shared: tuple[frozenset[str], ...] = ()
    """Groups of modules that have one V between them."""


@dataclasses.dataclass(frozen=True)
class Factors:
    """One factorized layer's tensors, in the dtypes they are stored in."""

    v: torch.Tensor
    u: torch.Tensor
    bias: torch.Tensor | None
    v_bias: torch.Tensor | None = None

    def dense(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias of the one linear layer that does the same."""
        u = self.u.double()
        bias = None if self.bias is None else self.bias.double()
        if self.v_bias is not None:
            bias = bias + u @ self.v_bias.double()
        return (u @ self.v.double()).float(), None if bias is None else bias.float()


Layout = Callable[[str, Factors], dict[str, torch.Tensor]]


def _randomize(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Weights large enough that a layer that was missed, swapped or lost its bias shows in the logits."""
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        if name.endswith("bias"):
            parameter.data = 0.3 * noise
        elif parameter.dim() == 1:
            parameter.data = 1 + 0.2 * noise
        elif "embed" in name:
            parameter.data = 0.5 * noise
        else:
            parameter.data = noise / math.sqrt(parameter.shape[1])
    return model.eval()


def _llama(layers: int = 2, *, tied: bool = False, bias: bool = False, theta: float = 10000.0):
    config = transformers.LlamaConfig(
        **LLAMA_SIZES,
        num_hidden_layers=layers,
        tie_word_embeddings=tied,
        attention_bias=bias,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    return _randomize(transformers.LlamaForCausalLM(config))


def _mistral():
    config = transformers.MistralConfig(**LLAMA_SIZES, num_hidden_layers=2, sliding_window=8)
    return _randomize(transformers.MistralForCausalLM(config))


def _opt(*, tied: bool = True):
    config = transformers.OPTConfig(
        **SIZES,
        ffn_dim=88,
        word_embed_proj_dim=48,
        num_hidden_layers=2,
        do_layer_norm_before=True,
        tie_word_embeddings=tied,
    )
    return _randomize(transformers.OPTForCausalLM(config))


def _bert(model_class: type[transformers.PreTrainedModel]):
    config = transformers.BertConfig(
        **SIZES, intermediate_size=88, num_hidden_layers=2, num_labels=3
    )
    return _randomize(model_class(config))


def _pick_ranks(model: nn.Module, *, head: bool = False, some_dense: bool = True) -> dict[str, int]:
    """A rank for the linear layers of the blocks, differing from one to the next; every fifth stays dense."""
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layer" in name
    ]
    if some_dense:
        names = [name for index, name in enumerate(names) if index % 5 != 3]
    ranks = dict(zip(names, itertools.cycle(RANKS), strict=False))
    return {**ranks, "lm_head": 21} if head else ranks


def _compress(
    model: transformers.PreTrainedModel,
    ranks: dict[str, int],
    dtype: torch.dtype,
    *,
    factor_dtype: torch.dtype | None = None,
    shared: Iterable[frozenset[str]] = (),
    mid_bias: bool = False,
) -> dict[str, Factors]:
    """Draw factors for the modules in `ranks`, and turn `model` into the dense model they amount to.

    What is not factorized is rounded to `dtype`, as it will be when stored; `factor_dtype` is that of the
    factors where it is another one. Modules in one group of `shared` get the same V.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()
    factor_dtype = factor_dtype or dtype
    group_of = {name: group for group in shared for name in group}
    drawn: dict[frozenset[str], torch.Tensor] = {}
    factors = {}
    for name, rank in ranks.items():
        linear = model.get_submodule(name)
        out_features, in_features = linear.weight.shape
        group = group_of.get(name, frozenset({name}))
        if group not in drawn:
            v = torch.randn(rank, in_features) / math.sqrt(in_features)
            drawn[group] = v.to(factor_dtype)
        u = torch.randn(out_features, rank) / math.sqrt(rank)
        bias = None if linear.bias is None else linear.bias.data.to(dtype)
        v_bias = 0.3 * torch.randn(rank) if mid_bias else None
        factors[name] = Factors(drawn[group], u.to(factor_dtype), bias, v_bias)
        linear.weight.data, bias = factors[name].dense()
        if bias is not None:
            linear.bias.data = bias
    return factors


def _pair(v: str, u: str) -> Layout:
    """Two linear layers in the place of one: `<module>.<v>.weight`, `<module>.<u>.weight`, `<module>.<u>.bias`."""

    def layout(name: str, factors: Factors) -> dict[str, torch.Tensor]:
        tensors = {f"{name}.{v}.weight": factors.v, f"{name}.{u}.weight": factors.u}
        if factors.bias is not None:
            tensors[f"{name}.{u}.bias"] = factors.bias
        return tensors

    return layout


def _svd_llm_name(name: str, side: str) -> str:
    """SVD-LLM's name of one factor: `q_proj` becomes `q_u_proj` and `q_v_proj`, `fc1` becomes `fc1_u_proj`, ..."""
    return f"{name.removesuffix('_proj')}_{side}_proj"


def _svd_llm_layout(name: str, factors: Factors) -> dict[str, torch.Tensor]:
    return {
        f"{_svd_llm_name(name, 'v')}.weight": factors.v,
        f"{_svd_llm_name(name, 'u')}.weight": factors.u,
    }


def _lems_layout(name: str, factors: Factors) -> dict[str, torch.Tensor]:
    tensors = {f"{name}.mod_a.weight": factors.v, f"{name}.mod_b.weight": factors.u}
    if factors.bias is not None:
        tensors[f"{name}.bias"] = factors.bias
    return tensors


def _state(
    reference: nn.Module, factors: dict[str, Factors], layout: Layout, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The state dict of the compressed model."""
    dense = reference.state_dict()
    cast = {tensor.data_ptr(): tensor.to(dtype) for tensor in dense.values()}  # tied stay tied
    state = {
        key: cast[tensor.data_ptr()]
        for key, tensor in dense.items()
        if key.rpartition(".")[0] not in factors
    }
    for name, pair in factors.items():
        state.update(layout(name, pair))
    return state


def _config(
    reference: transformers.PreTrainedModel, dtype: torch.dtype, **changes
) -> dict[str, object]:
    """`config.json` as transformers 4 wrote it, with a family's own keys."""
    config = reference.config.to_dict()
    for key in ("dtype", "head_dim"):
        config.pop(key, None)
    rope = config.pop("rope_parameters", None)
    if rope:
        config.update(rope_theta=rope["rope_theta"], rope_scaling=None)
    config.update(
        architectures=[type(reference).__name__],
        torch_dtype=str(dtype).removeprefix("torch."),
        transformers_version="4.45.1",
    )
    return {**config, **changes}


def _write_directory(
    folder: pathlib.Path,
    config: dict,
    state: dict[str, torch.Tensor],
    *,
    safe: bool = True,
    shards: int = 1,
) -> pathlib.Path:
    """A Hugging Face model directory; the Python files its `auto_map` names are there, and raise when imported.

    With several shards, neighbours in the state dict (so the two factors of a module) go to different ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    for target in config.get("auto_map", {}).values():
        (folder / f"{target.partition('.')[0]}.py").write_text(REMOTE_CODE)
    if safe and config.get("tie_word_embeddings"):
        state = {key: tensor for key, tensor in state.items() if key != "lm_head.weight"}

    stem, suffix = ("model", "safetensors") if safe else ("pytorch_model", "bin")
    weight_map = {}
    for index in range(shards):
        part = dict(itertools.islice(state.items(), index, None, shards))
        number = f"-{index + 1:05d}-of-{shards:05d}" if shards > 1 else ""
        file = folder / f"{stem}{number}.{suffix}"
        weight_map.update(dict.fromkeys(part, file.name))
        if safe:
            part = {key: tensor.contiguous() for key, tensor in part.items()}
            safetensors.torch.save_file(part, file, metadata={"format": "pt"})
        else:
            torch.save(part, file)
    if shards > 1:
        size = sum(tensor.nbytes for tensor in state.values())
        contents = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(contents, indent=2))
    return folder


def _auto_map(architecture: str, module: str, *, base: bool = True) -> dict[str, object]:
    """`architectures` and `auto_map` of a model whose classes come as Python files with the checkpoint."""
    stem = architecture.removesuffix("ForCausalLM")
    auto_map = {
        "AutoConfig": f"configuration_{module}.{stem}Config",
        "AutoModelForCausalLM": f"modeling_{module}.{architecture}",
    }
    if base:
        auto_map["AutoModel"] = f"modeling_{module}.{stem}Model"
    return {"architectures": [architecture], "auto_map": auto_map}


def _foreign_class(module: str, name: str, base: type = nn.Module) -> type:
    """A class that pickles as `module.name`, which is nowhere to be imported from."""
    return type(name, (base,), {"__module__": module})


@contextlib.contextmanager
def _importable(*classes: type) -> Iterator[None]:
    """Let pickle find foreign classes under the names they claim, for as long as it takes to save them."""
    with contextlib.ExitStack() as undo:
        for foreign in classes:
            parts = foreign.__module__.split(".")
            for depth in range(1, len(parts) + 1):
                name = ".".join(parts[:depth])
                if name not in sys.modules:
                    sys.modules[name] = types.ModuleType(name)
                    undo.callback(sys.modules.pop, name)
            module = sys.modules[foreign.__module__]
            if hasattr(module, foreign.__name__):
                raise RuntimeError(f"{foreign.__module__}.{foreign.__name__} is not foreign")
            setattr(module, foreign.__name__, foreign)
            undo.callback(delattr, module, foreign.__name__)
        yield


def _save_pickle(
    file: pathlib.Path, model: nn.Module, *classes: type, more: dict | None = None
) -> pathlib.Path:
    """`torch.save` of a whole model with its tokenizer, both of classes that the reader does not have."""
    tokenizer_class = _foreign_class("foreign_tokenizers.llama", "LlamaTokenizer", object)
    tokenizer = tokenizer_class()
    tokenizer.padding_side = "left"
    file.parent.mkdir(parents=True, exist_ok=True)
    with _importable(tokenizer_class, *classes):
        torch.save({"model": model, "tokenizer": tokenizer, **(more or {})}, file)
    return file


def _stored_copy(
    reference: transformers.PreTrainedModel, dtype: torch.dtype
) -> transformers.PreTrainedModel:
    """A copy of the model tree to pickle, without the rotary embedding that transformers 4.35 had not at its top.

    The parameters are in `dtype`, the buffers as they were.
    """
    model = copy.deepcopy(reference)
    if hasattr(model.model, "rotary_emb"):
        del model.model.rotary_emb
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def _use_transformers_4_config(config: transformers.PreTrainedConfig) -> None:
    """Give a config object the attributes that one pickled under transformers 4.35 has."""
    attributes = config.__dict__
    rope = attributes.pop("rope_parameters")
    attributes.update(rope_theta=rope["rope_theta"], rope_scaling=None)
    attributes.pop("head_dim", None)


def _lying_linear(weight: torch.Tensor, bias: torch.Tensor | None, **features: int) -> nn.Linear:
    """A linear layer built for other features than the weight that was assigned to it afterwards."""
    out_features, in_features = weight.shape
    sizes = {"in_features": in_features, "out_features": out_features, **features}
    linear = nn.Linear(**sizes, bias=bias is not None)
    linear.weight.data = weight
    if bias is not None:
        linear.bias.data = bias
    return linear


def _old_rotary(rotary_class: type[nn.Module], theta: float = 10000.0) -> nn.Module:
    """The rotary embedding that each attention layer had for itself, its `inv_freq` a part of the state dict."""
    rotary = rotary_class.__new__(rotary_class)
    nn.Module.__init__(rotary)
    head_dim = SIZES["hidden_size"] // SIZES["num_attention_heads"]
    frequencies = 1 / theta ** (torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.outer(torch.arange(64.0), frequencies).repeat(1, 2)[None, None]
    rotary.max_seq_len_cached = 64
    rotary.register_buffer("inv_freq", frequencies)
    rotary.register_buffer("cos_cached", angles.cos(), persistent=False)
    rotary.register_buffer("sin_cached", angles.sin(), persistent=False)
    return rotary


def _svd_llm_block(
    block_class: type, dense: nn.Module, name: str, factors: dict[str, Factors]
) -> nn.Module:
    """SVD-LLM's stand-in for a module: `<p>_u_proj` and `<p>_v_proj` for each factorized child, the rest as it was.

    The linear layers were built with a rank from the compression ratio and keep that in their attributes.
    """
    block = block_class()
    block.ratio = 0.4
    for key in ("config", "head_dim", "embed_dim", "do_layer_norm_before", "dropout"):
        if hasattr(dense, key):
            setattr(block, key, getattr(dense, key))
    for child_name, child in dense.named_children():
        pair = factors.get(f"{name}.{child_name}")
        if pair is None:
            block.add_module(child_name, child)
            continue
        claimed = len(pair.v) + 4
        u = _lying_linear(pair.u, pair.bias, in_features=claimed)
        v = _lying_linear(pair.v, pair.v_bias, out_features=claimed)
        block.add_module(_svd_llm_name(child_name, "u"), u)
        block.add_module(_svd_llm_name(child_name, "v"), v)
    return block


def svd_llm_pickle(
    folder: pathlib.Path,
    kind: str,
    *,
    some_dense: bool = False,
    tied: bool = False,
    old_config: bool = False,
) -> Checkpoint:
    """SVD-LLM for Llama and Mistral (AIoT-MLSys-Lab/SVD-LLM): a pickled model, factors in fp32, the rest in fp16."""
    theta = 500.0 if old_config else 10000.0
    reference = _mistral() if kind == "Mistral" else _llama(3, tied=tied, theta=theta)
    ranks = _pick_ranks(reference, some_dense=some_dense)
    factors = _compress(reference, ranks, torch.float16, factor_dtype=torch.float32)

    module = f"component.svd_{kind.lower()}"
    attention_class = _foreign_class(module, f"SVD_{kind}Attention")
    mlp_class = _foreign_class(module, f"SVD_{kind}MLP")
    rotary_class = _foreign_class(module, f"{kind}RotaryEmbedding")
    model = _stored_copy(reference, torch.float16)
    for index, layer in enumerate(model.model.layers):
        name = f"model.layers.{index}"
        layer.self_attn = _svd_llm_block(
            attention_class, layer.self_attn, f"{name}.self_attn", factors
        )
        layer.self_attn.rotary_emb = _old_rotary(rotary_class, theta)
        layer.mlp = _svd_llm_block(mlp_class, layer.mlp, f"{name}.mlp", factors)
    if old_config:
        _use_transformers_4_config(model.config)
    file = folder / f"tiny_{kind.lower()}_whitening_only_0.4.pt"
    _save_pickle(file, model, attention_class, mlp_class, rotary_class)
    return Checkpoint(file, "svd-llm", reference, ranks)


def svd_llm_opt_pickle(folder: pathlib.Path, *, mid_bias: bool = False) -> Checkpoint:
    """SVD-LLM for OPT: the whole decoder layer is a class of its own; U carries the layer's bias.

    Its constructor gives V a bias too, which nothing overwrites (`mid_bias`): then y = U (V x + b_v) + b.
    """
    reference = _opt()
    ranks = _pick_ranks(reference, some_dense=False)
    factors = _compress(
        reference, ranks, torch.float16, factor_dtype=torch.float32, mid_bias=mid_bias
    )
    attention_class = _foreign_class("component.svd_opt", "SVDOPTAttention")
    layer_class = _foreign_class("component.svd_opt", "SVDOPTDecoderLayer")
    model = _stored_copy(reference, torch.float16)
    layers = model.model.decoder.layers
    for index, layer in enumerate(layers):
        name = f"model.decoder.layers.{index}"
        layer.self_attn = _svd_llm_block(
            attention_class, layer.self_attn, f"{name}.self_attn", factors
        )
        layers[index] = _svd_llm_block(layer_class, layer, name, factors)
    file = folder / "tiny_opt_whitening_only_0.4.pt"
    _save_pickle(file, model, attention_class, layer_class)
    return Checkpoint(file, "svd-llm", reference, ranks)


def svd_llm_directory(folder: pathlib.Path, *, arena: bool) -> Checkpoint:
    """SVD-LLM's model after `save_pretrained`: `self_attn.q_u_proj.weight`, and `inv_freq` buffers among the weights.

    As saved, its config claims a plain LlamaForCausalLM (SVD-LLM issue 12); the LowRankArena export names classes.
    """
    reference = _llama()
    ranks = _pick_ranks(reference)
    factors = _compress(reference, ranks, torch.float16, factor_dtype=torch.float32)
    state = _state(reference, factors, _svd_llm_layout, torch.float16)
    rotary = _old_rotary(_foreign_class("component.svd_llama", "LlamaRotaryEmbedding"))
    for index in range(reference.config.num_hidden_layers):
        key = f"model.layers.{index}.self_attn.rotary_emb.inv_freq"
        state[key] = rotary.inv_freq.clone()
    changes = {}
    if arena:
        changes = _auto_map("SVDLLMLlamaForCausalLM", "svdllm_llama")
        changes["model_type"] = "svdllm-llama"
    config = _config(reference, torch.float16, **changes)
    return Checkpoint(_write_directory(folder, config, state), "svd-llm", reference, ranks)


def svd_llm_arena_nested(folder: pathlib.Path) -> Checkpoint:
    """LowRankArena's `svdllm-llama`: `<module>.v_proj`, `<module>.u_proj`, ranks in `svd_ranks`, sharded `.bin`."""
    reference = _llama()
    ranks = _pick_ranks(reference)
    factors = _compress(reference, ranks, torch.float16)
    state = _state(reference, factors, _pair(v="v_proj", u="u_proj"), torch.float16)
    config = _config(
        reference,
        torch.float16,
        model_type="svdllm-llama",
        svd_ranks=ranks,
        **_auto_map("SVDLLMLlamaForCausalLM", "svdllm_llama"),
    )
    _write_directory(folder, config, state, safe=False, shards=2)
    return Checkpoint(folder, "svd-llm", reference, ranks)


def ablinear(
    folder: pathlib.Path,
    build: Callable[[], transformers.PreTrainedModel] = _llama,
    *,
    dtype: torch.dtype = torch.float16,
    shards: int = 1,
) -> Checkpoint:
    """LowRankArena's own format: `BLinear` is V, `ALinear` is U with the bias, ranks in `low_rank_modules`."""
    reference = build()
    ranks = _pick_ranks(reference)
    factors = _compress(reference, ranks, dtype)
    state = _state(reference, factors, _pair(v="BLinear", u="ALinear"), dtype)
    kind = reference.config.model_type
    config = _config(
        reference,
        dtype,
        model_type=f"lowrank_{kind}",
        low_rank_modules={name: {"rank": rank} for name, rank in ranks.items()},
        low_rank_schema="ABLinear",
        low_rank_format_version=1,
        low_rank_method="svdllm_v2_whitening_only",
        **_auto_map(f"LowRank{kind.capitalize()}ForCausalLM", f"lowrank_{kind}"),
    )
    _write_directory(folder, config, state, shards=shards)
    return Checkpoint(folder, "ablinear", reference, ranks)


def asvd(
    folder: pathlib.Path,
    build: Callable[[], transformers.PreTrainedModel],
    *,
    head: bool = False,
    claims_tied: bool = False,
    safe: bool = True,
) -> Checkpoint:
    """ASVD (hahnyuan/ASVD4LLM): ABLinear's tensor names, ranks in `truncation_ranks`, the base's `model_type`.

    Any linear layer may be factorized, `lm_head` as well, even where the config goes on saying that it is tied.
    """
    reference = build()
    ranks = _pick_ranks(reference, head=head)
    factors = _compress(reference, ranks, torch.float16)
    state = _state(reference, factors, _pair(v="BLinear", u="ALinear"), torch.float16)
    kind = reference.config.model_type
    stem = {"llama": "Llama", "opt": "OPT"}[kind]
    config = _config(
        reference,
        torch.float16,
        truncation_ranks=ranks,
        **_auto_map(f"ASVD{stem}ForCausalLM", f"asvd_{kind}", base=False),
    )
    if claims_tied:
        config["tie_word_embeddings"] = True
    _write_directory(folder, config, state, safe=safe)
    return Checkpoint(folder, "asvd", reference, ranks)


def dobi_pickle(folder: pathlib.Path) -> Checkpoint:
    """Dobi-SVD without remapping (wangqinsi1/Dobi-SVD): each linear layer a pickled SVDTransformLayer, `lm_head` dense.

    `ALinear` is V and `BLinear` is U, the other way round than in ASVD. Attention is of the class it had in
    transformers 4.37, which transformers 5 no longer has.
    """
    reference = _llama()
    ranks = _pick_ranks(reference, some_dense=False)
    factors = _compress(reference, ranks, torch.float16)
    layer_class = _foreign_class("modules.module", "SVDTransformLayer")
    attention_class = _foreign_class(modeling_llama.__name__, "LlamaSdpaAttention")
    model = _stored_copy(reference, torch.float16)
    for layer in model.model.layers:
        attention = attention_class()
        attention.__dict__.update(layer.self_attn.__dict__)
        attention.rotary_emb = _old_rotary(modeling_llama.LlamaRotaryEmbedding)
        layer.self_attn = attention
    for name, pair in factors.items():
        svd_layer = layer_class()
        svd_layer.name = name
        svd_layer.ALinear = _lying_linear(pair.v, None)
        svd_layer.BLinear = _lying_linear(pair.u, None)
        model.set_submodule(name, svd_layer)
    file = _save_pickle(folder / "DobiSVD_Model.pt", model, layer_class, attention_class)
    return Checkpoint(file, "dobi", reference, ranks)


def dobi_directory(
    folder: pathlib.Path, *, full: tuple[str, ...] = (), told: bool = True
) -> Checkpoint:
    """LowRankArena's export of Dobi-SVD: `ALinear` is V, `BLinear` is U, ranks in `dobi_target_modules`.

    Modules in `full` have square factors; the ranks are not in the config unless `told`.
    """
    reference = _llama(tied=True)
    ranks = _pick_ranks(reference) | dict.fromkeys(full, SIZES["hidden_size"])
    factors = _compress(reference, ranks, torch.float16)
    state = _state(reference, factors, _pair(v="ALinear", u="BLinear"), torch.float16)
    config = _config(
        reference,
        torch.float16,
        **({"dobi_target_modules": ranks} if told else {}),
        **_auto_map("DobiSVDLlamaForCausalLM", "dobisvd_llama"),
    )
    return Checkpoint(_write_directory(folder, config, state), "dobi", reference, ranks)


def basis_sharing(folder: pathlib.Path, layers: int) -> Checkpoint:
    """Basis Sharing (TUDa-HWAI/Basis_Sharing): `<p>_basis` is V and one for two layers, `<p>_proj` is U.

    The basis of `o` and `down` is each layer's own. One rank per kind of layer, `q` beyond the point where
    it saves anything. The `.bin` has every basis a second time, as `model.<p>_basis.<layer>.weight`. With an
    odd number of layers the last group has one member. Nothing but `architectures` and the keys of the
    groups tells this config from a plain Llama's.
    """
    reference = _llama(layers)
    rank_of = {"q": 31, "k": 13, "v": 11, "o": 17, "gate": 23, "up": 29, "down": 9}
    pairs = [[first, first + 1][: layers - first] for first in range(0, layers, 2)]
    groups = {
        p: [[layer] for layer in range(layers)] if p in ("o", "down") else pairs for p in rank_of
    }
    block_of = {p: "mlp" if p in ("gate", "up", "down") else "self_attn" for p in rank_of}

    def module(p: str, layer: int) -> str:
        return f"model.layers.{layer}.{block_of[p]}.{p}_proj"

    ranks = {module(p, layer): rank_of[p] for layer in range(layers) for p in rank_of}
    shared = tuple(
        frozenset(module(p, layer) for layer in group)
        for p in rank_of
        for group in groups[p]
        if len(group) > 1
    )
    factors = _compress(reference, ranks, torch.float32, shared=shared)

    def layout(name: str, pair: Factors) -> dict[str, torch.Tensor]:
        basis = f"{name.removesuffix('_proj')}_basis.weight"
        return {basis: pair.v, f"{name}.weight": pair.u}

    state = {
        f"model.{p}_basis.{layer}.weight": factors[module(p, layer)].v
        for p in rank_of
        for layer in range(layers)
    }
    state.update(_state(reference, factors, layout, torch.float32))
    config = _config(
        reference,
        torch.float32,
        architectures=["ShareLlamaForCausalLM"],
        **{f"{p}_groups": groups[p] for p in rank_of},
        **{f"num_basis_{p}": rank for p, rank in rank_of.items()},
    )
    _write_directory(folder, config, state, safe=False)
    return Checkpoint(folder, "basis-sharing", reference, ranks, shared)


def lems(folder: pathlib.Path, build: Callable[[], transformers.PreTrainedModel]) -> Checkpoint:
    """LEMS / KFAC-SVD: `mod_a` is V, `mod_b` is U, the bias beside them; all keys begin with `wrapped_model.`.

    `rank_dict` names every linear layer of the blocks, with -1 where it stayed dense.
    """
    reference = build()
    ranks = _pick_ranks(reference)
    factors = _compress(reference, ranks, torch.bfloat16)
    state = _state(reference, factors, _lems_layout, torch.bfloat16)
    if reference.config.tie_word_embeddings:
        del state["lm_head.weight"]
    state = {f"wrapped_model.{key}": tensor for key, tensor in state.items()}
    rank_dict = dict.fromkeys(_pick_ranks(reference, some_dense=False), -1)
    config = _config(
        reference,
        torch.bfloat16,
        rank_dict={**rank_dict, **ranks},
        **_auto_map("LowRankModelForCausalLM", "lowrank", base=False),
    )
    return Checkpoint(_write_directory(folder, config, state), "lems", reference, ranks)


def zs_svd_directory(folder: pathlib.Path, *, names_ranks: bool) -> Checkpoint:
    """ZS-SVD (mint-vu/Zero-Sum-SVD) after convert_to_hf_style.py: `<module>.v_proj` is V, `<module>.u_proj` is U.

    So the value projection's V is `self_attn.v_proj.v_proj.weight`. Without `--vllm_ready` the config is a
    plain Llama's; with it the ranks are in `low_rank_config`.
    """
    reference = _llama(3)
    ranks = _pick_ranks(reference)
    factors = _compress(reference, ranks, torch.float16)
    state = _state(reference, factors, _pair(v="v_proj", u="u_proj"), torch.float16)
    config = _config(reference, torch.float16)
    if names_ranks:
        architecture = "LlamaLowRankForCausalLM"
        config["architectures"] = [architecture]
        config["auto_map"] = {"AutoModelForCausalLM": f"modeling_llama_lowrank.{architecture}"}
        config["low_rank_config"] = {"layers": ranks}
    _write_directory(folder, config, state, shards=2 if names_ranks else 1)
    return Checkpoint(folder, "zs-svd", reference, ranks)


def zs_svd_pickle(folder: pathlib.Path, *, quantized: bool = False) -> Checkpoint:
    """ZS-SVD as it saves itself: a pickled model with LowRankLinear where a module was worth factorizing.

    `quantized` is its `--quantize_8_bit`: codes in the place of the weights of every layer's linear modules, the
    scales of their rows in `mapping_info` beside the model.
    """
    reference = _llama(tied=True)
    ranks = _pick_ranks(reference)
    factors = _compress(reference, ranks, torch.float16)
    layer_class = _foreign_class("utils.model_utils", "LowRankLinear")
    model = _stored_copy(reference, torch.float16)
    for layer in model.model.layers:
        layer.self_attn.rotary_emb = _old_rotary(modeling_llama.LlamaRotaryEmbedding)
    for name, pair in factors.items():
        layer = layer_class()
        layer.in_features, layer.out_features = pair.v.shape[1], pair.u.shape[0]
        layer.rank = len(pair.v)
        layer.v_proj = _lying_linear(pair.v, None)
        layer.u_proj = _lying_linear(pair.u, None)
        model.set_submodule(name, layer)
    more = {}
    if quantized:
        dense = (name for name in _pick_ranks(reference, some_dense=False) if name not in ranks)
        info = {name: _zs_quantize(reference, model, name, "dense") for name in dense}
        info |= {name: _zs_quantize(reference, model, name, "lowrank") for name in ranks}
        info = {name.replace("model.layers.", "layer"): entry for name, entry in info.items()}
        meta = {"scheme": "bnb_rowwise_uint8", "code_kind": "dynamic_map"}
        more = {
            "mapping_info": {"meta": meta, "modules": info},
            "quantize_8_bit": True,
            "model_name": "a/base",
        }
    file = folder / "stage01_after_truncation_fp16.pt"
    _save_pickle(file, model, layer_class, more=more)
    return Checkpoint(file, "zs-svd", reference, ranks)


def _zs_quantize(reference: nn.Module, model: nn.Module, name: str, kind: str) -> dict[str, object]:
    """Put codes into a module, what they stand for into the reference, and give its entry of `mapping_info`."""
    module = model.get_submodule(name)
    parts = {"w": module} if kind == "dense" else {"u": module.u_proj, "v": module.v_proj}
    entry, again = {"kind": kind}, {}
    for side, part in parts.items():
        codes, scales = _quantized(part.weight.data.float(), dynamic_map())
        part.weight = nn.Parameter(codes, requires_grad=False)
        entry |= {f"{side}_absmax": scales, f"{side}_requires_grad": True}
        again[side] = (dynamic_map()[codes.long()] * scales.float()[:, None]).half().float()
    reference.get_submodule(name).weight.data = (
        again["w"] if kind == "dense" else again["u"] @ again["v"]
    )
    return entry


def aa_svd(folder: pathlib.Path, *, bias: bool = False) -> Checkpoint:
    """AA-SVD (atulkumarin/AA-SVD) after `save_pretrained`: `<module>.V.weight`, `<module>.U.weight`, bias on U."""
    reference = _llama(bias=bias)
    ranks = _pick_ranks(reference)
    factors = _compress(reference, ranks, torch.float16)
    state = _state(reference, factors, _pair(v="V", u="U"), torch.float16)
    config = _config(reference, torch.float16)
    return Checkpoint(_write_directory(folder, config, state), "aa-svd", reference, ranks)


def aa_svd_directories(
    folder: pathlib.Path, *, bias: bool = False, quantized: bool = False
) -> Checkpoint:
    """AA-SVD's directories of one module each, beside the base model they belong to: V is stored `[in, rank]`.

    Norms of the layers were trained further and have a `state_dict.pt`. `quantized` is its `dobi_remapping`:
    codes of the first min(out, in) rows of both factors, the other rows of the longer one in fp16.
    """
    base = _llama(bias=bias)
    for parameter in base.parameters():
        parameter.data = parameter.data.half().float()
    state = {key: tensor.half() for key, tensor in base.state_dict().items()}
    _write_directory(folder, _config(base, torch.float16), state)
    reference = base
    ranks = _pick_ranks(reference)
    factors = _compress(reference, ranks, torch.float16)
    for name, pair in factors.items():
        parts = {"U": pair.u, "V": pair.v.T.contiguous()}
        (m, n), least = (
            reference.get_submodule(name).weight.shape,
            min(len(pair.u), pair.v.shape[1]),
        )
        if quantized:
            u, v, table = pair.u.float(), pair.v.T.float(), dynamic_map()
            (uq, us), (vq, vs) = _quantized(u[:least].T, table), _quantized(v[:least].T, table)
            rest = (u if m > n else v)[least:].half()
            parts = {"UK_q": uq, "UK_absmax": us, "VK_q": vq, "VK_absmax": vs, "rem": rest}
            parts["swapped"] = torch.tensor(m > n)
            u, v = (
                (table[q.long()] * s.float()[:, None]).T.half() for q, s in ((uq, us), (vq, vs))
            )
            u, v = (torch.cat((u, rest)), v) if m > n else (u, torch.cat((v, rest)))
            reference.get_submodule(name).weight.data = u.float() @ v.T.float()
        _write_parts(folder / name.replace(".", "_"), parts)
    for index, layer in enumerate(reference.model.layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weight = (1 + 0.2 * torch.randn(SIZES["hidden_size"])).half()
            layer.get_submodule(norm).weight.data = weight.float()
            _write_parts(
                folder / f"model_layers_{index}_{norm}", {"state_dict": {"weight": weight}}
            )
    return Checkpoint(folder, "aa-svd", reference, ranks)


def _write_parts(folder: pathlib.Path, parts: dict[str, object]) -> None:
    folder.mkdir()
    for name, part in parts.items():
        torch.save(part, folder / f"{name}.pt")


def fwsvd(folder: pathlib.Path) -> Checkpoint:
    """FWSVD in s-nlp's re-implementation, on BERT: `lin0` is V, `lin1` is U with the bias."""
    reference = _bert(transformers.BertForSequenceClassification)
    ranks = _pick_ranks(reference)
    factors = _compress(reference, ranks, torch.float32)
    state = _state(reference, factors, _pair(v="lin0", u="lin1"), torch.float32)
    config = _config(reference, torch.float32)
    _write_directory(folder, config, state, safe=False)
    return Checkpoint(folder, "fwsvd", reference, ranks)


def pela(folder: pathlib.Path) -> Checkpoint:
    """PELA, on BERT: a `nn.Sequential` of V and U in the place of each linear layer, so `.0`, `.1` and `.1.bias`."""
    reference = _bert(transformers.BertForMaskedLM)
    ranks = _pick_ranks(reference)
    factors = _compress(reference, ranks, torch.float32)
    state = _state(reference, factors, _pair(v="0", u="1"), torch.float32)
    config = _config(reference, torch.float32)
    _write_directory(folder, config, state, safe=False)
    return Checkpoint(folder, "pela", reference, ranks)


def disguised(
    folder: pathlib.Path,
    build: Callable[[], transformers.PreTrainedModel] = _llama,
    *,
    dtype: torch.dtype = torch.float16,
    stored: torch.dtype | None = None,
) -> Checkpoint:
    """Swift-SVD's official code: V V^T W, multiplied out and rounded to `dtype`, in a plain dense checkpoint.

    Some layers are full rank, and so is the head. `stored` is the dtype of the file where it is another one.
    `ranks` are those of the products below break-even, which alone are worth taking apart.
    """
    reference = build()
    ranks = _pick_ranks(reference)
    factors = _compress(reference, ranks, torch.float32)
    for name in factors:
        weight = reference.get_submodule(name).weight
        weight.data = weight.data.to(dtype).float()
    state = {
        key: tensor.to(dtype).to(stored or dtype) for key, tensor in reference.state_dict().items()
    }
    for parameter in reference.parameters():
        parameter.data = parameter.data.to(dtype).float()
    config = _config(reference, stored or dtype)
    below = {
        name: rank
        for name, rank in ranks.items()
        if rank * (len(factors[name].u) + factors[name].v.shape[1])
        < factors[name].dense()[0].numel()
    }
    return Checkpoint(_write_directory(folder, config, state), "dense", reference, below)


def _quantized(rows: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, scales in fp16) of each row: the nearest entries of the table to the row over its largest entry."""
    scales = rows.abs().amax(dim=1)
    codes = (rows / scales[:, None])[..., None].sub(table).abs().argmin(dim=-1)
    return codes.to(torch.uint8), scales.half()


def dobi_remapped(
    folder: pathlib.Path,
    build: Callable[[], transformers.PreTrainedModel] = _llama,
    *,
    ranks: dict[str, int] | None = None,
) -> Checkpoint:
    """Dobi-SVD remapped (modules/remapping.py, weight_updater.py): `remapping_weight.pt` beside a model directory.

    Every linear layer but the head is in it, as 8-bit codes of U S and V^T (the singular values lie with the
    longer factor) and the fp16 rest of the longer one. `pytorch_model.bin` has what has neither `self_attn.` nor
    `mlp.` in its name, so of OPT's MLP the dense weights and biases too, but no bias of an attention layer.
    `ranks` of the checkpoint are those that save parameters.
    """
    reference = build()
    names = _pick_ranks(reference, some_dense=False)
    table = dynamic_map()  # tested by itself; an ulp more or less turns roundings to fp16
    mapping, below = {}, {}
    for parameter in reference.parameters():
        parameter.data = parameter.data.half().float()
    state = {
        key: tensor.half()
        for key, tensor in reference.state_dict().items()
        if "self_attn." not in key and "mlp." not in key
    }
    for index, name in enumerate(names):
        linear = reference.get_submodule(name)
        (m, n), least = linear.weight.shape, min(linear.weight.shape)
        k = (ranks or {}).get(name.rpartition(".")[2]) or (names[name], least - index % 3)[
            index % 2
        ]
        u, s, v = torch.linalg.svd(linear.weight.data, full_matrices=False)
        u, v = u[:, :k] * (s[:k] if m >= n else 1), v[:k] * (s[:k, None] if m < n else 1)
        us, us_scales = _quantized(u[:least].T, table)
        vt, vt_scales = _quantized(v[:, :least], table)
        tail = ("us", u[least:].half()) if m > n else ("vt", v[:, least:].half()) if m < n else None
        mapping[name] = {
            "us_quan": us,
            "vt_quan": vt,
            "us_absmax": us_scales,
            "vt_absmax": vt_scales,
            "tuple_info": tail,
        }
        u = (table[us.long()] * us_scales.float()[:, None]).T.half()
        v = (table[vt.long()] * vt_scales.float()[:, None]).half()
        if tail is not None:
            u, v = (torch.cat((u, tail[1])), v) if m > n else (u, torch.cat((v, tail[1]), dim=1))
        linear.weight.data = u.float() @ v.float()
        if k * (m + n) < m * n:
            below[name] = k
        else:
            linear.weight.data = linear.weight.data.half().float()
    _write_directory(folder, _config(reference, torch.float16), state, safe=False)
    torch.save(mapping, folder / "remapping_weight.pt")
    return Checkpoint(folder, "dobi", reference, below)


def palu(
    folder: pathlib.Path,
    *,
    kind: str = "llama",
    bias: bool = False,
    groups: int = 2,
    ranks: dict[str, tuple[int, ...]] | None = None,
) -> Checkpoint:
    """Palu (shadowpa0327/Palu): only k and v, `VT` for all heads and one `U.i` for each group of them.

    The ranks of the groups are in `head_wise_ranks`. As a pair, U is block-diagonal and the rank their sum.
    """
    reference = _mistral() if kind == "mistral" else _llama(bias=bias)
    for parameter in reference.parameters():
        parameter.data = parameter.data.half().float()
    state = {key: tensor.half() for key, tensor in reference.state_dict().items()}
    told, below = {}, {}
    for index, layer in enumerate(reference.model.layers):
        for p in ("k_proj", "v_proj"):
            name = f"model.layers.{index}.self_attn.{p}"
            linear = layer.self_attn.get_submodule(p)
            m, n = linear.weight.shape
            of_groups = (ranks or {}).get(p) or [
                (3, 5, 4, 2)[(i + index) % 4] for i in range(groups)
            ]
            blocks = [
                (torch.randn(m // len(of_groups), r) / math.sqrt(r)).half() for r in of_groups
            ]
            v = (torch.randn(sum(of_groups), n) / math.sqrt(n)).half()
            del state[f"{name}.weight"]
            state[f"{name}.VT.weight"] = v
            for i, block in enumerate(blocks):
                state[f"{name}.U.{i}.weight"] = block
            if bias:
                for i, part in enumerate(state.pop(f"{name}.bias").chunk(len(blocks))):
                    state[f"{name}.U.{i}.bias"] = part.clone()
            linear.weight.data = torch.block_diag(*blocks).float() @ v.float()
            told[name] = list(of_groups)
            if sum(of_groups) * (m + n) < m * n:
                below[name] = sum(of_groups)
            else:
                linear.weight.data = linear.weight.data.half().float()
    config = _config(
        reference,
        torch.float16,
        model_type=f"palu{kind}",
        architectures=[f"Palu{kind.capitalize()}ForCausalLM"],
        head_wise_ranks=told,
        original_model_name_or_path="a/base",
    )
    return Checkpoint(_write_directory(folder, config, state), "palu", reference, below)


def lora(
    folder: pathlib.Path,
    reference: transformers.PreTrainedModel,
    targets: Iterable[str],
    *,
    dtype: torch.dtype = torch.float32,
    merged_dtype: torch.dtype | None = None,
    safe: bool = True,
    **config: object,
) -> pathlib.Path:
    """An adapter as PEFT's `save_pretrained` writes it, which is added to the weights of `reference`.

    Ranks and scales differ from one module to the next (`rank_pattern`, `alpha_pattern`). `merged_dtype` is
    that to which dense weights are rounded with it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": "a/base",
        "r": 4,
        "lora_alpha": 6,
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        **config,
    }
    state = {}
    for index, name in enumerate(targets):
        r = (4, 3, 5)[index % 3]
        if r != 4:
            settings["rank_pattern"][name] = r
        if index % 2:
            settings["alpha_pattern"][name.removeprefix("model.")] = 2.5
        linear = reference.get_submodule(name)
        flip = type(linear).__name__ == "Conv1D"
        m, n = linear.weight.T.shape if flip else linear.weight.shape
        a, b = torch.randn(r, n, dtype=dtype) / 8, torch.randn(m, r, dtype=dtype) / 8
        state[f"base_model.model.{name}.lora_A.weight"] = a
        state[f"base_model.model.{name}.lora_B.weight"] = b
        scale = (2.5 if index % 2 else 6) / (math.sqrt(r) if settings["use_rslora"] else r)
        change = scale * (b.double() @ a.double()).float()
        weight = linear.weight.data + (change.T if flip else change)
        linear.weight.data = weight.to(merged_dtype or torch.float32).float()
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    if safe:
        safetensors.torch.save_file(state, folder / "adapter_model.safetensors")
    else:
        torch.save(state, folder / "adapter_model.bin")
    return folder


def _gpt2():
    config = transformers.GPT2Config(vocab_size=97, n_embd=48, n_layer=2, n_head=4, n_positions=64)
    return _randomize(transformers.GPT2LMHeadModel(config))


def _seeded(
    generator: Callable[..., Checkpoint], *arguments, **options
) -> Callable[[pathlib.Path], Checkpoint]:
    """The generator with its options, drawing the same numbers at each call and leaving torch's own seed alone."""

    @functools.wraps(generator)
    def generate(folder: pathlib.Path) -> Checkpoint:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            return generator(pathlib.Path(folder), *arguments, **options)

    return generate


GENERATORS: dict[str, Callable[[pathlib.Path], Checkpoint]] = {
    "svd-llm-llama-pickle": _seeded(svd_llm_pickle, "Llama"),
    "svd-llm-llama-pickle-old-config": _seeded(svd_llm_pickle, "Llama", old_config=True),
    "svd-llm-llama-pickle-some-dense-tied": _seeded(
        svd_llm_pickle, "Llama", some_dense=True, tied=True
    ),
    "svd-llm-mistral-pickle": _seeded(svd_llm_pickle, "Mistral"),
    "svd-llm-opt-pickle": _seeded(svd_llm_opt_pickle),
    "svd-llm-opt-pickle-mid-bias": _seeded(svd_llm_opt_pickle, mid_bias=True),
    "svd-llm-llama-saved": _seeded(svd_llm_directory, arena=False),
    "svd-llm-llama-arena": _seeded(svd_llm_directory, arena=True),
    "svd-llm-llama-arena-nested": _seeded(svd_llm_arena_nested),
    "ablinear-llama": _seeded(ablinear),
    "ablinear-llama-bf16": _seeded(ablinear, dtype=torch.bfloat16),
    "ablinear-llama-bias": _seeded(ablinear, functools.partial(_llama, bias=True)),
    "ablinear-llama-sharded-tied": _seeded(
        ablinear, functools.partial(_llama, tied=True), shards=3
    ),
    "ablinear-mistral": _seeded(ablinear, _mistral),
    "asvd-llama-head": _seeded(asvd, _llama, head=True),
    "asvd-opt": _seeded(asvd, _opt, safe=False),
    "asvd-opt-head-claims-tied": _seeded(
        asvd, functools.partial(_opt, tied=False), head=True, claims_tied=True
    ),
    "dobi-llama-pickle": _seeded(dobi_pickle),
    "dobi-llama-directory": _seeded(dobi_directory),
    "dobi-llama-remapped": _seeded(dobi_remapped),
    "dobi-llama-remapped-tied": _seeded(dobi_remapped, functools.partial(_llama, tied=True)),
    "palu-llama": _seeded(palu),
    "palu-llama-bias": _seeded(palu, bias=True),
    "palu-llama-some-above-break-even": _seeded(palu, bias=True, ranks={"v_proj": (11, 12)}),
    "palu-mistral-one-group": _seeded(palu, kind="mistral", groups=1),
    "basis-sharing-llama": _seeded(basis_sharing, layers=4),
    "basis-sharing-llama-odd-layers": _seeded(basis_sharing, layers=3),
    "lems-llama": _seeded(lems, functools.partial(_llama, bias=True)),
    "lems-opt": _seeded(lems, _opt),
    "zs-svd-llama": _seeded(zs_svd_directory, names_ranks=True),
    "zs-svd-llama-plain-config": _seeded(zs_svd_directory, names_ranks=False),
    "zs-svd-llama-pickle": _seeded(zs_svd_pickle),
    "zs-svd-llama-pickle-8-bit": _seeded(zs_svd_pickle, quantized=True),
    "aa-svd-llama-directories": _seeded(aa_svd_directories),
    "aa-svd-llama-directories-bias": _seeded(aa_svd_directories, bias=True),
    "aa-svd-llama-directories-8-bit": _seeded(aa_svd_directories, quantized=True),
    "aa-svd-llama": _seeded(aa_svd),
    "aa-svd-llama-bias": _seeded(aa_svd, bias=True),
    "fwsvd-bert": _seeded(fwsvd),
    "pela-bert": _seeded(pela),
}

# Dense models whose weights are products: nothing to load but for `refactor`.
DISGUISED: dict[str, Callable[[pathlib.Path], Checkpoint]] = {
    "fp16": _seeded(disguised),
    "bf16": _seeded(disguised, dtype=torch.bfloat16),
    "fp32": _seeded(disguised, dtype=torch.float32),
    "fp16-in-fp32": _seeded(disguised, stored=torch.float32),
    "tied": _seeded(disguised, functools.partial(_llama, tied=True)),
    "bias": _seeded(disguised, functools.partial(_llama, bias=True)),
    "opt": _seeded(disguised, _opt),
}
