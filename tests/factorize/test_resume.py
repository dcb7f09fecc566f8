"""`factorize(resume=)`: an interrupted run goes on from its finished layers, and from nothing else."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_factorize import Unchanged, tiny_llama, tokens
from torch import nn

from fsvd_compile.errors import FactorizeError
from fsvd_compile.factorize import Refine, factorize
from fsvd_compile.factorize.layerwise import Layerwise

OPTIONS = {"feedback": True, "allocation": "loss", "refine": Refine(3, 1e-3), "progress": False}


@pytest.fixture
def fits(monkeypatch):
    """Layers that are fitted, not taken from a directory; a negative number in it interrupts there."""
    done, real = [], Layerwise._factors

    def counted(self, index, *args):
        if done and index == -done[0]:
            raise KeyboardInterrupt
        done.append(index)
        return real(self, index, *args)

    monkeypatch.setattr(Layerwise, "_factors", counted)
    return done


def interrupted(model, batches, folder, fits, at=2, **changes):
    fits[:] = [-at]
    with Unchanged(model), pytest.raises(KeyboardInterrupt):
        factorize(model, 0.5, calibration=batches, resume=folder, **OPTIONS | changes)
    fits.clear()


def test_goes_on_where_it_was_interrupted(tmp_path, fits):
    model, batches = tiny_llama(num_hidden_layers=4), tokens(4)
    twin = copy.deepcopy(model)
    expected = factorize(twin, 0.5, calibration=batches, **OPTIONS)
    interrupted(model, batches, tmp_path, fits)
    # Not a finished layer, whatever is in it.
    (tmp_path / "layer-0002.unfinished").write_bytes(b"half")
    report = factorize(model, 0.5, calibration=batches, resume=tmp_path, **OPTIONS)
    assert fits == [2, 3]
    assert report.modules == expected.modules and report.layers == expected.layers
    assert report.dense == expected.dense
    for (name, a), b in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_finished_run_is_read(tmp_path, fits):
    model, batches = tiny_llama(), tokens(4)
    models = [copy.deepcopy(model) for _ in range(2)]
    for m in models:
        factorize(m, 0.5, calibration=batches, resume=tmp_path, **OPTIONS)
    assert fits == [0, 1]
    a, b = (m.state_dict() for m in models)
    assert all(torch.equal(a[name], b[name]) for name in a)


def changed(model):
    with torch.no_grad():
        model.model.norm.weight[3] += 1
    return model


@pytest.mark.parametrize(
    "change,says",
    [
        ({"keep": 0.6}, "keep= or select="),
        ({"select": ["*.q_proj"]}, "keep= or select="),
        ({"calibration": tokens(4)}, "calibration="),
        ({"refine": Refine(4, 1e-3)}, "refine="),
        ({"dtype": torch.float32}, "dtype="),
        ({"allocation": "uniform"}, "allocation="),
        ({"feedback": False, "refine": None, "layerwise": True}, "feedback="),
        ({"model": changed}, "the model"),
    ],
)
def test_another_run_is_refused(tmp_path, fits, change, says):
    model, batches = tiny_llama(), tokens(4)
    interrupted(model, batches, tmp_path, fits, at=1)
    model = change.pop("model", lambda m: m)(model)
    given = {"keep": 0.5, "calibration": batches} | OPTIONS | change
    with Unchanged(model), pytest.raises(FactorizeError, match=f"differs in {says}"):
        factorize(model, resume=tmp_path, **given)
    assert not fits


def test_what_is_no_such_directory_is_refused(tmp_path, fits):
    model, batches = tiny_llama(), tokens(4)
    (tmp_path / "file").write_text("x")
    for folder, says in ((tmp_path, "holds files but no run.json"), (tmp_path / "file", "cannot")):
        with Unchanged(model), pytest.raises(FactorizeError, match=f"resume: .*{says}"):
            factorize(model, 0.5, calibration=batches, resume=folder, **OPTIONS)
    folder = tmp_path / "new"
    interrupted(model, batches, folder, fits, at=1)
    assert json.loads((folder / "run.json").read_text())
    (folder / "layer-0000.safetensors").write_bytes(b"broken")
    with Unchanged(model), pytest.raises(FactorizeError, match=r"resume: .*cannot be used"):
        factorize(model, 0.5, calibration=batches, resume=folder, **OPTIONS)


def other_reports(tensors, reports):
    reports["modules"][0]["colour"] = "red"


def no_modules(tensors, reports):
    del reports["modules"]


def a_factor_less(tensors, reports):
    del tensors[next(key for key in tensors if key.endswith(".u"))]


@pytest.mark.parametrize("damage", [other_reports, no_modules, a_factor_less])
def test_layers_of_another_version_are_refused(tmp_path, fits, damage):
    model, batches = tiny_llama(), tokens(4)
    interrupted(model, batches, tmp_path, fits, at=1)
    path = tmp_path / "layer-0000.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        reports = json.loads(file.metadata()["reports"])
    damage(tensors, reports)
    save_file(tensors, path, {"reports": json.dumps(reports)})
    with Unchanged(model), pytest.raises(FactorizeError, match=r"resume: .*cannot be used"):
        factorize(model, 0.5, calibration=batches, resume=tmp_path, **OPTIONS)
    with Unchanged(model), pytest.raises(FactorizeError, match=r"resume=5 has to be the path"):
        factorize(model, 0.5, calibration=batches, resume=5, **OPTIONS)


def test_needs_layers(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8))
    with (
        Unchanged(model),
        pytest.raises(FactorizeError, match="resume= needs layerwise=True or feedback=True"),
    ):
        factorize(model, 0.5, resume=tmp_path)
    assert not list(tmp_path.iterdir())
