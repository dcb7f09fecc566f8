"""The ops as a whole: importable anywhere, traceable, and clear about what is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import assert_close
from torch.fx.experimental.proxy_tensor import make_fx

from fsvd_compile import kernels

OPS = ("attention", "expand", "rope_append", "shrink")


def arguments(op: str) -> tuple[tuple, tuple]:
    """(tensors that are traced, the rest) of one call."""
    if op == "shrink":
        weights = [torch.randn(13, 100), torch.randn(37, 100)]
        return (torch.randn(2, 3, 100),), (weights, [None, None], "rms", None, None, 1e-5, 0.0)
    if op == "expand":
        weights = [torch.randn(37, 13), torch.randn(37, 19)]
        return (torch.randn(2, 3, 32),), (weights, [None, None], [0, 13], None, "silu_mul")
    q, k, v = (torch.randn(2, 5, h, 16).transpose(1, 2) for h in (4, 2, 2))
    if op == "attention":
        return (q, k, v, torch.rand(2, 1, 5, 5) > 0.3), (0.25,)
    cos, caches = torch.rand(1, 5, 16), [torch.randn(2, 2, 20, 16) for _ in range(2)]
    return (q, k, v, cos, cos, *caches, torch.arange(5)), ()


@pytest.mark.parametrize("mode", ("real", "symbolic"))
@pytest.mark.parametrize("op", OPS)
def test_aten_paths_retrace(op, mode):
    """The backend puts `<op>_aten` in the place of the op and traces the graph again."""
    fn = getattr(kernels, f"{op}_aten")
    traced, rest = arguments(op)
    trace = make_fx(lambda *args: fn(*args, *rest), tracing_mode=mode, _allow_non_fake_inputs=True)
    graph = trace(*traced)
    assert not any("fsvd" in str(node.target) for node in graph.graph.nodes)
    copies = [t.clone() for t in traced]
    assert_close("out", graph(*traced), fn(*copies, *rest), 1e-6)
    for a, b in zip(traced, copies, strict=True):
        assert torch.equal(a, b)


def run(code: str) -> None:
    """A fresh interpreter, without Triton's own interpreter."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    root = str(Path(kernels.__file__).parents[2])
    env["PYTHONPATH"] = os.pathsep.join([root, env.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]


CALL = """
x, w = torch.randn(1, 8), torch.randn(4, 8)
assert torch.ops.fsvd.shrink(x, [w], [None], "none", None, None, 0.0, 0.0).shape == (1, 4)
try:
    kernels.shrink_triton(x, [w], [None])
except DeviceError as error:
    assert {word!r} in str(error), error
else:
    raise AssertionError("no error")
assert not torch.cuda.is_initialized()
"""


def test_without_triton():
    run(
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from fsvd_compile import kernels\n"
        "from fsvd_compile.errors import DeviceError\n" + CALL.format(word="not installed")
    )


def test_without_interpreter():
    run(
        "import torch\n"
        "from fsvd_compile import kernels\n"
        "from fsvd_compile.errors import DeviceError\n" + CALL.format(word="TRITON_INTERPRET=1")
    )
