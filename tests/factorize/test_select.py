"""Ranks, default selection, patterns, and what is never replaced."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fsvd_compile.errors import FactorizeError
from fsvd_compile.factorize import factorize
from fsvd_compile.factorize.closed_form import rank_for
from fsvd_compile.factorized import BranchedLinear, LowRankLinear


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(16, 40), "down": nn.Linear(40, 16)}) for _ in range(2)
        )
        self.lm_head = nn.Linear(16, 20, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer["down"](torch.relu(layer["up"](x)))
        return self.lm_head(x)


def names(report):
    return [module.name for module in report.modules]


LINEARS = [f"layers.{i}.{name}" for i in range(2) for name in ("up", "down")]


@pytest.mark.parametrize(
    "keep,m,n,rank",
    # LLaMA-7B and GQA shapes with the ranks SVD-LLM's checkpoints have.
    [
        (0.8, 4096, 4096, 1638),
        (0.6, 11008, 4096, 1791),
        (0.5, 4096, 11008, 1492),
        (0.5, 1024, 4096, 409),
        (0.2, 4096, 4096, 409),
        (1.0, 1024, 4096, None),
        (0.5, 2, 768, None),
        (0.999, 1, 768, None),
    ],
)
def test_rank_formula(keep, m, n, rank):
    assert rank_for(keep, m, n) == rank


def test_default_is_every_linear_but_the_head():
    model = Net()
    report = factorize(model, 0.5, progress=False)
    assert names(report) == LINEARS
    assert report.dense == {"lm_head": "output embeddings"}
    assert [m.rank for m in report.modules] == [rank_for(0.5, 40, 16)] * 4
    assert type(model.lm_head) is nn.Linear
    assert model(torch.arange(4)[None]).shape == (1, 4, 20)


def test_select_by_pattern_and_predicate():
    assert names(factorize(Net(), select=["*.up"], progress=False)) == LINEARS[::2]
    assert names(factorize(Net(), select="*.up", progress=False)) == LINEARS[::2]
    report = factorize(Net(), select=lambda name, m: m.in_features == 40, progress=False)
    assert names(report) == LINEARS[1::2]
    assert report.dense["layers.0.up"] == "not selected"
    assert "lm_head" in names(factorize(Net(), select=["lm_head"], progress=False))


def test_keep_by_pattern_first_match_decides():
    report = factorize(Net(), {"layers.0.*": 0.25, "*.up": 0.75}, progress=False)
    assert {m.name: m.keep for m in report.modules} == {
        "layers.0.up": 0.25,
        "layers.0.down": 0.25,
        "layers.1.up": 0.75,
    }
    assert report.dense["layers.1.down"] == "no pattern of keep matches"


def test_keep_one_changes_nothing():
    model = Net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = factorize(model, 1.0, progress=False)
    assert not report.modules and report.parameters_before == report.parameters_after
    assert "no rank saves parameters at keep=1" in report.dense["layers.0.up"]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_keep_one_for_one_module_only():
    report = factorize(Net(), {"*.0.up": 1, "*": 0.5}, progress=False)
    assert names(report) == LINEARS[1:]


def test_tied_weights_stay_dense():
    model = Net()
    model.lm_head.weight = model.embed.weight
    model.layers[1]["up"].weight = model.layers[0]["up"].weight
    report = factorize(model, select=["*"], progress=False)
    assert names(report) == LINEARS[1::2]
    assert report.dense["lm_head"] == "its weight is tied to embed"
    assert report.dense["layers.0.up"] == "its weight is tied to layers.1.up"
    assert model.lm_head.weight is model.embed.weight


def test_packed_neighbours_are_not_tied():
    """Two weights in one buffer, as the backend packs them, do not overlap."""
    model = Net()
    up, down = model.layers[0]["up"], model.layers[0]["down"]
    buffer = torch.randn(2, 640)
    up.weight = nn.Parameter(buffer[0].view(40, 16))
    down.weight = nn.Parameter(buffer[1].view(16, 40))
    assert names(factorize(model, progress=False)) == LINEARS


def test_one_module_in_two_places_is_replaced_in_both():
    model = Net()
    model.layers[1] = model.layers[0]
    report = factorize(model, progress=False)
    assert names(report) == LINEARS[:2]
    assert model.layers[1]["up"] is model.layers[0]["up"]
    other = nn.ModuleDict({"a": nn.Linear(16, 16)})
    other["b"] = other["a"]
    factorize(other, progress=False)
    assert isinstance(other["b"], LowRankLinear) and other["a"] is other["b"]


def test_factorized_modules_are_skipped_and_reported():
    model = Net()
    factorize(model, select=["*.up"], progress=False)
    first = model.layers[0]["up"]
    report = factorize(model, 0.5, progress=False)
    assert names(report) == LINEARS[1::2]
    assert report.dense["layers.0.up"] == "factorized already"
    assert model.layers[0]["up"] is first and type(first.u) is nn.Linear
    with pytest.raises(FactorizeError, match=r"all 5 .*factorized already"):
        factorize(model, progress=False)


class Computed(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def test_what_is_not_a_plain_linear_stays():
    model = nn.Sequential(
        Computed(16, 16),
        nn.MultiheadAttention(16, 2),
        nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)),
        nn.Linear(16, 16),
        nn.Linear(16, 16),
    )
    model[3].register_forward_hook(lambda *args: None)
    report = factorize(model, progress=False)
    assert names(report) == ["4"]
    assert report.dense["0"] == "Computed is not a plain nn.Linear"
    assert "NonDynamicallyQuantizableLinear" in report.dense["1.out_proj"]
    assert "is not a plain nn.Linear" in report.dense["2"]
    assert report.dense["3"] == "it carries hooks that a replacement would lose"


@pytest.mark.parametrize("keep", [0, -0.1, 1.5, float("nan"), float("inf"), "half", None, True])
def test_bad_keep(keep):
    for value, name in ((keep, r"keep="), ({"*.up": keep}, r"keep\['\*\.up'\]=")):
        with pytest.raises(FactorizeError, match=f"{name}.*above 0 and at most 1"):
            factorize(Net(), value, progress=False)


def test_patterns_without_a_match():
    says = r"select: .*'\*\.q_proj' matches none .*layers\.0\.up"
    with pytest.raises(FactorizeError, match=says):
        factorize(Net(), select=["*.up", "*.q_proj"], progress=False)
    with pytest.raises(FactorizeError, match=r"keep: .*'\*\.q_proj' matches none"):
        factorize(Net(), {"*.q_proj": 0.5}, progress=False)
    with pytest.raises(FactorizeError, match="at least one pattern"):
        factorize(Net(), {}, progress=False)
    with pytest.raises(FactorizeError, match="keys are glob patterns"):
        factorize(Net(), {3: 0.5}, progress=False)
    with pytest.raises(FactorizeError, match="predicate"):
        factorize(Net(), select=[3], progress=False)


def test_nothing_selected():
    with pytest.raises(FactorizeError, match=r"not selected: 'layers\.0\.up'.* and 1 more"):
        factorize(Net(), select=lambda name, module: False, progress=False)
    with pytest.raises(FactorizeError, match="the model has no linear modules"):
        factorize(nn.Sequential(nn.ReLU()), progress=False)
    with pytest.raises(FactorizeError, match="the model itself"):
        factorize(nn.Linear(8, 8), progress=False)


def test_what_has_a_branch_is_left_alone():
    model = Net()
    layer = model.layers[0]
    layer["up"] = BranchedLinear(layer["up"], LowRankLinear(16, 40, 2, bias=False))
    ids = torch.arange(12).view(2, 6)
    alone = layer["up"].base.weight
    report = factorize(model, 0.5, calibration=[ids], progress=False)
    assert names(report) == [name for name in LINEARS if name != "layers.0.up"]
    assert "branch" in report.dense["layers.0.up"]
    assert not any(name.startswith("layers.0.up.") for name in report.dense)
    assert layer["up"].base.weight is alone
    with pytest.raises(FactorizeError, match="has a low-rank branch"):
        factorize(model, 0.5, select=["layers.0.up"], progress=False)


def test_backward_hooks_keep_a_module_dense():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    model[0].register_full_backward_hook(lambda *args: None)
    model[1].register_full_backward_pre_hook(lambda *args: None)
    report = factorize(model, progress=False)
    assert names(report) == ["2"]
    assert (
        report.dense["0"] == report.dense["1"] == "it carries hooks that a replacement would lose"
    )
