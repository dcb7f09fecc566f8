"""What is shipped: a wheel with everything in it and nothing that shadows other packages."""

from __future__ import annotations

import importlib.metadata
import pathlib
import subprocess
import sys
import zipfile

import pytest

import fsvd_compile

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    pytest.importorskip("setuptools", minversion="77", reason="builds without a network")
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(out), str(ROOT)], check=True, capture_output=True)
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_every_source_file_is_in_the_wheel(wheel):
    package = ROOT / "fsvd_compile"
    wanted = {
        str(path.relative_to(ROOT))
        for path in package.rglob("*")
        if path.suffix in (".py", ".json") or path.name == "README.md"
    }
    assert wanted - set(wheel.namelist()) == set()


def test_the_wheel_installs_one_top_level_name(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"fsvd_compile"}


def test_entry_point(wheel):
    entry = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    text = wheel.read(entry).decode()
    assert "[torch_dynamo_backends]\nflashsvd = fsvd_compile.backend:flashsvd" in text


def test_version_is_said_once():
    assert importlib.metadata.version("fsvd-compile") == fsvd_compile.__version__


def test_public_names():
    for name in fsvd_compile.__all__:
        assert getattr(fsvd_compile, name) is not None
    assert callable(fsvd_compile.factorize) and callable(fsvd_compile.explain)


def test_a_package_that_is_only_on_the_path_gives_its_name_when_imported():
    script = """
import importlib.metadata
importlib.metadata.entry_points = lambda **_: importlib.metadata.EntryPoints(())
import torch
assert "flashsvd" not in torch._dynamo.list_backends()
import fsvd_compile
x = torch.ones(3)
assert torch.equal(torch.compile(lambda x: x + 1, backend="flashsvd")(x), x + 1)
assert torch._dynamo.lookup_backend("flashsvd") is fsvd_compile.flashsvd
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
