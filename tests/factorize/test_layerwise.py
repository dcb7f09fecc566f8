"""`factorize(layerwise=True)`: the factors of the call without it, from one layer's covariances at a time."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from test_factorize import Unchanged, tiny_llama, tokens
from torch import nn

from fsvd_compile.errors import FactorizeError
from fsvd_compile.factorize import factorize, layerwise
from fsvd_compile.factorize.calibration import Covariances


def assert_same(model, twin):
    for (name, a), b in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        # A layer alone is the same sums, but a model may hand it another memory layout.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("allocation", ["uniform", "loss"])
@pytest.mark.parametrize("select", [None, ["*.down_proj", "lm_head"]])
def test_the_same_factors(allocation, select):
    model, batches = tiny_llama(num_hidden_layers=3), tokens(4)
    twin = copy.deepcopy(model)
    options = {
        "calibration": batches,
        "allocation": allocation,
        "select": select,
        "progress": False,
    }
    expected = factorize(twin, 0.5, **options)
    report = factorize(model, 0.5, layerwise=True, **options)
    assert [m.name for m in report.modules] == [m.name for m in expected.modules]
    assert [m.rank for m in report.modules] == [m.rank for m in expected.modules]
    for ours, theirs in zip(report.modules, expected.modules, strict=True):
        assert ours.error == pytest.approx(theirs.error, rel=1e-6)
        assert ours.tokens == theirs.tokens and not ours.feedback
    assert report.dense == expected.dense
    assert_same(model, twin)


def test_masks_are_seen():
    model = tiny_llama()
    ids = torch.cat(tokens(2))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    batches = [{"input_ids": ids, "attention_mask": mask}]
    twin = copy.deepcopy(model)
    expected = factorize(twin, 0.5, calibration=batches, progress=False)
    report = factorize(model, 0.5, calibration=batches, layerwise=True, progress=False)
    assert {m.tokens for m in report.modules} == {m.tokens for m in expected.modules}
    assert {m.tokens for m in report.modules} == {int(mask.sum())}
    assert_same(model, twin)


class Adding(nn.Module):
    """A layer that reads what others have left in a list, and leaves something itself."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(24, 48), nn.Linear(48, 24)

    def forward(self, x, notes=None):
        y = self.b(torch.relu(self.a(x + sum(notes[-1:]))))
        notes.append(y)
        return x + y


class Noting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Adding() for _ in range(3))

    def forward(self, x):
        notes = []
        for layer in self.layers:
            x = layer(x, notes=notes)
        return x


def test_layers_that_add_to_their_arguments():
    model, batches = Noting(), [torch.randn(2, 7, 24) for _ in range(4)]
    twin = copy.deepcopy(model)
    options = {
        "calibration": batches, "allocation": "loss", "progress": False,
        "loss": lambda model, batch: model(batch).square().mean(),
    }  # fmt: skip
    factorize(twin, 0.6, **options)
    factorize(model, 0.6, layerwise=True, **options)
    assert_same(model, twin)


def test_covariances_of_one_layer_at_a_time(monkeypatch):
    """What is alive when a layer is computed belongs to that layer."""
    alive, real = [], Covariances.pop
    numbers = weakref.WeakKeyDictionary()  # an address is given again once an object is gone

    def pop(self, name):
        alive.append((numbers.setdefault(self, len(alive)), name.split(".")[2]))
        return real(self, name)

    monkeypatch.setattr(Covariances, "pop", pop)
    factorize(
        tiny_llama(num_hidden_layers=3), 0.5, calibration=tokens(2), layerwise=True, progress=False
    )
    layers = [{layer for other, layer in alive if other == one} for one in dict(alive)]
    assert [len(found) for found in layers] == [1, 1, 1]


def test_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    model, batches = tiny_llama(num_hidden_layers=4), tokens(3)
    twin = copy.deepcopy(model)
    options = {"calibration": batches, "layerwise": True, "allocation": "loss", "progress": False}
    expected = factorize(twin, 0.5, **options)
    done, real = [], layerwise.computed

    def computed(targets, *args):
        done.append(len(targets))
        if len(done) == 3:
            raise KeyboardInterrupt
        return real(targets, *args)

    monkeypatch.setattr(layerwise, "computed", computed)
    with Unchanged(model), pytest.raises(KeyboardInterrupt):
        factorize(model, 0.5, resume=tmp_path, **options)
    assert len(list(tmp_path.glob("layer-*.safetensors"))) == 2
    done[:] = [0] * 4
    report = factorize(model, 0.5, resume=tmp_path, **options)
    assert len(done) == 6  # two layers were computed now
    assert report.modules == expected.modules and report.dense == expected.dense
    assert_same(model, twin)


@pytest.mark.parametrize("feedback", [False, True])
def test_a_layer_without_parameters(feedback):
    class Holed(nn.Module):
        def __init__(self):
            super().__init__()
            block = lambda: nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 24))  # noqa: E731
            self.layers = nn.ModuleList((block(), nn.Identity(), block()))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    torch.manual_seed(0)
    model, batches = Holed(), [torch.randn(40, 24)]
    twin = copy.deepcopy(model)
    factorize(twin, 0.5, calibration=batches, progress=False)
    factorize(model, 0.5, calibration=batches, layerwise=True, feedback=feedback, progress=False)
    if not feedback:
        assert_same(model, twin)
    assert torch.isfinite(model(batches[0])).all()


def test_bad_input():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with Unchanged(model), pytest.raises(FactorizeError, match=r"layerwise=True .* has none"):
        factorize(model, 0.9, calibration=[torch.randn(4, 8)], layerwise=True, progress=False)
    with Unchanged(model), pytest.raises(FactorizeError, match="layerwise=True needs calibration"):
        factorize(model, 0.9, layerwise=True, progress=False)
