"""Hundreds of small Dynamo traces: what each would spend beside tracing is left out."""

from __future__ import annotations

import pytest
import torch._dynamo.guards

import fsvd_compile.passes.graph as graph_module
import fsvd_compile.passes.rewrite as rewrite_module


@pytest.fixture(autouse=True)
def _untimed_guards(monkeypatch):
    # Flushes the caches to time one check of the guards: 20 ms a trace, for a debug log.
    monkeypatch.setattr(
        torch._dynamo.guards, "profile_guard_manager", lambda *_: 0.0, raising=False
    )


@pytest.fixture(autouse=True)
def _memory_is_true(monkeypatch):
    """After every refresh the runner's index says what one built from the graph as it is says."""

    def refresh_and_check(memory, stale=()):
        graph_module.refresh_values(memory, stale)
        anew = graph_module.Memory(memory.graph)
        for node in memory.graph.nodes:
            assert memory._key[node] == anew._key[node], node
            assert memory._writes.get(node) == anew._writes.get(node), node
            assert memory.holders(node) == anew.holders(node), node
            assert memory.any(node) is anew.any(node), node

    monkeypatch.setattr(rewrite_module, "refresh_values", refresh_and_check)
