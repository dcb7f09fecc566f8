"""Fixtures for the tests of the ops."""

from __future__ import annotations

import pytest
import torch
from opcases import DTYPES


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request) -> torch.dtype:
    return DTYPES[request.param]


@pytest.fixture(params=("fp32", "fp16"), ids=str)
def interpreted_dtype(request) -> torch.dtype:
    return DTYPES[request.param]
