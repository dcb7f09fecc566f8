"""KV caches for `decode_loop` that compiled and captured graphs fit: of fixed length, and used again.

transformers makes a new cache for every `generate`. A new one has new addresses, so that everything is captured
again (200 ms for 32 layers on an H200); one of another length makes Dynamo's second graph symbolic; and a dynamic one,
the default, is symbolic from its second step on. Attention is not captured then: 5.3 ms a token of LLaMA-7B's shape at
keep 0.5 for 2.25 (bench/NOTES.md). The caches here have lengths from a short list, which Dynamo takes for constants,
and a model's last one waits for its next `generate`.
"""

from __future__ import annotations

import functools
import inspect
import logging
import threading
import weakref
from collections.abc import Container
from typing import Any, NamedTuple

import torch

log = logging.getLogger(__name__)

# Positions; each length compiles once, an empty position costs memory and is never read.
SHORTEST = 1024
# Above this one, lengths are its multiples instead of doubling.
COARSEST = 4096
# Of a cache nobody asked for: a prompt attends to empty positions, too, at first for 2.5 times what the linears of
# a 7B model cost.
LONGEST = 32768

_lock = threading.Lock()
_kept: weakref.WeakKeyDictionary[Any, tuple[_Layout, Any]] = weakref.WeakKeyDictionary()


class _Layout(NamedTuple):
    """What two caches must share to stand for each other."""

    batch: int
    length: int
    dtype: torch.dtype
    device: torch.device
    stream: int  # memory is only safe to use again on the stream that used it


def rounded(length: int) -> int:
    """The cache length, in positions, for a text of at most `length` tokens."""
    if length > COARSEST:
        return -(-length // COARSEST) * COARSEST
    return max(SHORTEST, 1 << (length - 1).bit_length())


def argument(model: Any) -> str:
    """What the forward of a transformers model calls its KV cache, see `name_in`."""
    return name_in(inspect.signature(model.forward).parameters)


def name_in(arguments: Container[str]) -> str:
    """What arguments of a forward call the KV cache: "cache" since transformers 5.24, "past_key_values" before."""
    return "cache" if "cache" in arguments else "past_key_values"


def take(
    model: Any, given: Any, input_ids: torch.Tensor, length: int | None, dynamic: bool = False
) -> Any:
    """The cache to generate with: the model's kept one, a new one like it, or `given` where neither fits.

    Args:
        model: A transformers model.
        given: The cache transformers made for this call; nothing was written to it yet.
        input_ids: The prompts, int64 `[batch, tokens]`.
        length: The most tokens of a sequence, or `None` where nobody knows.
        dynamic: Whether a dynamic cache may become a static one: on a GPU, if the model compiles as a whole, up to
            `LONGEST` positions, and if it takes at most half of the free memory.

    Returns:
        `given`, or a static cache of at least `length` positions, zeroed, at home on the current stream. The next
        call writes to the same one: who keeps it from a hook sees it change.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, StaticCache, StaticLayer

    layers = getattr(given, "layers", ())
    kinds = {StaticCache: StaticLayer} | ({DynamicCache: DynamicLayer} if dynamic else {})
    kind = kinds.get(type(given))
    plain = kind and layers and all(type(layer) is kind for layer in layers)
    if not plain or given.offloading or any(layer.is_initialized for layer in layers):
        return given
    device, shape = model.device, model._get_static_cache_init_shape()
    unknown = shape is None or model.training or torch.is_autocast_enabled(device.type)
    if unknown or not input_ids.numel():
        return given
    if kind is StaticLayer:
        length = layers[0].max_cache_len
    elif length is None or not _static_pays(model):
        return given
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    layout = _Layout(len(input_ids), rounded(length), model.dtype, device, stream)
    with _lock:
        kept_layout, cache = _kept.pop(model, (None, None))
    if kept_layout == layout:
        cache.reset()
        return cache
    del cache  # before the next one needs the memory
    if kind is DynamicLayer and not _fits(layout, *shape, layers=len(layers)):
        log.warning(
            "generate keeps the dynamic KV cache, whose attention is not captured: a static one of %d positions is "
            "longer than %d or would take more than half of the free memory. A smaller max_new_tokens makes it fit.",
            layout.length,
            LONGEST,
        )
        return given
    return _made(model, layout, input_ids) or given


def keep(model: Any, cache: Any) -> None:
    """Lets the model's next `take` have the cache, if `take` made it. Nobody may use it any more."""
    if is_ours(cache):
        with _lock:
            _kept[model] = cache._fsvd_layout, cache


def is_ours(cache: Any) -> bool:
    """Whether `take` made a cache: all of its layers attend to everything, and it was empty."""
    return getattr(cache, "_fsvd_layout", None) is not None


def forget() -> None:
    """Frees all caches that wait."""
    with _lock:
        _kept.clear()


def plain_masks(model: Any) -> bool:
    """Whether attention gets its mask from transformers' own functions for SDPA and eager attention, and no ALiBi."""
    config = model.config.get_text_config(decoder=True)
    own = config._attn_implementation in ("sdpa", "eager")
    return own and not getattr(config, "alibi", False)


def _static_pays(model: Any) -> bool:
    """Whether a static cache is captured and works as a dynamic one does."""
    return model.device.type == "cuda" and model._can_compile_fullgraph and plain_masks(model)


def _fits(layout: _Layout, heads: int | list[int], size: int | list[int], layers: int) -> bool:
    if layout.length > LONGEST:
        return False
    each = [x if isinstance(x, list) else [x] * layers for x in (heads, size)]
    elements = sum(h * d for h, d in zip(*each, strict=True)) * layout.batch * layout.length
    free = torch.cuda.mem_get_info(layout.device)[0]
    free += torch.cuda.memory_reserved(layout.device) - torch.cuda.memory_allocated(layout.device)
    return 2 * elements * layout.dtype.itemsize <= free // 2


# Not in inference mode: a tensor made there cannot be written outside of it.
@torch.inference_mode(False)
@torch.no_grad()
def _made(model: Any, layout: _Layout, input_ids: torch.Tensor) -> Any:
    """A cache whose keys and values have the sizes and dtypes that one token of the model has, or None where the
    model cannot write to a static one. Its configuration does not always tell (Falcon's with one KV head)."""
    from transformers.cache_utils import StaticCache

    cache = StaticCache(model.config.get_text_config(decoder=True), max_cache_len=layout.length)
    try:
        model.forward(
            input_ids=input_ids[:, :1].clone(), use_cache=True, **{argument(model): cache}
        )
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        log.warning(
            "generate keeps transformers' own KV cache: one token in a static one: %s", error
        )
        return None
    if not all(layer.is_initialized for layer in cache.layers):
        return None
    cache.reset()
    for layer in cache.layers:
        del layer.max_cache_len
        layer.__class__ = _fixed_layer()
        torch._dynamo.mark_static(layer.keys)
        torch._dynamo.mark_static(layer.values)
    cache._fsvd_layout = layout
    return cache


@functools.cache
def _fixed_layer() -> type:
    from transformers.cache_utils import StaticLayer

    class FixedLayer(StaticLayer):
        """Its length is that of its tensors: Dynamo makes an int attribute symbolic when it sees a second value."""

        @property
        def max_cache_len(self) -> int:
            return self.keys.shape[-2]

    return FixedLayer
