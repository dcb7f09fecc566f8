"""Dense linears with a low-rank branch, compiled: each branch is a chain, packed with its dense weight."""

from __future__ import annotations

import pytest
import torch
import zoo
from harness import assert_close
from torch import nn

from fsvd_compile import BranchedLinear, LowRankLinear
from fsvd_compile.report import collect


def branched(name: str) -> tuple[nn.Module, int]:
    """A dense model of the zoo with a branch beside every linear but the head, ranks different, and how many."""
    torch.manual_seed(7)
    model = zoo.MODELS[name]()
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    count = 0
    for path, module in list(model.named_modules()):
        if not hasattr(module, "weight") or module.weight.dim() != 2 or module is head:
            continue
        if isinstance(module, nn.Embedding):
            continue
        shape = module.weight.shape if isinstance(module, nn.Linear) else module.weight.shape[::-1]
        out_features, in_features = shape
        rank = 3 + count % 3
        u, v = torch.randn(out_features, rank) / 8, torch.randn(rank, in_features) / 8
        parent, _, child = path.rpartition(".")
        made = BranchedLinear(module, LowRankLinear.from_factors(u, v))
        setattr(model.get_submodule(parent), child, made)
        count += 1
    return model.eval().requires_grad_(False), count


@pytest.mark.parametrize("options", [None, {"kernels": "ops"}], ids=["default", "ops"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "bert"])
def test_compiled(name, options):
    model, count = branched(name)
    compiled = torch.compile(model, backend="flashsvd", options=options)
    ids = torch.randint(1, 97, (2, 9))
    with torch.no_grad(), collect() as reports:
        actual, expected = compiled(ids)[0], model(ids)[0]
    assert_close(name, actual, expected, 1e-5)
    (report,) = reports
    print(name, count, report.matches, report.misses)
    assert report.matches["lowrank_chain"] == count


def test_decode_with_a_static_cache():
    model, count = branched("llama")
    compiled = torch.compile(model, backend="flashsvd", options={"kernels": "ops"})
    ids = torch.randint(1, 97, (2, 1))
    told = []
    for run in (compiled, model):
        with torch.no_grad(), collect() as reports:
            cache = zoo.static_cache(model, 2, 32)
            told.append((run(ids, past_key_values=cache, use_cache=True).logits, reports))
    assert_close("decode", told[0][0], told[1][0], 1e-5)
    print(told[0][1][0].matches)
    assert told[0][1][0].matches["lowrank_chain"] == count
