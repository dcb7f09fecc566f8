"""Weights are read, never owned: whatever changes them after compiling is seen by the next call."""

from __future__ import annotations

import copy

import pytest
import torch
import zoo
from harness import assert_close
from torch import nn

from fsvd_compile import LowRankLinear
from fsvd_compile.report import collect

pytestmark = pytest.mark.usefixtures("cheap")


@pytest.fixture(params=[False, True], ids=["whole", "layers"])
def model(request):
    return zoo.factorized("llama", layers=1) if request.param else zoo.factorized("mlp")


def inputs(model):
    return torch.randint(1, 97, (2, 6)) if hasattr(model, "config") else torch.randn(4, 48)


def call(model, x):
    out = model(x, use_cache=False) if x.dtype == torch.long else model(x)
    return getattr(out, "logits", out)


def weights(model):
    return [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n][:6]


def in_place(model):
    for p in weights(model):
        p.mul_(1.5)


def data_swap(model):
    for p in weights(model):
        p.data = torch.randn_like(p) * 0.1


def replacement(model):
    for name, child in list(model.named_modules()):
        if isinstance(child, nn.Linear) and "lm_head" not in name:
            child.weight = nn.Parameter(torch.randn_like(child.weight) * 0.1, requires_grad=False)


def state_dict(model):
    model.load_state_dict({k: v + 0.05 for k, v in model.state_dict().items()}, assign=False)


def state_dict_assigned(model):
    model.load_state_dict({k: v + 0.05 for k, v in model.state_dict().items()}, assign=True)
    model.requires_grad_(False)


def adapter_merge(model):
    for p in weights(model):
        a, b = torch.randn(p.shape[0], 2) * 0.1, torch.randn(2, p.shape[1]) * 0.1
        p.data += a @ b


@pytest.mark.parametrize(
    "change",
    [in_place, data_swap, replacement, state_dict, state_dict_assigned, adapter_merge],
    ids=lambda f: f.__name__,
)
def test_the_next_call_sees_the_change(model, change):
    x = inputs(model)
    compiled = torch.compile(model, backend="flashsvd")
    with torch.no_grad():
        before = call(compiled, x).clone()
        change(model)
        expected = call(model, x)
        actual = call(compiled, x)
    assert not torch.allclose(before, expected, atol=1e-3), "the change changes nothing"
    assert_close(change.__name__, actual, expected, 1e-5)


def test_compiling_allocates_no_copies_of_weights_and_leaves_the_parameters_alone():
    model = zoo.factorized("llama", layers=1)
    before = {n: (p.data_ptr(), p.stride(), p._version) for n, p in model.named_parameters()}
    saved = copy.deepcopy(model.state_dict())
    x = inputs(model)
    with torch.no_grad(), collect() as reports:
        call(torch.compile(model, backend="flashsvd"), x)
    assert reports[0].matches["siblings"] == 2
    assert before == {
        n: (p.data_ptr(), p.stride(), p._version) for n, p in model.named_parameters()
    }
    for name, value in model.state_dict().items():
        assert torch.equal(value, saved[name])


def test_save_pretrained_after_compiling(tmp_path):
    import transformers

    model = zoo.factorized("llama", "foreign")
    compiled = torch.compile(model, backend="flashsvd")
    with torch.no_grad():
        call(compiled, inputs(model))
    compiled.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "model.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(stored[name], value), name
    assert transformers.AutoConfig.from_pretrained(tmp_path).model_type == "llama"


def test_one_shared_v_among_siblings_is_read_once_and_stays_shared():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = LowRankLinear(40, 30, 6), LowRankLinear(40, 20, 6)
            self.b.v = self.a.v

        def forward(self, x):
            return self.a(x).sum(-1), self.b(x).sum(-1)

    model = Shared().eval().requires_grad_(False)
    x = torch.randn(3, 40)
    compiled = torch.compile(model, backend="flashsvd")
    with torch.no_grad(), collect() as reports:
        for _ in range(2):
            for name, a, e in zip("ab", compiled(x), model(x), strict=True):
                assert_close(name, a, e, 1e-5)
            model.a.v.weight.mul_(-2)
    assert reports[0].matches["siblings"] == 1
    read = 40 * 6 + 6 * 30 + 6 * 20 + 30 + 20
    assert reports[0].weight_bytes == 4 * read
