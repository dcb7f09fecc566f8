"""`generate` reaches the compiled model however people write it, and gives the tokens of the eager model."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch._dynamo.backends.debugging import aot_eager
from transformers import CompileConfig

from fsvd_compile import backend
from fsvd_compile.report import collect

PROMPT = torch.tensor([[5, 17, 3, 44, 8]])


@pytest.fixture(autouse=True)
def cheap(monkeypatch):
    monkeypatch.setattr(backend, "_inductor", lambda config: aot_eager)
    torch._dynamo.reset()


def generate(model, **kwargs):
    return model.generate(
        PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=8, do_sample=False,
        pad_token_id=0, eos_token_id=None, **kwargs,
    )  # fmt: skip


@pytest.fixture
def model():
    return zoo.factorized("llama", layers=1)


@pytest.fixture
def expected(model):
    return generate(model)


def test_optimized_module(model, expected):
    compiled = torch.compile(model, backend="flashsvd")
    with collect() as reports:
        assert torch.equal(generate(compiled), expected)
    # The prompt, the first token, and one graph for every later length of the dynamic cache.
    assert [r.phase for r in reports] == ["few", "decode", "decode"]
    assert model._compiled_call_impl is None, "the original must be left as it was"
    with collect() as reports:
        assert torch.equal(generate(compiled), expected)
    assert reports == [], "a second generate must not compile again"


def test_an_adapted_model(model):
    """PEFT's generate is the adapted model's own, whose calls have to be compiled ones, too."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, target_modules=["q_proj.1"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval().requires_grad_(False)
    expected = generate(adapted)
    with collect() as reports:
        assert torch.equal(generate(torch.compile(adapted, backend="flashsvd")), expected)
    assert reports and model._compiled_call_impl is None


def test_optimized_module_static_cache(model, expected):
    compiled = torch.compile(model, backend="flashsvd")
    with collect() as reports:
        assert torch.equal(generate(compiled, cache_implementation="static"), expected)
    assert [r.phase for r in reports] == ["few", "decode"]


def test_other_backends_are_not_touched(model, expected):
    graphs = []

    def other(gm, inputs):
        graphs.append(gm)
        return gm

    compiled = torch.compile(model, backend="flashsvd")
    with collect() as reports:
        assert torch.equal(generate(torch.compile(model, backend=other)), expected)
    assert graphs == [], "torch hands generate of other backends to the uncompiled model"
    assert reports == []
    del compiled


def test_an_error_inside_generate_restores_the_model(model):
    compiled = torch.compile(model, backend="flashsvd")
    with pytest.raises(ValueError, match="max_new_tokens"):
        compiled.generate(PROMPT, max_new_tokens=-1)
    assert model._compiled_call_impl is None


def test_model_compile(model, expected):
    model.compile(backend="flashsvd")
    with collect() as reports:
        assert torch.equal(generate(model), expected)
    assert [r.phase for r in reports] == ["few", "decode", "decode"]


def test_forward_replaced(model, expected):
    model.forward = torch.compile(model.forward, backend="flashsvd")
    with collect() as reports:
        assert torch.equal(generate(model), expected)
    assert [r.phase for r in reports] == ["few", "decode", "decode"]


@pytest.mark.parametrize("mode", ["reduce-overhead", None], ids=["default_mode", "no_mode"])
def test_compile_config_with_static_cache(model, expected, mode):
    config = CompileConfig(backend="flashsvd", mode=mode, fullgraph=False)
    config._compile_all_devices = True  # transformers compiles on a CPU only when told so
    with collect() as reports:
        tokens = generate(model, cache_implementation="static", compile_config=config)
    assert torch.equal(tokens, expected)
    assert [r.phase for r in reports] == ["decode"], "transformers runs the prompt uncompiled"


def test_batch_with_left_padding(model):
    ids = torch.randint(1, 97, (3, 7))
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[1, :5] = 0
    ids[mask == 0] = 0
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(ids, attention_mask=mask, **settings)
    compiled = torch.compile(model, backend="flashsvd")
    with collect() as reports:
        assert torch.equal(compiled.generate(ids, attention_mask=mask, **settings), expected)
    assert len(reports) >= 2
