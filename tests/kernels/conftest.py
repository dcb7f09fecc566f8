"""Fixtures for the tests of the ops."""

from __future__ import annotations

import pytest
import torch
from opcases import DTYPES

from fsvd_compile.kernels import _memo, _triton, _tuning


@pytest.fixture(autouse=True)
def launches_are_new():
    """What a test replaces is not what launches of the test before were told."""
    _memo.forget()
    yield
    _memo.forget()


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request) -> torch.dtype:
    return DTYPES[request.param]


@pytest.fixture(params=("fp32", "fp16"), ids=str)
def interpreted_dtype(request) -> torch.dtype:
    return DTYPES[request.param]


@pytest.fixture
def hopper(monkeypatch):
    """CPU tensors are taken for those of an H200."""
    monkeypatch.setattr(_triton, "capability", lambda device: (9, 0))
    monkeypatch.setattr(_triton, "interpreted", lambda: False)
    monkeypatch.setattr(_triton, "shared_memory", lambda device: 232448)
    monkeypatch.setattr(_triton, "multiprocessors", lambda device: 132)
    _tuning.forget()
    yield
    _tuning.forget()
