"""A model's KV cache serves its next `generate`, and its length never makes a graph symbolic."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
import zoo
from transformers import (
    DynamicCache,
    FalconConfig,
    FalconForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MaxLengthCriteria,
    StaticCache,
    StoppingCriteriaList,
)

from fsvd_compile import backend, factorize, kept_cache
from fsvd_compile.generate import decode_loop
from fsvd_compile.report import collect

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def model(request, monkeypatch):
    if request.param == "cpu":
        request.getfixturevalue("cheap")
        # What is decided by memory and speed of a GPU only.
        monkeypatch.setattr(kept_cache, "_static_pays", lambda model: not is_alibi(model))
        monkeypatch.setattr(kept_cache, "_fits", lambda *args, **kwargs: True)
    monkeypatch.setattr(kept_cache, "SHORTEST", 16)
    torch._dynamo.reset()
    yield zoo.factorized("llama", layers=1).to(request.param)
    torch._dynamo.reset()


def is_alibi(model):
    return getattr(model.config, "alibi", False)


def prompt(model, length=5, batch=1):
    torch.manual_seed(length + 7 * batch)
    return torch.randint(1, 97, (batch, length)).to(model.device)


def generate(model, ids, new=8, **more):
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False,
        pad_token_id=0, **{"eos_token_id": None, **more},
    )  # fmt: skip


def addresses(model):
    _, cache = kept_cache._kept[model]
    return [t.data_ptr() for layer in cache.layers for t in (layer.keys, layer.values)]


def new_cache(model, **more):
    return StaticCache(config=model.config, **{"max_cache_len": 20, **more})


@pytest.mark.parametrize(
    "length, expected",
    [(1, 1024), (1024, 1024), (1025, 2048), (4096, 4096), (4097, 8192), (40000, 40960)],
)
def test_lengths(length, expected):
    assert kept_cache.rounded(length) == expected


@pytest.mark.parametrize("kind", [None, "static"])
def test_the_next_generate_has_the_same_memory_and_compiles_nothing(model, kind):
    compiled = torch.compile(model, backend="flashsvd")
    first = prompt(model)
    expected = generate(model, first)
    assert torch.equal(generate(compiled, first, cache_implementation=kind), expected)
    before = addresses(model)
    with collect() as reports:
        for start in (3, 1):  # other tokens than those the cache still holds
            ids = first.roll(start, 1)
            expected = generate(model, ids)
            assert torch.equal(generate(compiled, ids, cache_implementation=kind), expected)
    assert not reports
    assert addresses(model) == before


def test_longer_texts_and_other_batches_stay_fused(model):
    compiled = torch.compile(model, backend="flashsvd")
    decode = []
    for new, length, batch in ((8, 5, 1), (20, 5, 1), (9, 6, 3)):
        ids = prompt(model, length, batch)
        expected = generate(model, ids, new)
        with collect() as reports:
            out = generate(compiled, ids, new)
        assert torch.equal(out, expected)
        decode += [r for r in reports if r.tokens == batch]
    assert [r.tokens for r in decode] == [1, 1, 3]
    assert all(r.matches.get("decode_attention") == model.config.num_hidden_layers for r in decode)
    assert all(r.matches.get("rope_append") == model.config.num_hidden_layers for r in decode)


@pytest.mark.parametrize("heads", [1, 2])
def test_prompts_of_other_lengths_share_one_graph(model, heads):
    """The first length has a graph of its own, the second one makes it symbolic, and it stays that."""
    config = LlamaConfig(
        vocab_size=97, hidden_size=256, intermediate_size=320, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=heads,
    )  # fmt: skip
    torch.manual_seed(3)
    dtype = torch.bfloat16 if model.device.type == "cuda" else torch.float32
    plain = LlamaForCausalLM(config).to(model.device, dtype).eval().requires_grad_(False)
    factorize(plain, 0.5)
    compiled = torch.compile(plain, backend="flashsvd")
    compiled.generate(prompt(plain, 40), max_new_tokens=3, do_sample=False, pad_token_id=0)
    with collect() as reports:
        for length in (37, 45, 50):
            compiled.generate(
                prompt(plain, length), max_new_tokens=3, do_sample=False, pad_token_id=0
            )
    assert [r.phase for r in reports] == ["any"]


def test_more_graphs_than_dynamo_allows(model):
    compiled = torch.compile(model, backend="flashsvd")
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        for batch in (1, 2):
            ids = prompt(model, batch=batch)
            assert torch.equal(generate(compiled, ids), generate(model, ids))
        assert torch._dynamo.config.recompile_limit == 2


def test_calls_beside_generate_have_graphs_left(model):
    """They count those that `generate` made; behind Dynamo's own limit it would compile nothing more."""
    compiled = torch.compile(model, backend="flashsvd")
    with torch._dynamo.config.patch(recompile_limit=8):
        for batch in (1, 2, 3, 4):
            ids = prompt(model, batch=batch)
            for cache in (None, "static"):
                generate(compiled, ids, cache_implementation=cache)
            with torch.no_grad():
                compiled(ids)
        with collect() as reports:
            ids = prompt(model, batch=5)
            assert torch.equal(generate(compiled, ids), generate(model, ids))
        assert reports


def test_a_static_cache_of_the_callers_is_left_alone(model):
    compiled = torch.compile(model, backend="flashsvd")
    own = new_cache(model)
    ids = prompt(model)
    expected = generate(model, ids)
    assert torch.equal(generate(compiled, ids, past_key_values=own), expected)
    assert int(own.get_seq_length()) == 5 + 8 - 1
    assert model not in kept_cache._kept
    own = DynamicCache()
    assert torch.equal(generate(compiled, ids, past_key_values=own), expected)
    assert model not in kept_cache._kept


def test_a_dynamic_cache_that_was_asked_for_stays(model):
    compiled = torch.compile(model, backend="flashsvd")
    ids = prompt(model)
    assert torch.equal(
        generate(compiled, ids, cache_implementation="dynamic"), generate(model, ids)
    )
    assert model not in kept_cache._kept


def test_a_model_that_nobody_compiled_keeps_its_dynamic_cache(model):
    ids = prompt(model)
    expected = generate(model, ids)
    assert torch.equal(generate(model, ids, custom_generate=decode_loop), expected)
    assert model not in kept_cache._kept


def offloaded(model):
    try:
        return new_cache(model, offloading=True)
    except (
        RuntimeError
    ) as error:  # transformers asks torch for a stream, of which torch 2.14 has none on a CPU
        pytest.skip(f"no offloaded cache here: {error}")


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(lambda m: offloaded(m), id="offloaded"),
        pytest.param(lambda m: DynamicCache(), id="without layers"),
        pytest.param(lambda m: None, id="none"),
        pytest.param(lambda m: sliding(m), id="sliding window"),
        pytest.param(lambda m: used(m), id="used"),
    ],
)
def test_what_is_not_taken(model, given):
    cache = given(model)
    assert kept_cache.take(model, cache, prompt(model), 20, dynamic=True) is cache
    kept_cache.keep(model, cache)
    assert model not in kept_cache._kept


def sliding(model):
    config = zoo.factorized("gemma2").config
    return StaticCache(config=config, max_cache_len=20)


def used(model):
    cache = new_cache(model)
    model(prompt(model), past_key_values=cache, use_cache=True)
    return cache


def test_under_autocast_and_in_training_it_stays(model):
    cache = new_cache(model)
    with torch.autocast(model.device.type, dtype=torch.bfloat16):
        assert kept_cache.take(model, cache, prompt(model), 20) is cache
    assert kept_cache.take(model.train(), cache, prompt(model), 20) is cache
    assert kept_cache.take(model.eval(), cache, prompt(model), 20) is not cache


def falcon(**more):
    torch.manual_seed(2)
    config = FalconConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, **more,
    )  # fmt: skip
    return FalconForCausalLM(config).eval().requires_grad_(False)


@pytest.mark.parametrize("kind", [None, "static"])
def test_keys_of_another_size_than_the_configuration_tells(model, kind):
    """One KV head where transformers' guess for a static cache is four."""
    other = falcon().to(model.device)
    assert other._get_static_cache_init_shape()[0] == 4
    ids = prompt(other)
    expected = generate(other, ids)
    compiled = torch.compile(other, backend="flashsvd")
    for _ in range(2):
        assert torch.equal(generate(compiled, ids, cache_implementation=kind), expected)
    assert kept_cache._kept[other][1].layers[0].keys.shape[1] == 1


def test_a_model_that_cannot_use_a_static_cache(model, caplog):
    other = falcon(alibi=True, multi_query=False).to(model.device)
    ids = prompt(other)
    expected = generate(other, ids)
    assert torch.equal(generate(torch.compile(other, backend="flashsvd"), ids), expected)
    assert other not in kept_cache._kept


def test_embeddings_as_a_prompt_count(model):
    compiled = torch.compile(model, backend="flashsvd")
    torch.manual_seed(4)
    size = model.config.hidden_size
    given = {
        "inputs_embeds": torch.randn(1, 30, size, device=model.device),
        "attention_mask": torch.ones(1, 30, dtype=torch.long, device=model.device),
        "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None,
    }  # fmt: skip
    assert torch.equal(compiled.generate(**given), model.generate(**given))


def test_a_criterion_below_the_length_of_the_prompt(model):
    compiled = torch.compile(model, backend="flashsvd")
    ids = prompt(model, 30)
    more = {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(10)])}
    expected = generate(model, ids, **more)
    assert expected.shape[1] == 31
    assert torch.equal(generate(compiled, ids, **more), expected)


def test_dynamic_becomes_static_only_where_it_pays_and_fits(model, monkeypatch, caplog):
    cache = DynamicCache(config=model.config)
    assert kept_cache.take(model, cache, prompt(model), 20) is cache  # not asked for
    assert kept_cache.take(model, cache, prompt(model), None, dynamic=True) is cache  # no length
    monkeypatch.setattr(kept_cache, "_fits", lambda *args, **kwargs: False)
    assert kept_cache.take(model, cache, prompt(model), 20, dynamic=True) is cache
    assert "max_new_tokens" in caplog.text
    monkeypatch.setattr(kept_cache, "_fits", lambda *args, **kwargs: True)
    monkeypatch.setattr(kept_cache, "_static_pays", lambda model: False)
    assert kept_cache.take(model, cache, prompt(model), 20, dynamic=True) is cache
    monkeypatch.setattr(kept_cache, "_static_pays", lambda model: True)
    assert type(kept_cache.take(model, cache, prompt(model), 20, dynamic=True)) is StaticCache


@pytest.mark.gpu
def test_the_second_call_captures_nothing():
    """Neither the prompt, which every call runs once, nor the step."""
    model = zoo.factorized("llama").cuda()
    compiled = torch.compile(model, backend="flashsvd")
    first, second = prompt(model), prompt(model).roll(1, 1)
    expected = generate(model, second)
    generate(compiled, first)
    before, replays = backend._pool.captures.total(), backend._pool.replays.total()
    assert torch.equal(generate(compiled, second), expected)
    assert backend._pool.captures.total() == before
    assert backend._pool.replays.total() > replays + 1


@pytest.mark.gpu
def test_half_of_the_free_memory(monkeypatch):
    model = zoo.factorized("llama").cuda()
    heads, size = model._get_static_cache_init_shape()
    layers = model.config.num_hidden_layers
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    free -= torch.cuda.memory_allocated()
    monkeypatch.setattr(kept_cache, "LONGEST", 1 << 60)
    length = free // 2 // (2 * layers * heads * size * 4)
    for share, fits in ((0.98, True), (1.02, False)):
        layout = kept_cache._Layout(1, int(share * length), torch.float32, model.device, 0)
        assert kept_cache._fits(layout, heads, size, layers) == fits
    assert kept_cache._static_pays(model)
    assert not kept_cache._static_pays(falcon(alibi=True, multi_query=False).cuda())


def test_nobody_asked_for_a_very_long_one():
    layout = kept_cache._Layout(1, kept_cache.LONGEST + 4096, torch.float32, torch.device("cpu"), 0)
    assert not kept_cache._fits(layout, 1, 8, 1)


def test_another_shape_gets_another_cache(model):
    first = kept_cache.take(model, new_cache(model), prompt(model), 20)
    kept_cache.keep(model, first)
    for more in ({"batch": 2}, {"length": 40}):
        shape = {"batch": 1, "length": 20} | more
        given = new_cache(model, max_cache_len=shape["length"])
        ids = prompt(model, batch=shape["batch"])
        other = kept_cache.take(model, given, ids, shape["length"])
        assert other is not first
        assert other.layers[0].keys.shape[0] == shape["batch"]
        assert other.layers[0].max_cache_len == other.layers[0].keys.shape[2] >= shape["length"]
        kept_cache.keep(model, first)
    model.double()
    assert (
        kept_cache.take(model, new_cache(model), prompt(model), 20).layers[0].keys.dtype
        == torch.float64
    )


def test_taken_from_twice_there_are_two_and_what_is_kept_is_empty(model):
    first = kept_cache.take(model, new_cache(model), prompt(model), 20)
    model(prompt(model), past_key_values=first, use_cache=True)
    first.layers[0].keys[:, :, -1] = float("nan")
    kept_cache.keep(model, first)
    again = kept_cache.take(model, new_cache(model), prompt(model), 20)
    assert again is first
    assert not any(t.any() for layer in again.layers for t in (layer.keys, layer.values))
    assert int(again.get_seq_length()) == 0
    assert kept_cache.take(model, new_cache(model), prompt(model), 20) is not first


def test_threads_have_caches_of_their_own(model):
    prompts = [prompt(model, 5, 1) + k for k in range(3)]
    expected = [generate(model, ids) for ids in prompts]
    compiled = torch.compile(model, backend="flashsvd")
    generate(compiled, prompts[0])
    results = {}

    def work(k):
        results[k] = [generate(compiled, prompts[k]) for _ in range(4)]

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    for k in range(3):
        assert all(torch.equal(out, expected[k]) for out in results[k])


def test_an_error_keeps_nothing(model):
    compiled = torch.compile(model, backend="flashsvd")
    generate(compiled, prompt(model))
    assert model in kept_cache._kept

    def stop(input_ids, scores):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(compiled, prompt(model), logits_processor=[stop])
    assert model not in kept_cache._kept


def test_made_in_inference_mode_it_works_outside(model):
    compiled = torch.compile(model, backend="flashsvd")
    ids = prompt(model)
    expected = generate(model, ids)
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(generate(compiled, ids), expected)


def test_reset_and_the_end_of_the_model_free_it(model):
    compiled = torch.compile(model, backend="flashsvd")
    generate(compiled, prompt(model))
    keys = weakref.ref(kept_cache._kept[model][1].layers[0].keys)
    torch._dynamo.reset()
    del compiled
    gc.collect()
    assert keys() is None
    other = zoo.factorized("llama").to(model.device)
    generate(torch.compile(other, backend="flashsvd"), prompt(other))
    assert other in kept_cache._kept
    torch._dynamo.reset()
    assert other not in kept_cache._kept
