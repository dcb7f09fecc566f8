"""Shared fixtures: seeds, markers, and memory poisoned with NaN so that an unwritten output is seen."""

from __future__ import annotations

import os

# Processes side by side share the cores: a pool of threads in each only waits for the others. Set before torch is
# imported, for the processes that tests start, too.
if "PYTEST_XDIST_WORKER" in os.environ:
    for name in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
        os.environ.setdefault(name, "1")

import pytest
import torch

GPU = torch.cuda.is_available()
# Tests see the tiles that come with the package, not what was tuned on this machine.
os.environ["FSVD_TUNED"] = os.devnull


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(42)
    # Dynamo reuses code for another instance of the same module; every test counts its own graphs.
    torch._dynamo.reset()


@pytest.fixture
def cheap(monkeypatch):
    """AOTAutograd without Inductor: the same rewrites, pieces and mutations, seconds less to compile."""
    from torch._dynamo.backends.debugging import aot_eager

    monkeypatch.setattr("fsvd_compile.backend._inductor", lambda config: aot_eager)


@pytest.fixture
def lowered(monkeypatch):
    """As `cheap`, and the graphs that were handed on to be lowered."""
    from torch._dynamo.backends.debugging import aot_eager

    graphs = []

    def compile_graph(gm, inputs):
        graphs.append(gm)
        return aot_eager(gm, inputs)

    monkeypatch.setattr("fsvd_compile.backend._inductor", lambda config: compile_graph)
    return graphs


@pytest.fixture
def device() -> str:
    return "cuda" if GPU else "cpu"


@pytest.fixture
def poisoned(monkeypatch):
    """`torch.empty` and friends hand out NaN: what a kernel leaves unwritten fails every comparison."""

    def poison(make):
        def poisoned_make(*args, **kwargs):
            out = make(*args, **kwargs)
            if out.is_floating_point() and out.device.type != "meta":
                out.fill_(float("nan"))
            return out

        return poisoned_make

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))


if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
