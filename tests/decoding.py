"""Prompt and decode steps of a compiled model against the same model run eagerly, on any device."""

from __future__ import annotations

import torch
import transformers
import zoo
from harness import assert_close

from fsvd_compile.report import GraphReport, collect

DECODERS = [name for name in zoo.MODELS if name not in ("bert", "mlp")]


def run(model, prompt, steps, cache, mask=None, forced=None):
    """Logits of the prompt and of the steps after it, and the greedy tokens.

    Args:
        forced: Tokens to feed, `[B, steps + 1]`, instead of the greedy ones.
    """
    logits, tokens = [], []
    ids = prompt
    with torch.no_grad():
        for i in range(steps + 1):
            extra = {} if mask is None else {"attention_mask": mask}
            out = model(ids, past_key_values=cache, use_cache=True, **extra)
            logits.append(out.logits[:, -1])
            tokens.append(out.logits[:, -1:].argmax(-1))
            ids = tokens[-1] if forced is None else forced[:, i : i + 1]
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return torch.stack(logits, 1), torch.cat(tokens, 1)


def static(model, batch):
    return zoo.static_cache(model, batch, 32, model.device, model.dtype)


def dynamic(model, batch):
    return transformers.DynamicCache(config=model.config)


def check_decoder(
    name, spelling, cache_of, steps=16, batch=2, options=None, device="cpu"
) -> list[GraphReport]:
    """A model of the zoo in fp32: logits within 1e-5 of eager, the same greedy tokens; returns what was compiled."""
    model = zoo.factorized(name, spelling).to(device)
    prompt = torch.randint(1, 97, (batch, 7)).to(device)
    expected, expected_tokens = run(model, prompt, steps, cache_of(model, batch))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="flashsvd", options=options)
    with collect() as reports:
        actual, tokens = run(compiled, prompt, steps, cache_of(model, batch))
    assert_close(f"{name}/{spelling} logits", actual, expected, 1e-5)
    assert torch.equal(tokens, expected_tokens)
    return reports
