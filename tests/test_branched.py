"""Dense linears with a low-rank branch, compiled: each branch is a chain, packed with its dense weight."""

from __future__ import annotations

import pytest
import torch
import zoo
from harness import assert_close
from torch import nn

from fsvd_compile import BranchedLinear, LowRankLinear
from fsvd_compile.errors import FactorError
from fsvd_compile.report import collect


def branched(name: str) -> tuple[nn.Module, int]:
    """A dense model of the zoo with a branch beside every linear but the head, ranks different, and their count."""
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
        parent, _, child = path.rpartition(".")
        rank = 3 + ord(child[0]) % 3
        u, v = torch.randn(out_features, rank) / 8, torch.randn(rank, in_features) / 8
        made = BranchedLinear(module, LowRankLinear.from_factors(u, v))
        setattr(model.get_submodule(parent), child, made)
        count += 1
    return model.eval().requires_grad_(False), count


# A layer's groups: each input of several linears, or the two halves of one (but for the Conv1D behind GPT-2's
# attention, whose halves read two reshapes of it). The sum of a module that is alone in its group is an epilogue;
# of several it is a sum of slices, which Inductor gets.
@pytest.mark.parametrize(
    "name,kernels,siblings,residual",
    [("llama", "auto", 8, 4), ("llama", "ops", 8, 4), ("gpt2", "auto", 6, 8)],
)
def test_compiled(name, kernels, siblings, residual):
    model, count = branched(name)
    compiled = torch.compile(model, backend="flashsvd", options={"kernels": kernels})
    ids = torch.randint(1, 97, (2, 9))
    with torch.no_grad(), collect() as reports:
        actual, expected = compiled(ids)[0], model(ids)[0]
    assert_close(name, actual, expected, 1e-5)
    (report,) = reports
    found = {key: report.matches[key] for key in ("lowrank_chain", "siblings", "residual")}
    assert found == {"lowrank_chain": count, "siblings": siblings, "residual": residual}


@pytest.mark.parametrize(
    "base,branch,says",
    [
        (nn.Embedding(4, 6), LowRankLinear(4, 6, 2, bias=False), "base is a Embedding"),
        (nn.Linear(4, 6), nn.Linear(4, 6), "branch is a Linear"),
        (nn.Linear(4, 6), LowRankLinear(6, 4, 2, bias=False), "branch"),
        (nn.Linear(4, 6), LowRankLinear(4, 6, 2), "the branch has a bias"),
    ],
)
def test_what_is_refused(base, branch, says):
    with pytest.raises(FactorError, match=says):
        BranchedLinear(base, branch)


def test_decode_with_a_static_cache():
    model, count = branched("llama")
    compiled = torch.compile(model, backend="flashsvd", options={"kernels": "ops"})
    ids = torch.randint(1, 97, (2, 1))
    with torch.no_grad(), collect() as reports:
        actual, expected = (
            run(ids, past_key_values=zoo.static_cache(model, 2, 32), use_cache=True).logits
            for run in (compiled, model)
        )
    assert_close("decode", actual, expected, 1e-5)
    (report,) = reports
    assert (report.phase, report.layers) == ("decode", [1, 2, 1])
    assert report.matches["lowrank_chain"] == count
