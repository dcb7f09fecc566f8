"""bench/tune_step.py: what it takes and what it replaces; the rest of it needs a GPU."""

from __future__ import annotations

import argparse
import importlib.util
import pathlib

import pytest
import torch

from fsvd_compile.kernels import _tuning

FILE = pathlib.Path(__file__).parents[2] / "bench" / "tune_step.py"
LAUNCH = _tuning.Launch("expand", "stream", 1024, 12288, 1, 2)
CPU = torch.device("cpu")


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("tune_step", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def attention():
    return _tuning.decode_attention_tile(
        streamed=True, batch=1, kv_heads=32, group=1, length=1024, dim=128, itemsize=2, device=CPU
    )


def test_a_linears_tile_is_taken_by_it_alone(script, hopper):
    kept = attention(), _tuning.linear_tile(LAUNCH, CPU)
    other = LAUNCH._replace(rows=4096)
    beside = _tuning.linear_tile(other, CPU)
    with script.taking(script.linear("expand,1024,12288=8,512,4,2")) as asked:
        assert _tuning.linear_tile(other, CPU) == beside and attention() == kept[0]
        assert not asked
        assert _tuning.linear_tile(LAUNCH, CPU) == _tuning.Tile(8, 512, 4, 1, 2)
        assert asked == [LAUNCH]
    assert (attention(), _tuning.linear_tile(LAUNCH, CPU)) == kept and _tuning.settled()


def test_attentions_tile_is_taken_by_it_alone(script, hopper):
    kept = attention(), _tuning.linear_tile(LAUNCH, CPU)
    with script.taking(script.attention("128,1,8,3")) as asked:
        assert _tuning.linear_tile(LAUNCH, CPU) == kept[1] and not asked
        assert attention() == _tuning.AttentionTile(1, 128, 1, 8, 3)
        assert len(asked) == 1
    with script.taking(script.KEPT):
        assert (attention(), _tuning.linear_tile(LAUNCH, CPU)) == kept
    assert attention() == kept[0]


@pytest.mark.parametrize(
    "text", ("expand,1024=8,512,4,2", "gemv,1,2=8,512,4,2", "expand,1,2=8,512,4", "expand,1,2")
)
def test_linears_that_are_refused(script, text):
    with pytest.raises(argparse.ArgumentTypeError):
        script.linear(text)


@pytest.mark.parametrize("text", ("128,1,8", "128,1,8,x", "128,0,8,3"))
def test_attention_tiles_that_are_refused(script, text):
    with pytest.raises(argparse.ArgumentTypeError):
        script.attention(text)
