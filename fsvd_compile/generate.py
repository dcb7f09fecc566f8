"""`generate`: the compiled model is reached, and the host stays ahead of the device.

`torch.compile` returns an `OptimizedModule` that looks every unknown attribute up on the original model, so that
`generate` there is bound to the original and calls it uncompiled. For modules compiled by this backend, and for no
other, the attribute is wrapped: while it runs, the original's `__call__` is the compiled one, exactly as after
`model.compile(backend="flashsvd")`, and greedy search and sampling go through `decode_loop`.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import inspect
import logging
import re
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.eval_frame import OptimizedModule

from fsvd_compile import cuda_graph, kept_cache
from fsvd_compile.errors import VersionError
from fsvd_compile.report import warn_once

log = logging.getLogger(__name__)

_MARK = "_fsvd_reaches_compiled"
_MODES = ("greedy_search", "sample")
# Graphs of one model: two for each batch size and length of the KV cache. Dynamo's limit of 8 is reached by four,
# and everything after it runs uncompiled; transformers raises it to 64 for chunked prompts, too.
MOST_GRAPHS = 64
_DYNAMOS_LIMIT = 8  # its default: any other one somebody has chosen
# The first transformers whose `generate` says which KV cache is the caller's, and what else `decode_loop` calls there
# without a promise that it stays.
SINCE = (5, 17)
_CALLED = (
    "_prefill",
    "_optimize_model_for_decode",
    "_update_model_kwargs_for_generation",
    "_valid_auto_compile_criteria",
    "_get_static_cache_init_shape",
    "get_compiled_call",
)

# How many calls of `generate` a model is in, from all threads: the last one restores it.
_running: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def reach_compiled(is_ours: Callable[[Any], bool]) -> None:
    """Teach `OptimizedModule` the lookup above, once per process.

    Args:
        is_ours: Whether a Dynamo callback belongs to this backend.
    """
    if getattr(OptimizedModule.__getattr__, _MARK, False):
        return
    plain_getattr = OptimizedModule.__getattr__

    @functools.wraps(plain_getattr)
    def getattr_(self: OptimizedModule, name: str) -> Any:
        value = plain_getattr(self, name)
        if name == "generate" and callable(value) and is_ours(self.dynamo_ctx.callback):
            return _through_compiled(self, value)
        return value

    setattr(getattr_, _MARK, True)
    OptimizedModule.__getattr__ = getattr_


def _through_compiled(compiled: OptimizedModule, generate: Callable) -> Callable:
    model = _answers(compiled._orig_mod)

    @functools.wraps(generate)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with _lock:
            running = _running.get(model, 0)
            if running or model._compiled_call_impl is None:
                model._compiled_call_impl = compiled.dynamo_ctx(model._call_impl)
                # transformers would compile the steps of a static cache once more, with Inductor.
                model._valid_auto_compile_criteria = _never
                _running[model] = running + 1
        if torch._dynamo.config.recompile_limit == _DYNAMOS_LIMIT:
            # For good: calls of the model itself count the graphs that `generate` made, and at the limit Dynamo
            # compiles nothing more, here neither.
            torch._dynamo.config.recompile_limit = MOST_GRAPHS
        limit = max(MOST_GRAPHS, torch._dynamo.config.recompile_limit)
        try:
            with torch._dynamo.config.patch(recompile_limit=limit):
                return generate(*args, **kwargs, **_loop_for(model, generate, args, kwargs))
        finally:
            with _lock:
                if model in _running:
                    _running[model] -= 1
                    if not _running[model]:
                        del _running[model]
                        model._compiled_call_impl = None
                        del model._valid_auto_compile_criteria

    return wrapped


def _answers(model: Any) -> Any:
    """The module whose calls a model's `generate` makes: PEFT hands it on to the model that it adapts, as often as one
    was put around it."""
    while callable(get := getattr(model, "get_base_model", None)) and (inner := get()) is not model:
        model = inner
    return model


def _never(*args: Any, **kwargs: Any) -> bool:
    return False


def _why_no_loop(model: Any) -> str | None:
    """Why `decode_loop` does not go with the transformers that is installed, or None."""
    from transformers import __version__ as version

    first = ".".join(map(str, SINCE))
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < SINCE:
        return f"ours needs transformers {first} or later, and {version} is installed"
    missing = [name for name in _CALLED if not hasattr(model, name)]
    if missing:
        named = f"{type(model).__name__} of transformers {version} has no {', '.join(missing)}"
        return f"{named}, which ours calls; transformers {first} has"
    return None


def _loop_for(model: Any, generate: Callable, args: tuple, kwargs: dict) -> dict[str, Callable]:
    """`custom_generate=decode_loop` where `generate` is transformers' and would run its sampling loop."""
    parameters = inspect.signature(generate).parameters
    if "custom_generate" not in parameters or _has_own_loop(model):
        return {}
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    try:
        given = inspect.signature(generate).bind(*args, **kwargs).arguments
        options = given.get("kwargs", {})
        config, _ = model._prepare_generation_config(given.get("generation_config"), **options)
    except (TypeError, ValueError):  # generate says it better
        return {}
    if distributed or "custom_generate" in given or given.get("assistant_model") is not None:
        return {}
    if config.get_generation_mode() not in _MODES or config.cache_implementation == "paged":
        return {}
    if (
        config.stop_strings is not None
    ):  # needs the tokenizer, which transformers keeps from a callable
        return {}
    if (reason := _why_no_loop(model)) is not None:
        own = "generate runs transformers' own loop, which waits for the device in every step"
        warn_once(f"{own}: {reason}.")
        return {}
    # transformers hands a streamer to its own loops only.
    return {"custom_generate": functools.partial(decode_loop, streamer=given.get("streamer"))}


def _has_own_loop(model: Any) -> bool:
    """Whether the sampling loop of a model is another than transformers', which ours does what it does for."""
    from transformers import GenerationMixin

    return not hasattr(model, "_sample") or not _is_of(GenerationMixin, model, "_sample")


def decode_loop(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """transformers' greedy and sampling loop without its wait in every step; for `generate(custom_generate=...)`.

    transformers asks the device after every token whether all sequences are finished, and only then prepares
    the next step: 1.8 ms of Python in which a GPU idles. Here the next step is launched first and the answer
    read while it runs. Tokens, processors, criteria and random numbers are those of transformers' loop, in its
    order; what differs, on a GPU, is one forward call too many when a sequence ends before its greatest length, whose
    result is dropped, and that a streamer gets each token a step later. No such call goes beyond the positions that
    the model has (`max_position_embeddings`). The KV cache is one of `kept_cache` where
    transformers made a static one and, for a compiled model on a GPU, also where nobody asked for a kind of cache.
    Calls that get the KV cache back (a cache of their own, or `return_dict_in_generate`) and encoder-decoder models
    run transformers' loop, as the call too many would show there, and a model with a loop of its own runs that; it is
    logged.

    Args:
        model: A transformers model; what `generate` runs is its `__call__`.
        input_ids: The prompts, int64 `[batch, length]`.
        logits_processor: Called with the tokens so far and fp32 scores `[batch, vocabulary]`.
        stopping_criteria: Called with the tokens so far after every step.
        generation_config: As `generate` prepared it.
        streamer: Gets the tokens of a step, int64 `[batch]` on the CPU. transformers hands a streamer to its
            own loops only: give it as `custom_generate=functools.partial(decode_loop, streamer=...)`.
        **model_kwargs: What `generate` prepared for the model: cache, mask, positions.

    Returns:
        int64 `[batch, length + new]`, or what transformers' loop returns.

    Raises:
        VersionError: the transformers that is installed lacks what the loop calls.
    """
    if (reason := _why_no_loop(model)) is not None:
        raise VersionError(f"decode_loop: {reason}. Leave custom_generate out.")
    config = generation_config
    own = _has_own_loop(model)
    if own or _shows_cache(model, config, model_kwargs):
        why = "the model has a loop of its own" if own else "generate returns more than tokens"
        log.info("%s: %s runs", why, "it" if own else "transformers' own loop")
        return model._sample(
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=config,
            streamer=streamer,
            **model_kwargs,
        )
    limit = stopping_criteria.max_length
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and (embeds := model_kwargs.get("inputs_embeds")) is not None:
        positions -= max(0, embeds.shape[1] - input_ids.shape[1])  # which the tokens do not count
    compiled = model._compiled_call_impl is not None
    cache = kept_cache.name_in(model_kwargs)
    if (given := model_kwargs.get(cache)) is not None:
        # A prompt of embeddings has a length that the limit does not count; chunks go through another call.
        plain = model_kwargs.get("inputs_embeds") is None and config.prefill_chunk_size is None
        model_kwargs[cache] = kept_cache.take(
            model,
            given,
            input_ids,
            None if limit is None else max(limit, input_ids.shape[1] + 1),
            dynamic=compiled and plain and config.cache_implementation is None,
        )
    automatic = not compiled and model._valid_auto_compile_criteria(model_kwargs, config)
    forward = model.get_compiled_call(config.compile_config) if automatic else model.__call__
    ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    pad = config._pad_token_tensor.to(input_ids.device) if ends else None
    unfinished = torch.ones(len(input_ids), dtype=torch.long, device=input_ids.device)
    results = _Results(input_ids.device, streamer)
    processed = _processed(logits_processor)
    # The prompt runs once a call, on a cache that the next call gets as well.
    kept = kept_cache.is_ours(model_kwargs.get(cache))
    with cuda_graph.returning_addresses() if kept else contextlib.nullcontext():
        outputs = model._prefill(
            input_ids, config, model_kwargs, is_first_iteration=not config.is_assistant
        )
    step = _Step(model, model_kwargs)
    with model._optimize_model_for_decode():
        while not results.finished_before():
            model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
            logits = outputs.logits[:, -1].to(torch.float32, copy=True)
            del outputs  # of a prompt they may be large
            scores = processed(input_ids, logits.to(input_ids.device))
            if config.do_sample:
                tokens = torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
            else:
                tokens = scores.argmax(-1)
            if ends:
                tokens = torch.where(unfinished.bool(), tokens, pad)
            input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
            unfinished = unfinished & ~stopping_criteria(input_ids, None)
            results.send(unfinished, tokens)
            if limit is not None and input_ids.shape[1] >= limit:
                break
            # Behind the last position a table has no row to look up.
            beyond = positions is not None and input_ids.shape[1] > positions
            if (beyond or not results.are_late) and results.finished_before():
                break
            outputs = forward(**step.inputs(input_ids, model_kwargs), return_dict=True)
    results.finished_before()  # the streamer gets what is still coming
    kept_cache.keep(model, model_kwargs.get(cache))
    if streamer is not None:
        streamer.end()
    return input_ids


def _shows_cache(model: Any, config: Any, model_kwargs: dict[str, Any]) -> bool:
    """Whether somebody sees the KV cache, or a state like it, after `generate`."""
    if config.return_dict_in_generate or model.config.is_encoder_decoder:
        return True
    return any(getattr(value, "_is_user_defined", False) for value in model_kwargs.values())


def _processed(processors: Any) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """What a list of logits processors does with tokens and scores.

    transformers' list looks up the signature of each processor in every step, 70 us each.
    """
    from transformers import LogitsProcessorList

    plain = type(processors).__call__ is LogitsProcessorList.__call__
    # One that wants more arguments is refused by the list, in its words.
    if not plain or any(len(inspect.signature(p.__call__).parameters) > 2 for p in processors):
        return processors
    return lambda tokens, scores: functools.reduce(lambda s, p: p(tokens, s), processors, scores)


def _is_of(owner: type, model: Any, name: str) -> bool:
    """Whether a model's method is the one of `owner`, not overridden by a class or on the model itself."""
    return getattr(getattr(model, name), "__func__", None) is getattr(owner, name)


class _Step:
    """The inputs of decode steps, with one attention mask for all of them where that is possible.

    For a static cache transformers builds the mask of every step from nothing: 15 kernels and a fifth of the loop's
    Python. Over full attention a step's mask is the one before with the new token's column shown, as padding lies in
    the prompt. So the first step's is transformers', and a column of it is written in each later one. That needs a
    cache of `kept_cache`, which starts empty and has no windows, transformers' own functions for masks, inputs and
    state, and a prompt that is as long as its mask. Who changes a mask in a hook finds it changed in the next step.
    """

    def __init__(self, model: Any, model_kwargs: dict[str, Any]) -> None:
        from transformers import GenerationMixin

        self.model = model
        own = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation")
        # A prompt of embeddings has a length that the tokens do not tell.
        self._possible = (
            all(_is_of(GenerationMixin, model, name) for name in own)
            and not hasattr(model, "create_masks_for_generate")
            and kept_cache.plain_masks(model)
            and kept_cache.is_ours(model_kwargs.get(kept_cache.name_in(model_kwargs)))
            and model_kwargs.get("inputs_embeds") is None
        )
        self._given: Any = None  # as the model takes it: the mask, or the one of a dict
        self._mask: torch.Tensor | None = None

    def inputs(self, input_ids: torch.Tensor, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the next forward call; may take the mask of tokens out of `model_kwargs`.

        Args:
            input_ids: The tokens so far, int64 `[batch, length]`.
            model_kwargs: transformers' state of the loop.
        """
        if self._mask is not None:
            # A replay or kernel that reads the mask of the step before was launched before this write.
            self._mask[..., input_ids.shape[1] - 1] = self._mask.dtype == torch.bool
            inputs = self._prepared(input_ids, attention_mask=self._mask, **model_kwargs)
            return inputs | {"attention_mask": self._given}
        inputs = self._prepared(input_ids, **model_kwargs)
        shown = model_kwargs.get("attention_mask")
        if self._possible and (shown is None or shown.shape == input_ids.shape):
            self._given = inputs.get("attention_mask")
            alone = isinstance(self._given, dict) and self._given.keys() == {"full_attention"}
            mask = self._given["full_attention"] if alone else self._given
            wanted = (len(input_ids), 1, 1)
            if isinstance(mask, torch.Tensor) and mask.dim() == 4 and mask.shape[:3] == wanted:
                self._mask = mask
                model_kwargs.pop("attention_mask", None)
        return inputs

    def _prepared(self, input_ids: torch.Tensor, **model_kwargs: Any) -> dict[str, Any]:
        return self.model.prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=1 if model_kwargs["use_cache"] else None,
            **model_kwargs,
        )


class _Results:
    """What steps found, on its way to the host: whether all sequences are finished, and the tokens for a streamer."""

    def __init__(self, device: torch.device, streamer: Any) -> None:
        self.device = device
        self.streamer = streamer
        self.coming: collections.deque = collections.deque()

    @property
    def are_late(self) -> bool:
        """Whether the host would wait for them: a GPU is still at work when the next step can be launched."""
        return self.device.type == "cuda"

    def send(self, unfinished: torch.Tensor, tokens: torch.Tensor) -> None:
        flag = self._copied(unfinished.max() == 0)
        tokens = None if self.streamer is None else self._copied(tokens)
        arrived = None
        if self.device.type == "cuda":
            arrived = torch.cuda.Event(blocking=True)
            arrived.record(torch.cuda.current_stream(self.device))
        self.coming.append((flag, tokens, arrived))

    def _copied(self, value: torch.Tensor) -> torch.Tensor:
        if self.device.type != "cuda":
            return value.to("cpu", copy=True)
        target = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        return target.copy_(value, non_blocking=True)

    def finished_before(self) -> bool:
        """Whether all sequences were finished after the step that was sent last; False before the first."""
        finished = False
        while self.coming:
            flag, tokens, arrived = self.coming.popleft()
            if arrived is not None:
                arrived.synchronize()
            if tokens is not None:
                self.streamer.put(tokens)
            finished = bool(flag)
        return finished
