"""Whole models on a CUDA device: Triton kernels, Inductor and CUDA-graph replay together."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
import zoo
from decoding import DECODERS, check_decoder, dynamic, run, static
from harness import assert_close, rel_rms
from torch import nn

from fsvd_compile import LowRankLinear, backend
from fsvd_compile.kernels import _triton
from fsvd_compile.report import collect

pytestmark = pytest.mark.gpu

SPELLINGS = {name: list(zoo.SPELLINGS)[i % 3] for i, name in enumerate(zoo.MODELS)}
STATIC = [name for name in DECODERS if name != "opt"]  # transformers breaks OPT's static graph


@pytest.fixture
def captures():
    """Counts what the backend's pool captures and replays from here on."""
    backend._pool.captures.clear()
    backend._pool.replays.clear()
    backend._pool.stood_aside.clear()
    return backend._pool


@pytest.mark.parametrize("spelling", zoo.SPELLINGS)
@pytest.mark.parametrize("name", STATIC)
def test_fp32_like_eager(captures, name, spelling):
    reports = check_decoder(name, spelling, static, device="cuda")
    # A window that slides keeps its length as an int that Dynamo makes symbolic.
    if name not in ("mistral", "gemma2"):
        assert [r.graphs for r in reports] == ["step", "step"]
        # One step warms up, one captures and replays, fourteen replay.
        assert sum(captures.captures.values()) == 1
        assert sum(captures.replays.values()) == 15


@pytest.mark.parametrize("name", DECODERS)
def test_fp32_like_eager_with_a_dynamic_cache(captures, name):
    reports = check_decoder(name, SPELLINGS[name], dynamic, steps=6, device="cuda")
    assert "pieces" in reports[-1].graphs
    layers = {name: n for name, n in captures.captures.items() if "layer" in name}
    # Of five steps of any length one warms up, one captures and replays, three replay.
    assert layers and all(n == 1 for n in layers.values())
    assert all(captures.replays[name] == 4 for name in layers)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_growing_caches_in_turn_with_a_mask(name):
    """Two texts of their own lengths by turns, one with padding on the left; what was handed out stays as it was."""
    model, wide = half(name, torch.bfloat16, SPELLINGS[name])
    masks = [None, torch.ones(2, 9, dtype=torch.long, device="cuda")]
    masks[1][0, :3] = 0
    prompts = [torch.randint(1, 97, (2, n), device="cuda") for n in (6, 9)]

    def turns(model, forced=None):
        caches, ids, found = [dynamic(model, 2), dynamic(model, 2)], list(prompts), []
        given = list(masks)
        with torch.no_grad():
            for step in range(20):
                at = step % 2
                extra = {} if given[at] is None else {"attention_mask": given[at]}
                out = model(ids[at], past_key_values=caches[at], use_cache=True, **extra)
                found.append(out.logits[:, -1])
                ids[at] = found[-1][:, None].argmax(-1) if forced is None else forced[step]
                if given[at] is not None:
                    given[at] = torch.cat([given[at], given[at].new_ones(2, 1)], 1)
        return torch.stack(found)

    expected = turns(wide)
    tokens = list(expected.argmax(-1)[..., None])
    eager = turns(model, tokens)
    with collect() as reports:
        ours = turns(torch.compile(model, backend="flashsvd"), tokens)
    assert_close(name, ours, expected, 1.1 * rel_rms(eager, expected))
    assert any("pieces" in report.graphs for report in reports)


def test_growing_caches_in_threads():
    """Pieces lend results to one another: two threads that decode at once do not see each other's."""
    model = zoo.factorized("llama").to("cuda")
    compiled = torch.compile(model, backend="flashsvd")
    prompts = [torch.randint(1, 97, (1, 7), device="cuda") for _ in range(2)]
    expected = [run(model, prompt, 24, dynamic(model, 1))[0] for prompt in prompts]
    run(compiled, prompts[0], 6, dynamic(model, 1))

    def decode(prompt):
        with torch.cuda.stream(torch.cuda.Stream()):
            found = run(compiled, prompt, 24, dynamic(model, 1))[0]
            torch.cuda.current_stream().synchronize()
        return found

    torch.cuda.synchronize()
    with ThreadPoolExecutor(2) as threads:
        for ours, right in zip(threads.map(decode, prompts), expected, strict=True):
            assert_close("logits", ours, right, 1e-5)


@pytest.mark.parametrize("graphs", ["layer", "off"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_fp32_like_eager_by_layer_and_uncaptured(captures, name, graphs):
    options = {"cuda_graphs": graphs}
    check_decoder(name, "sequential", static, device="cuda", options=options)
    assert bool(captures.captures) == (graphs == "layer")


def half(name, dtype, spelling):
    model = zoo.factorized(name, spelling).to("cuda", dtype)
    return model, copy.deepcopy(model).float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", DECODERS)
def test_decoder_error_is_that_of_eager(name, dtype):
    """Relative RMS to an fp32 copy of the same weights, on the same tokens, at most 1.1 times eager's."""
    model, wide = half(name, dtype, SPELLINGS[name])
    cache_of = dynamic if name == "opt" else static
    prompt = torch.randint(1, 97, (8, 7), device="cuda")
    expected, tokens = run(wide, prompt, 16, cache_of(wide, 8))
    for lead in ((), ("decode",)):  # batch 8: few tokens; batch 1: one
        rows = slice(0, 1) if lead else slice(None)
        args = prompt[rows], 16
        eager, _ = run(model, *args, cache_of(model, len(args[0])), forced=tokens[rows])
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="flashsvd")
        ours, _ = run(compiled, *args, cache_of(model, len(args[0])), forced=tokens[rows])
        least = rel_rms(eager, expected[rows])
        assert_close(f"{name}, batch {len(args[0])}", ours, expected[rows], 1.1 * least)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_encoder_and_mlp_errors_are_those_of_eager(dtype):
    ids = torch.randint(0, 97, (3, 11), device="cuda")
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    x = torch.randn(40, 48, device="cuda", dtype=dtype)
    calls = {
        "bert": lambda model, _: model(ids, attention_mask=mask).last_hidden_state,
        "mlp": lambda model, wide: model(x.float() if wide else x),
    }
    for name, call in calls.items():
        for spelling in zoo.SPELLINGS:
            model, exact = half(name, dtype, spelling)
            with torch.no_grad():
                expected, eager = call(exact, True), call(model, False)
                ours = call(torch.compile(model, backend="flashsvd"), False)
            assert_close(f"{name}/{spelling}", ours, expected, 1.1 * rel_rms(eager, expected))


@pytest.mark.parametrize("graphs", ["step", "off"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_dependent_launch_changes_no_bit(monkeypatch, name, graphs):
    model, _ = half(name, torch.bfloat16, SPELLINGS[name])
    prompt = torch.randint(1, 97, (1, 7), device="cuda")
    logits = []
    for on in (True, False):
        if not on:
            monkeypatch.setattr(_triton, "supports_pdl", lambda device: False)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="flashsvd", options={"cuda_graphs": graphs})
        logits.append(run(compiled, prompt, 12, static(model, 1))[0])
    assert _triton.capability(prompt.device) < (9, 0) or torch.equal(*logits)


def test_left_padding():
    model = zoo.factorized("llama").cuda()
    prompt = torch.randint(1, 97, (3, 9), device="cuda")
    mask = torch.ones_like(prompt)
    mask[0, :4] = mask[2, :7] = 0
    expected, tokens = run(model, prompt, 8, static(model, 3), mask)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="flashsvd")
    actual, ours = run(compiled, prompt, 8, static(model, 3), mask)
    assert_close("llama", actual, expected, 1e-5)
    assert torch.equal(ours, tokens)


@pytest.mark.parametrize("graphs", ["step", "layer"])
def test_caches_in_turn_and_a_new_one_later(captures, graphs):
    model = zoo.factorized("llama").cuda()
    compiled = torch.compile(model, backend="flashsvd", options={"cuda_graphs": graphs})

    def check(count, steps):
        caches = [static(model, 2) for _ in range(count)]
        twins = [copy.deepcopy(c) for c in caches]
        ids = [torch.randint(1, 97, (2, 7), device="cuda") for _ in range(count)]
        kept = []
        with torch.no_grad():
            for _ in range(steps):
                for i in range(count):
                    out = compiled(ids[i], past_key_values=caches[i], use_cache=True).logits
                    ref = model(ids[i], past_key_values=twins[i], use_cache=True).logits
                    kept.append((out, ref))
                    ids[i] = ref[:, -1:].argmax(-1)
        # Read at the end: what a call returned is not overwritten by later ones.
        for out, ref in kept:
            assert_close(graphs, out, ref, 1e-5)
        for cache, twin in zip(caches, twins, strict=True):
            for a, b in zip(cache.layers, twin.layers, strict=True):
                assert_close("keys", a.keys, b.keys, 1e-5)
                assert torch.equal(a.cumulative_length, b.cumulative_length)

    check(2, 7)
    check(1, 7)
    check(3, 5)
    assert captures.captures


def test_weights_changed_after_capture_are_seen(captures):
    model = zoo.factorized("llama").cuda()
    compiled = torch.compile(model, backend="flashsvd")
    weights = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n][:6]
    ids = torch.randint(1, 97, (1, 1), device="cuda")
    caches = static(model, 1), static(model, 1)

    def in_place():
        for p in weights:
            p.mul_(1.5)

    def swap():
        for p in weights:
            p.data = torch.randn_like(p) * 0.1

    def load():
        model.load_state_dict({k: v * 0.9 for k, v in model.state_dict().items()})

    def assign():
        model.load_state_dict({k: v * 0.9 for k, v in model.state_dict().items()}, assign=True)
        model.requires_grad_(False)

    with torch.no_grad():
        for change in (lambda: None, in_place, swap, load, assign):
            change()
            for _ in range(4):
                actual = compiled(ids, past_key_values=caches[0], use_cache=True).logits
                expected = model(ids, past_key_values=caches[1], use_cache=True).logits
                assert_close(change.__name__, actual, expected, 1e-5)
    assert captures.captures


@pytest.mark.parametrize("how", ["torch.compile", "model.compile", "forward", "config"])
def test_generate(captures, how):
    model = zoo.factorized("llama").cuda()
    prompt = torch.tensor([[5, 17, 3, 44, 8]], device="cuda")
    settings = {
        "attention_mask": torch.ones_like(prompt), "max_new_tokens": 12, "do_sample": False,
        "pad_token_id": 0, "eos_token_id": None,
    }  # fmt: skip
    expected = model.generate(prompt, **settings)
    compiled = model
    if how == "torch.compile":
        compiled = torch.compile(model, backend="flashsvd")
    elif how == "model.compile":
        model.compile(backend="flashsvd")
    elif how == "forward":
        model.forward = torch.compile(model.forward, backend="flashsvd")
    else:
        settings["compile_config"] = transformers.CompileConfig(backend="flashsvd", fullgraph=False)
    with collect() as reports:
        for _ in range(2):  # the second call brings a new cache
            tokens = compiled.generate(prompt, cache_implementation="static", **settings)
            assert torch.equal(tokens, expected)
    wanted = ["decode"] if how == "config" else ["few", "decode"]
    assert [r.phase for r in reports] == wanted
    assert captures.captures


def test_compiling_costs_no_memory():
    """Peak of a compiled step over parameters, cache and what eager needs: nothing is packed or copied."""
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=2048, intermediate_size=5504, num_hidden_layers=24,
        num_attention_heads=16,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
        for path, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and path != "lm_head":
                parent, _, child = path.rpartition(".")
                n, m = module.in_features, module.out_features
                setattr(model.get_submodule(parent), child, LowRankLinear(n, m, 512, bias=False))
    model = model.bfloat16().to_empty(device="cuda").eval().requires_grad_(False)
    for p in model.parameters():
        nn.init.normal_(p, std=0.02)
    cache = zoo.static_cache(model, 1, 64, "cuda", torch.bfloat16)
    ids = torch.randint(0, 512, (1, 1), device="cuda")
    compiled = torch.compile(model, backend="flashsvd")
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)  # cuBLAS's workspace is not ours
        before = torch.cuda.memory_allocated()
        compiled(ids, past_key_values=cache, use_cache=True)  # Inductor times its kernels here
        torch.cuda.reset_peak_memory_stats()
        for _ in range(4):
            compiled(ids, past_key_values=cache, use_cache=True)
    torch.cuda.synchronize()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert torch.cuda.max_memory_allocated() - before <= 0.03 * weights
