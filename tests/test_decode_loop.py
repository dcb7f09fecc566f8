"""The decode loop gives what transformers' own gives: tokens, random numbers, streams, returned objects."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch
import transformers
import zoo
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fsvd_compile import generate
from fsvd_compile.errors import VersionError
from fsvd_compile.generate import _processed, decode_loop

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
NEW = 9


class Shifted(LogitsProcessor):
    """Sees the tokens so far and changes the scores by them."""

    def __call__(self, input_ids, scores):
        return scores + (input_ids.sum(-1, keepdim=True) % 7) * torch.linspace(
            0, 1, scores.shape[-1], device=scores.device
        )


class AfterThree(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        done = input_ids.shape[1] >= 8
        return torch.full((len(input_ids),), done, dtype=torch.bool, device=input_ids.device)


class Stream(BaseStreamer):
    def __init__(self):
        self.got, self.ended = [], False

    def put(self, value):
        assert value.device.type == "cpu"
        self.got.append(value.tolist())

    def end(self):
        self.ended = True


@pytest.fixture(params=DEVICES)
def model(request, monkeypatch):
    if request.param == "cpu":  # seconds less; the loop does not care for what runs the graph
        request.getfixturevalue("cheap")
    return zoo.factorized("llama", layers=1).to(request.param)


@pytest.fixture
def calls(monkeypatch):
    """How often the decode loop ran."""
    counted = []
    plain = generate.decode_loop

    def loop(*args, **kwargs):
        counted.append(1)
        return plain(*args, **kwargs)

    monkeypatch.setattr(generate, "decode_loop", loop)
    return counted


def prompts(model, batch=2):
    torch.manual_seed(5)
    return torch.randint(1, 97, (batch, 5)).to(model.device)


def settings(model, **more):
    return {
        "max_new_tokens": NEW,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    } | more


def compiled(model):
    torch._dynamo.reset()
    return torch.compile(model, backend="flashsvd")


def both(model, ids, **kwargs):
    """(transformers' result, ours, whether the random generator ended in the same state)."""
    out = []
    for loop in ({}, {"custom_generate": decode_loop}):
        torch.manual_seed(11)
        result = model.generate(ids, attention_mask=torch.ones_like(ids), **kwargs, **loop)
        out.append((result, torch.rand(3, device=model.device)))
    (theirs, their_state), (ours, our_state) = out
    assert torch.equal(their_state, our_state)
    return theirs, ours


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize(
    "more",
    [
        pytest.param({}, id="greedy"),
        pytest.param({"do_sample": True}, id="sample"),
        pytest.param(
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9}, id="warpers"
        ),
        pytest.param({"do_sample": True, "num_return_sequences": 3}, id="several"),
        pytest.param({"repetition_penalty": 1.7, "no_repeat_ngram_size": 2}, id="penalties"),
        pytest.param({"logits_processor": LogitsProcessorList([Shifted()])}, id="own processor"),
        pytest.param({"stopping_criteria": StoppingCriteriaList([AfterThree()])}, id="criterion"),
        pytest.param({"use_cache": False}, id="no cache"),
    ],
)
def test_tokens_and_random_numbers(model, cache, more):
    if more.get("use_cache") is False and cache:
        pytest.skip("a cache that is not used")
    theirs, ours = both(model, prompts(model), **settings(model, cache_implementation=cache) | more)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("at", [0, 2, NEW - 1])
def test_sequences_end_one_after_the_other(model, at, sample):
    """Each with its own end; the finished ones are padded, and nothing comes after the last end."""
    ids = prompts(model, 3)
    free, _ = both(model, ids, **settings(model, do_sample=sample))
    ends = [free[0, 5 + at].item(), free[1, 6].item()]
    theirs, ours = both(model, ids, **settings(model, do_sample=sample, eos_token_id=ends))
    assert torch.equal(ours, theirs)
    theirs, ours = both(model, ids[:1], **settings(model, do_sample=sample, eos_token_id=ends[:1]))
    assert torch.equal(ours, theirs)


def test_left_padding(model):
    ids = prompts(model, 3)
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[1, :1] = 0
    kwargs = settings(model, attention_mask=mask)
    expected = model.generate(ids, **kwargs)
    assert torch.equal(model.generate(ids, **kwargs, custom_generate=decode_loop), expected)


def seen_masks(model, ids, **kwargs):
    """(the tokens, the attention mask of every forward call by layer type, how many were built)."""
    masks = []

    def hook(module, args, kwargs):
        given = kwargs.get("attention_mask")
        given = given if isinstance(given, dict) else {"": given}
        masks.append({name: mask.clone() for name, mask in given.items() if mask is not None})

    with pytest.MonkeyPatch.context() as patch:
        built = []
        plain = transformers.generation.utils.create_masks_for_generate
        patch.setattr(
            transformers.generation.utils,
            "create_masks_for_generate",
            lambda *args, **more: built.append(1) or plain(*args, **more),
        )
        handle = model.register_forward_pre_hook(hook, with_kwargs=True)
        tokens = model.generate(ids, **kwargs)
        handle.remove()
    return tokens, masks, len(built)


@pytest.mark.parametrize(
    ("name", "attention", "once"),
    [
        ("llama", "sdpa", True),
        ("llama", "eager", True),  # an additive mask
        ("qwen3", "sdpa", True),
        ("gemma2", "eager", False),  # a window moves
    ],
)
def test_one_mask_for_all_steps(name, attention, once):
    """Equal to what transformers builds for each step: the prompt's and the first step's are its own."""
    model = zoo.factorized(name)
    model.set_attn_implementation(attention)
    ids = prompts(model, 3)
    padding = torch.ones_like(ids)
    padding[0, :3] = padding[1, :1] = 0
    kwargs = settings(model, cache_implementation="static", attention_mask=padding)
    _, first, _ = seen_masks(model, ids, **kwargs, custom_generate=decode_loop)  # makes the cache
    length = next(iter(first[0].values())).shape[-1]
    tokens, masks, built = seen_masks(model, ids, **kwargs, custom_generate=decode_loop)
    expected, theirs, _ = seen_masks(model, ids, **kwargs)
    assert torch.equal(tokens, expected)
    assert built == (2 if once else NEW)
    assert len(masks) == len(theirs) == NEW
    for mine, wanted in zip(masks, theirs, strict=True):
        assert mine.keys() == wanted.keys()
        for key, mask in mine.items():
            shown = wanted[key].shape[-1]
            assert torch.equal(mask[..., :shown], wanted[key]), key
            hidden = mask[..., shown:]
            assert (
                length >= shown
                and not (hidden if hidden.dtype == torch.bool else hidden == 0).any()
            )


@pytest.mark.parametrize(
    "name", ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation")
)
def test_a_model_with_inputs_of_its_own_is_asked_every_step(monkeypatch, name):
    model = zoo.factorized("llama")
    plain = getattr(type(model), name)
    own = lambda self, *args, **kwargs: plain(self, *args, **kwargs)  # noqa: E731
    monkeypatch.setattr(type(model), name, own)
    kwargs = settings(model, cache_implementation="static", custom_generate=decode_loop)
    assert seen_masks(model, prompts(model), **kwargs)[2] == NEW


def _farther_is_less(*args, **kwargs):
    mask = eager_mask(*args, **kwargs)
    return mask + torch.arange(mask.shape[-1]) / 10


def test_masks_that_somebody_registered_are_built_every_step(monkeypatch):
    """Their columns differ by more than whether they are shown."""
    model = zoo.factorized("llama")
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._local_mapping, "farther", _farther_is_less)
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "farther", attend)
    model.set_attn_implementation("farther")
    kwargs = settings(model, cache_implementation="static")
    assert seen_masks(model, prompts(model), **kwargs, custom_generate=decode_loop)[2] == NEW


def test_a_mask_that_goes_beyond_the_prompt_is_transformers(model):
    """As it hides what comes behind the prompt, which tokens are written to."""
    ids = prompts(model)
    shown = torch.cat([torch.ones_like(ids), torch.zeros_like(ids)], 1)
    kwargs = settings(model, cache_implementation="static", attention_mask=shown)
    expected = model.generate(ids, **kwargs)
    assert torch.equal(model.generate(ids, **kwargs, custom_generate=decode_loop), expected)


class Wanting(LogitsProcessor):
    def __call__(self, input_ids, scores, more):
        return scores


class Halved(LogitsProcessorList):
    def __call__(self, input_ids, scores, **kwargs):
        return super().__call__(input_ids, scores, **kwargs) / 2


def test_processors():
    tokens, scores = torch.tensor([[1, 2]]), torch.randn(1, 9)
    two = LogitsProcessorList([Shifted(), Shifted()])
    processed = _processed(two)
    assert processed is not two
    assert torch.equal(processed(tokens, scores), two(tokens, scores))
    assert torch.equal(_processed(LogitsProcessorList())(tokens, scores), scores)
    with pytest.MonkeyPatch.context() as patch:  # transformers looks each up again
        patch.setattr(transformers.generation.logits_process, "inspect", None)
        processed(tokens, scores)
        with pytest.raises(AttributeError):
            two(tokens, scores)
    own = Halved([Shifted()])
    assert _processed(own) is own
    with pytest.raises(ValueError, match="Wanting"):
        _processed(LogitsProcessorList([Shifted(), Wanting()]))(tokens, scores)


@pytest.fixture
def late(monkeypatch):
    """A CPU that is waited for as a GPU is."""
    monkeypatch.setattr(generate._Results, "are_late", True)


def test_no_call_too_many_on_a_cpu():
    model = zoo.factorized("llama", layers=1)
    count = []
    model.register_forward_pre_hook(lambda *_: count.append(1))
    ids = prompts(model, 1)
    end = model.generate(ids, **settings(model))[0, 5 + 3].item()
    count.clear()
    out = model.generate(ids, **settings(model, eos_token_id=end), custom_generate=decode_loop)
    assert out.shape[1] - 5 < NEW and len(count) == out.shape[1] - 5


def of_16_positions():
    config = transformers.GPT2Config(
        vocab_size=97, n_embd=48, n_layer=1, n_head=6, n_positions=16, bos_token_id=0, eos_token_id=0
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config).eval()


class EndsAt(LogitsProcessor):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, 2] = 1e9 if input_ids.shape[1] == self.length else -1e9
        return scores


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("length", [15, 16])
def test_no_call_behind_the_last_position(late, length, device):
    """The last token that a table has a position for may be followed by one more, which no forward call gets."""
    model = of_16_positions().to(device)
    ids = prompts(model)
    options = settings(model, max_new_tokens=40, eos_token_id=2)
    count = []
    model.register_forward_pre_hook(lambda *_: count.append(1))
    theirs, ours = both(
        model, ids, **options, logits_processor=LogitsProcessorList([EndsAt(length)])
    )
    assert torch.equal(ours, theirs) and ours.shape[1] == length + 1
    assert len(count) == 2 * (length - 4) + (length < 16)


def test_no_call_behind_the_last_position_of_a_prompt_of_embeddings(late):
    model = of_16_positions()
    options = settings(
        model, max_new_tokens=40, inputs_embeds=torch.randn(2, 8, 48), eos_token_id=2
    )
    theirs, ours = (
        model.generate(**options, **loop, logits_processor=LogitsProcessorList([EndsAt(8)]))
        for loop in ({}, {"custom_generate": decode_loop})
    )
    assert torch.equal(ours, theirs) and ours.shape[1] == 9


def test_a_model_with_a_loop_of_its_own(model, calls):
    class Own(type(model)):
        def _sample(self, input_ids, **kwargs):
            out = super()._sample(input_ids, **kwargs)
            return torch.cat((out, torch.full_like(out[:, :2], 42)), dim=1)

    model.__class__ = Own
    ids = prompts(model)
    expected = model.generate(ids, **settings(model))
    assert expected.shape[1] == 5 + NEW + 2
    assert torch.equal(compiled(model).generate(ids, **settings(model)), expected)
    assert not calls
    ours = model.generate(ids, **settings(model), custom_generate=decode_loop)
    assert torch.equal(ours, expected)


def test_one_call_too_many_only_where_a_sequence_ends_early(model, late):
    count = []
    model.register_forward_pre_hook(lambda *_: count.append(1))
    ids = prompts(model, 1)
    run = lambda **more: model.generate(  # noqa: E731
        ids, **settings(model, **more), custom_generate=decode_loop
    )
    free = run()
    assert len(count) == NEW
    count.clear()
    end = free[0, 5 + 3].item()
    new = run(eos_token_id=end).shape[1] - 5
    assert new < NEW and len(count) == new + 1


def test_a_streamer_gets_every_token_once_and_in_order(model):
    ids = prompts(model, 1)
    end = model.generate(ids, **settings(model))[0, 5 + 4].item()
    for more in ({}, {"eos_token_id": end}):
        theirs, ours = Stream(), Stream()
        model.generate(ids, **settings(model, **more), streamer=theirs)
        # As a callable of their own is not handed the streamer, transformers leaves that to its giver.
        compiled(model).generate(ids, **settings(model, **more), streamer=ours)
        assert ours.got == theirs.got and ours.ended and theirs.ended


@pytest.mark.parametrize("more", [{}, {"do_sample": True, "top_k": 5}], ids=["greedy", "sample"])
def test_the_compiled_model_takes_the_loop(model, calls, more):
    ids = prompts(model)
    torch.manual_seed(3)
    expected = model.generate(ids, **settings(model, **more))
    assert not calls
    torch.manual_seed(3)
    fast = compiled(model)
    assert torch.equal(fast.generate(ids, **settings(model, **more)), expected)
    assert len(calls) == 1
    torch.manual_seed(3)
    config = GenerationConfig(**settings(model, **more))
    expected = model.generate(ids, config)
    torch.manual_seed(3)
    assert torch.equal(fast.generate(ids, config), expected)  # by position
    assert len(calls) == 2


def test_what_other_loops_do_stays_theirs(model, calls):
    ids = prompts(model)
    fast = compiled(model)
    for more in ({"num_beams": 3}, {"num_beams": 2, "do_sample": True}):
        torch.manual_seed(3)
        expected = model.generate(ids, **settings(model, **more))
        torch.manual_seed(3)
        assert torch.equal(fast.generate(ids, **settings(model, **more)), expected)
    # Beams that only the model's own settings ask for.
    model.generation_config.num_beams = 2
    expected = model.generate(ids, **settings(model))
    assert torch.equal(fast.generate(ids, **settings(model)), expected)
    model.generation_config.num_beams = 1
    own = lambda *args, **kwargs: "mine"  # noqa: E731
    assert fast.generate(ids, **settings(model), custom_generate=own) == "mine"
    assert not calls


def test_what_shows_the_cache_is_left_to_transformers(model, monkeypatch):
    ids = prompts(model)
    taken = []
    plain = transformers.GenerationMixin._sample
    sample = lambda *args, **kwargs: taken.append(1) or plain(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(transformers.GenerationMixin, "_sample", sample)
    more = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    theirs, ours = both(model, ids, **settings(model, **more))
    assert torch.equal(ours.sequences, theirs.sequences)
    assert all(torch.equal(a, b) for a, b in zip(ours.scores, theirs.scores, strict=True))
    assert ours.past_key_values.get_seq_length() == theirs.past_key_values.get_seq_length()
    caches = [StaticCache(config=model.config, max_cache_len=40) for _ in range(2)]
    expected = model.generate(ids, **settings(model), past_key_values=caches[0])
    actual = model.generate(
        ids, **settings(model), past_key_values=caches[1], custom_generate=decode_loop
    )
    assert torch.equal(actual, expected)
    lengths = [int(c.get_seq_length()) for c in caches]
    assert lengths[0] == lengths[1]
    assert len(taken) == 4


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("__version__", "5.17 or later, and 5.12.1 is installed"),
        ("get_compiled_call", "LlamaForCausalLM of .* has no get_compiled_call"),
    ],
)
def test_with_another_transformers_its_own_loop_runs(model, calls, monkeypatch, name, words):
    ids = prompts(model)
    expected = model.generate(ids, **settings(model))
    if name == "__version__":
        # The module that an import finds now; the one found first was replaced by its lazy twin.
        monkeypatch.setattr(sys.modules["transformers"], name, "5.12.1")
    else:
        monkeypatch.delattr(transformers.PreTrainedModel, name)
    seen = []
    plain = transformers.GenerationMixin._sample

    def sample(self, *args, **kwargs):
        seen.append(self._valid_auto_compile_criteria({}, self.generation_config))
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(transformers.GenerationMixin, "_sample", sample)
    fast = compiled(model)  # forgets what was warned of
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "TensorFloat32")  # Inductor's, where a GPU has it
        fast.generate(ids, **settings(model, num_beams=2))  # never ours
    with pytest.warns(UserWarning, match=words):
        assert torch.equal(fast.generate(ids, **settings(model)), expected)
    # The compiled model is what runs; transformers would compile it once more.
    assert seen == [False]
    assert "_valid_auto_compile_criteria" not in vars(model)
    assert not calls
    with pytest.raises(VersionError, match=words):
        model.generate(ids, **settings(model), custom_generate=decode_loop)


def test_bad_arguments_are_told_by_transformers(model):
    fast = compiled(model)
    with pytest.raises(ValueError, match="max_new_tokens"):
        fast.generate(prompts(model), max_new_tokens=-1)
    with pytest.raises((TypeError, ValueError)):
        fast.generate(prompts(model), no_such_argument=1)
    assert model._compiled_call_impl is None
