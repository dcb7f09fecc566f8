"""Hundreds of small Dynamo traces: what each would spend beside tracing is left out."""

from __future__ import annotations

import pytest
import torch._dynamo.guards


@pytest.fixture(autouse=True)
def _untimed_guards(monkeypatch):
    # Flushes the caches to time one check of the guards: 20 ms a trace, for a debug log.
    monkeypatch.setattr(
        torch._dynamo.guards, "profile_guard_manager", lambda *_: 0.0, raising=False
    )
