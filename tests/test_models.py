"""Whole models: prompt and decode steps of the compiled model against the same model run eagerly."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
import zoo
from decoding import DECODERS, check_decoder, dynamic, run, static
from harness import assert_close

from fsvd_compile import LowRankLinear, factorize
from fsvd_compile.report import collect

# Matches per graph for two layers: (prompt, decode). The same for every spelling of a factorized linear.
LLAMA = {"lowrank_chain": 14, "siblings": 4, "gated_mlp": 2, "norm_prologue": 4, "residual": 4}
STATIC = {"rope_append": 2, "attention": 2}
GPT2 = {"lowrank_chain": 8, "activation": 2, "norm_prologue": 4, "residual": 4}
EXPECTED = {
    "llama": LLAMA | STATIC,
    "mistral": LLAMA | STATIC,
    "qwen2": LLAMA | STATIC,
    "qwen3": LLAMA | STATIC,
    # Norms stand between branch and residual, and attention has a softcap that no op knows.
    "gemma2": {k: v for k, v in LLAMA.items() if k != "residual"} | {"rope_append": 2},
    "gpt2": GPT2 | {"attention": 2},
}
ROTATED = [(name, list(zoo.SPELLINGS)[i % 3]) for i, name in enumerate(DECODERS)]
COUNTED = (
    "lowrank_chain",
    "siblings",
    "gated_mlp",
    "activation",
    "norm_prologue",
    "residual",
    "rope_append",
    "attention",
    "decode_attention",
)


def joined(matches: dict[str, int]) -> dict[str, int]:
    """What a decode graph has beyond a prompt's: appends joined with the attention behind them."""
    both = min(matches.get("rope_append", 0), matches.get("attention", 0))
    return matches | ({"decode_attention": both} if both else {})


def counted(report) -> dict[str, int]:
    return {name: n for name, n in report.matches.items() if name in COUNTED}


@pytest.mark.parametrize(
    ("name", "spelling"),
    # Every spelling of one model, one of the others: what a spelling becomes does not depend on what is around it.
    [("llama", s) for s in zoo.SPELLINGS]
    + [(name, s) for name, s in ROTATED if name not in ("llama", "opt")],
)
def test_decoder_static_cache(cheap, name, spelling):
    reports = check_decoder(name, spelling, static)
    expected = [EXPECTED[name], joined(EXPECTED[name])]
    # Once a window is full, transformers shifts its cache instead of writing at a position; only
    # every other layer of Gemma-2 has a window.
    full = {"mistral": 0, "gemma2": 1}
    if name in full:
        last = {k: v for k, v in EXPECTED[name].items() if k != "rope_append"}
        expected.append(joined(last | ({"rope_append": full[name]} if full[name] else {})))
    assert [r.phase for r in reports] == ["few", "decode", "decode"][: len(expected)]
    assert [r.unfused for r in reports] == [None] * len(expected)
    assert [counted(r) for r in reports] == expected


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_a_static_cache_after_a_growing_one(cheap, name):
    """The count of tokens that a window holds is a symbol then, which is known to be a number."""
    model = zoo.factorized(name)
    compiled = torch.compile(model, backend="flashsvd")
    ids = torch.randint(3, 97, (2, 9))
    more = {
        "attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False, "eos_token_id": None,
        "pad_token_id": 0,
    }  # fmt: skip
    for cache in ("dynamic", "static"):
        with collect() as reports:
            actual = compiled.generate(ids, cache_implementation=cache, **more)
        expected = model.generate(ids, cache_implementation=cache, **more)
        assert torch.equal(actual, expected) and reports


@pytest.mark.parametrize(
    ("name", "spelling"), [r for r in ROTATED if r[0] in ("llama", "gemma2", "gpt2", "opt")]
)
def test_decoder_dynamic_cache(cheap, name, spelling):
    reports = check_decoder(name, spelling, dynamic, steps=6)
    expected = {"opt": GPT2 | {"lowrank_chain": 12, "siblings": 2}}.get(
        name, EXPECTED.get(name, {})
    )
    chains = expected["lowrank_chain"]
    assert [counted(r)["lowrank_chain"] for r in reports] == [chains] * len(reports)
    assert all(counted(r).get("residual", 0) == expected.get("residual", 0) for r in reports)


@pytest.mark.parametrize("spelling", zoo.SPELLINGS)
def test_bert(cheap, spelling):
    model = zoo.factorized("bert", spelling)
    ids = torch.randint(0, 97, (3, 11))
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[1, 5:] = 0
    with torch.no_grad(), collect() as reports:
        expected = model(ids, attention_mask=mask).last_hidden_state
        actual = torch.compile(model, backend="flashsvd")(ids, attention_mask=mask)
    assert_close("bert", actual.last_hidden_state, expected, 1e-5)
    assert counted(reports[0]) == {
        "lowrank_chain": 13, "siblings": 2, "activation": 2, "residual": 4, "attention": 2,
    }  # fmt: skip


@pytest.mark.parametrize("spelling", zoo.SPELLINGS)
def test_plain_mlp(spelling):
    model = zoo.factorized("mlp", spelling)
    x = torch.randn(5, 48)
    with torch.no_grad(), collect() as reports:
        assert_close("mlp", torch.compile(model, backend="flashsvd")(x), model(x), 1e-5)
    assert counted(reports[0]) == {"lowrank_chain": 3, "activation": 1, "norm_prologue": 1}


@pytest.mark.parametrize(
    ("name", "cache_of"),
    [("mistral", static), ("gpt2", dynamic)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_left_padding(cheap, name, cache_of):
    model = zoo.factorized(name)
    prompt = torch.randint(1, 97, (3, 9))
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, :4], mask[2, :7] = 0, 0
    expected, tokens = run(model, prompt, 6, cache_of(model, 3), mask)
    torch._dynamo.reset()
    actual, compiled_tokens = run(
        torch.compile(model, backend="flashsvd"), prompt, 6, cache_of(model, 3), mask
    )
    assert_close(name, actual, expected, 1e-5)
    assert torch.equal(compiled_tokens, tokens)


def test_many_prompt_lengths_and_batches(cheap):
    """Dynamic shapes: what Dynamo makes symbolic after the second length is right for every later one."""
    model = zoo.factorized("llama")
    compiled = torch.compile(model, backend="flashsvd")
    torch._dynamo.reset()
    with torch.no_grad(), collect() as reports:
        for batch, length in [(1, 5), (1, 9), (2, 9), (3, 17), (1, 70), (4, 3)]:
            ids = torch.randint(1, 97, (batch, length))
            expected = model(ids, use_cache=False).logits
            assert_close(f"{batch}x{length}", compiled(ids, use_cache=False).logits, expected, 1e-5)
    assert len(reports) <= 3
    assert reports[-1].phase == "any"
    assert counted(reports[-1]) == LLAMA | {"attention": 2}


@pytest.mark.parametrize("name", ["llama", "mlp"])
def test_dynamic_from_the_first_call(cheap, name):
    """`dynamic=True` makes inputs of a model's floats, too: an epsilon is fixed where a norm is fused."""
    model = zoo.factorized(name, layers=1 if name == "llama" else None)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="flashsvd", dynamic=True)
    with torch.no_grad(), collect() as reports:
        for batch, length in [(2, 9), (3, 7), (1, 1)]:
            if name == "mlp":
                x, more = torch.randn(batch, length, next(model.parameters()).shape[1]), {}
            else:
                x = torch.randint(1, 97, (batch, length))
                more = {"use_cache": False}
            expected, actual = model(x, **more), compiled(x, **more)
            if name != "mlp":
                expected, actual = expected[0], actual[0]
            assert_close(f"{name} {batch}x{length}", actual, expected, 1e-5)
    assert reports[0].phase == "any" and reports[0].matches["lowrank_chain"]
    assert reports[0].matches["norm_prologue"]


def test_an_epsilon_read_from_a_tensor_is_left_alone(cheap):
    class Norm(torch.nn.Module):
        def __init__(self, size):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(size))
            self.register_buffer("eps", torch.tensor(0.5))

        def forward(self, x):
            x = x.float()
            return self.weight * (
                x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps.item())
            )

    torch.manual_seed(3)
    model = torch.nn.Sequential(Norm(32), LowRankLinear(32, 24, 5)).eval().requires_grad_(False)
    with torch._dynamo.config.patch(capture_scalar_outputs=True), collect() as reports:
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="flashsvd")
        for eps in (0.5, 2.0):
            model[0].eps.fill_(eps)
            x = torch.randn(3, 32)
            assert_close(f"eps {eps}", compiled(x), model(x), 1e-5)
    assert len(reports) == 1 and "norm_prologue" not in reports[0].matches


def test_packed_tokens_like_continuous_batching(cheap):
    """(1, total_tokens) inputs with explicit positions and a block-diagonal mask: the mask is what counts."""
    model = zoo.factorized("llama")
    lengths = (5, 3, 8)
    ids = torch.randint(1, 97, (1, sum(lengths)))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = (owner[:, None] == owner[None]) & torch.ones(len(owner), len(owner), dtype=bool).tril()
    inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": mask[None, None]}
    with torch.no_grad(), collect() as reports:
        expected = model(**inputs, use_cache=False).logits
        actual = torch.compile(model, backend="flashsvd")(**inputs, use_cache=False).logits
    assert_close("packed", actual, expected, 1e-5)
    assert counted(reports[0])["attention"] == 2
    start = 0
    with torch.no_grad():
        for n in lengths:
            alone = model(ids[:, start : start + n], use_cache=False).logits
            assert_close("alone", actual[:, start : start + n], alone, 1e-5)
            start += n


@torch.no_grad()
def test_a_model_that_looks_at_a_weight(cheap):
    """T5 reads `.weight.dtype` of a linear layer in every forward call; nothing is multiplied out for it."""
    config = transformers.T5Config(
        vocab_size=97, d_model=48, d_kv=8, d_ff=88, num_layers=2, num_heads=6, decoder_start_token_id=0
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    factorize(model, 0.8, progress=False)
    assert isinstance(model.encoder.block[0].layer[1].DenseReluDense.wo, LowRankLinear)
    given = {
        "input_ids": torch.randint(1, 97, (2, 9)),
        "decoder_input_ids": torch.randint(1, 97, (2, 4)),
        "use_cache": False,
    }
    compiled = torch.compile(model, backend="flashsvd", fullgraph=True)
    with collect() as reports:
        assert_close("logits", compiled(**given).logits, model(**given).logits, 1e-5)
    assert [r.matches["lowrank_chain"] for r in reports] == [32]


def test_a_model_that_matches_nothing(cheap):
    torch.manual_seed(3)
    model = zoo.MODELS["llama"]().eval().requires_grad_(False)
    ids = torch.randint(1, 97, (2, 6))
    with torch.no_grad(), collect() as reports:
        actual = torch.compile(model, backend="flashsvd")(ids, use_cache=False).logits
        assert_close("dense", actual, model(ids, use_cache=False).logits, 1e-5)
    assert "lowrank_chain" not in reports[0].matches


def test_two_caches_in_turn(cheap):
    model = zoo.factorized("llama")
    compiled = torch.compile(model, backend="flashsvd")
    prompts = [torch.randint(1, 97, (2, 7)) for _ in range(2)]
    caches = [static(model, 2) for _ in range(2)]
    eager = [copy.deepcopy(c) for c in caches]
    ids, eager_ids = list(prompts), list(prompts)
    with torch.no_grad():
        for _ in range(4):
            for i in range(2):
                out = compiled(ids[i], past_key_values=caches[i], use_cache=True).logits
                ref = model(eager_ids[i], past_key_values=eager[i], use_cache=True).logits
                assert_close(f"cache {i}", out, ref, 1e-5)
                ids[i], eager_ids[i] = out[:, -1:].argmax(-1), ref[:, -1:].argmax(-1)


# With the matches of 3 layers, and SigLIP's pooling head.
ENCODERS = {
    "siglip": lambda sizes: transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(**sizes, image_size=32, patch_size=8)
    ),
    "whisper": lambda _: transformers.WhisperModel(
        transformers.WhisperConfig(
            d_model=48, encoder_layers=3, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=88, decoder_ffn_dim=88, num_mel_bins=8, max_source_positions=20, vocab_size=97,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        )
    ).get_encoder(),
}  # fmt: skip


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_behind_a_convolution(cheap, name):
    """Their patches and frames come transposed out of it, and three layers hand that layout on."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 48, "intermediate_size": 88, "num_hidden_layers": 3, "num_attention_heads": 4,
    }  # fmt: skip
    model = ENCODERS[name](sizes).eval().requires_grad_(False)
    factorize(model, 0.5, progress=False)
    x = torch.randn(2, 8, 40) if name == "whisper" else torch.randn(2, 3, 32, 32)
    with torch.no_grad(), collect() as reports:
        actual = torch.compile(model, backend="flashsvd", fullgraph=True)(x).last_hidden_state
    chains = sum(report.matches["lowrank_chain"] for report in reports)
    assert chains == (18 if name == "whisper" else 20)
    assert_close("hidden", actual, model(x).last_hidden_state, 1e-5)
