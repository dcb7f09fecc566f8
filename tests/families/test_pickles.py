"""Checkpoints of foreign classes are read whole, and nothing a hostile or damaged file says is run."""

from __future__ import annotations

import builtins
import importlib
import io
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile

import pytest
import torch
from torch import nn

from fsvd_compile.errors import CheckpointError
from fsvd_compile.families import unpickle
from fsvd_compile.families.pickles import Inert, harvest

FOREIGN = """
import collections
import enum
import torch
from torch import nn

class Kind(enum.Enum):
    SVD = "svd"

class Config:
    def __init__(self):
        self.hidden_size = 8
        self.rms_norm_eps = 1e-5
        self.tie = True
        self.nothing = None
        self.name = "tiny"
        self.dtype = torch.bfloat16
        self.ranks = (2, 3)
        self.id2label = {0: "no", 1: "yes"}
        self.kind = Kind.SVD
        self.inner = Inner()
        self.act = nn.SiLU
        self.weight = torch.ones(1)
        self.me = self

class Inner:
    __slots__ = ("depth",)
    def __init__(self):
        self.depth = 2

class SVDLinear(nn.Module):
    def __init__(self, n, r):
        super().__init__()
        self.v_proj = nn.Linear(n, r, bias=False)
        self.u_proj = nn.Linear(r, n)

class Block(nn.Module):
    def __init__(self, n, r):
        super().__init__()
        self.attn = SVDLinear(n, r)
        self.absent = None
        self.register_parameter("no_bias", None)
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("freq", torch.arange(3.0), persistent=False)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = Config()
        self.embed = nn.Embedding(5, 8)
        self.layers = nn.ModuleList(Block(8, r) for r in (2, 3))
        self.head = nn.Linear(8, 5, bias=False)
        self.head.weight = self.embed.weight
        self.layers[1].attn.v_proj = self.layers[0].attn.v_proj
        self.pointer = [self.layers[0]]

class Tokenizer(dict):
    def __init__(self):
        super().__init__(a=1)
        self.vocab = collections.OrderedDict(b=2)
        self.counts = collections.Counter("abca")
        self.specials = {"<s>", "</s>"}
        self.raw = b"\\x00\\xff"
        self.array = bytearray(b"xyz")
        self.shape = torch.Size([1, 2])
        self.device = torch.device("cpu")
        self.default = collections.defaultdict(list, x=[1])
"""


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """Save what `make(module)` returns; the module's classes are gone once it is saved."""

    def save(make, path=tmp_path / "model.pt", **kwargs):
        folder = tmp_path / "foreign"
        folder.mkdir(exist_ok=True)
        source = folder / "foreign_repo.py"
        source.write_text(FOREIGN)
        with monkeypatch.context() as patch:
            patch.syspath_prepend(str(folder))
            module = importlib.import_module("foreign_repo")
            saved = make(module)
            torch.save(saved, path, **kwargs)
        del sys.modules["foreign_repo"]
        source.unlink()
        importlib.invalidate_caches()
        with pytest.raises(ImportError):
            importlib.import_module("foreign_repo")
        return path, saved

    return save


def pack(path, data, storages=(), root="archive", byteorder=b"little", **extra):
    """A file of torch.save's format with the pickle `data`, checksums included."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{root}/data.pkl", data)
        if byteorder is not None:
            archive.writestr(f"{root}/byteorder", byteorder)
        for key, content in enumerate(storages):
            archive.writestr(f"{root}/data/{key}", content)
        for name, content in extra.items():
            archive.writestr(f"{root}/{name.replace('__', '.')}", content)
    return path


def entries(path):
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def repack(path, data):
    """The file at `path` with another pickle."""
    stored = entries(path)
    keys = sorted((k for k in stored if k.startswith("data/")), key=lambda k: int(k[5:]))
    assert keys == [f"data/{i}" for i in range(len(keys))]
    return pack(path, data, [stored[key] for key in keys])


def same_memory(a, b):
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def assert_equal(tensors, expected):
    assert list(tensors) == list(expected)
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype
        assert tensors[name].stride() == tensor.stride()
        assert torch.equal(tensors[name], tensor.detach()), name


# Round trips.


def everything(model):
    named = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        own = {**module._parameters, **module._buffers}
        for name, tensor in own.items():
            if tensor is not None:
                named[f"{prefix}.{name}" if prefix else name] = tensor
    return named


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model, module: model,
        lambda model, module: {"model": model, "tokenizer": module.Tokenizer()},
        lambda model, module: {"module": model},
        lambda model, module: {"net": [model], "tokenizer": module.Tokenizer()},
    ],
    ids=["bare", "dict", "module", "elsewhere"],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_foreign_module(foreign, wrap, protocol):
    models = []

    def make(module):
        models.append(module.Model())
        return wrap(models[0], module)

    path, _ = foreign(make, pickle_protocol=protocol)
    result = harvest(path)
    model = models[0]
    assert_equal(result.tensors, everything(model))
    assert set(model.state_dict()) < set(result.tensors)
    assert "layers.0.freq" in result.tensors
    assert not any(t.requires_grad for t in result.tensors.values())
    assert all(type(t) is torch.Tensor for t in result.tensors.values())

    assert result.tensors["head.weight"] is result.tensors["embed.weight"]
    shared = "layers.{}.attn.v_proj.weight"
    assert result.tensors[shared.format(0)] is result.tensors[shared.format(1)]

    assert result.model_class == "foreign_repo.Model"
    assert result.config_class == "foreign_repo.Config"
    assert result.classes == {
        name: f"{type(m).__module__}.{type(m).__qualname__}"
        for name, m in model.named_modules(remove_duplicate=False)
        if name
    }
    assert result.config == {
        "hidden_size": 8,
        "rms_norm_eps": 1e-5,
        "tie": True,
        "nothing": None,
        "name": "tiny",
        "dtype": "bfloat16",
        "ranks": [2, 3],
        "id2label": {"0": "no", "1": "yes"},
        "kind": "svd",
        "inner": {"depth": 2},
        "act": "torch.nn.modules.activation.SiLU",
    }
    assert "foreign_repo" not in sys.modules


def test_importable_classes_are_not_imported(tmp_path, foreign, monkeypatch):
    path, _ = foreign(lambda module: module.Model())
    (tmp_path / "foreign_repo.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    assert harvest(path).model_class == "foreign_repo.Model"
    assert "foreign_repo" not in sys.modules


def test_tiny_llama(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    torch.save({"model": model, "tokenizer": None}, tmp_path / "llama.pt")
    result = harvest(tmp_path / "llama.pt")
    state = model.state_dict()
    assert set(state) <= set(result.tensors)
    for name, tensor in state.items():
        assert torch.equal(result.tensors[name], tensor)
    extra = set(result.tensors) - set(state)
    assert extra == {n for n, _ in model.named_buffers()} - set(state)
    assert same_memory(
        result.tensors["lm_head.weight"], result.tensors["model.embed_tokens.weight"]
    )
    assert result.model_class == "transformers.models.llama.modeling_llama.LlamaForCausalLM"
    assert result.config_class == "transformers.models.llama.configuration_llama.LlamaConfig"
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_key_value_heads"):
        assert result.config[key] == getattr(config, key)
    assert result.config["rms_norm_eps"] == config.rms_norm_eps
    attention = result.classes["model.layers.1.self_attn"]
    assert attention == "transformers.models.llama.modeling_llama.LlamaAttention"


def state_dict():
    base = torch.randn(6, 4)
    return {
        "base": base,
        "view": base[1:5:2, ::2],
        "transposed": base.t(),
        "expanded": torch.randn(1, 3).expand(5, 3),
        "bf16": torch.randn(3, 3).bfloat16(),
        "fp16": torch.randn(3).half(),
        "fp64": torch.randn(2).double(),
        "int8": torch.arange(-3, 3, dtype=torch.int8),
        "uint8": torch.arange(5, dtype=torch.uint8),
        "int16": torch.arange(5, dtype=torch.int16),
        "int32": torch.arange(5, dtype=torch.int32),
        "int64": torch.arange(5),
        "bool": torch.tensor([True, False, True]),
        "complex": torch.randn(2, dtype=torch.complex64),
        "uint16": torch.arange(3).to(torch.uint16),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        "parameter": nn.Parameter(torch.randn(2)),
        "buffer": nn.Buffer(torch.randn(2)),
    }


@pytest.mark.parametrize("key", [None, "model", "state_dict", "module"])
def test_state_dict(tmp_path, key):
    state = state_dict()
    saved = state if key is None else {key: state, "epoch": 3}
    torch.save(saved, tmp_path / "state.pt")
    result = harvest(tmp_path / "state.pt")
    assert_equal(result.tensors, state)
    tensors = result.tensors
    assert same_memory(tensors["base"], tensors["view"])
    tensors["base"].fill_(7.0)
    assert (tensors["view"] == 7.0).all() and (tensors["transposed"] == 7.0).all()
    assert (result.config, result.config_class, result.model_class) == ({}, None, None)
    assert result.classes == {}
    # The mapping is private: what was written above is not in the file.
    assert_equal(harvest(tmp_path / "state.pt").tensors, state)


def test_float8(tmp_path):
    state = {"w": torch.randn(4, 4).to(torch.float8_e4m3fn)}
    torch.save(state, tmp_path / "state.pt")
    got = harvest(tmp_path / "state.pt").tensors["w"]
    assert got.dtype == torch.float8_e4m3fn
    assert torch.equal(got.view(torch.uint8), state["w"].view(torch.uint8))


def test_state_dict_of_a_module_and_other_entries(tmp_path):
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    torch.save(model.state_dict(), tmp_path / "a.pt")
    assert_equal(harvest(tmp_path / "a.pt").tensors, model.state_dict())
    torch.save({"w": torch.ones(2), "step": 3, "name": "x"}, str(tmp_path / "b.pt"))
    assert list(harvest(str(tmp_path / "b.pt")).tensors) == ["w"]


def test_on_the_cpu_within_a_meta_device_context(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    with torch.device("meta"):
        tensors = harvest(tmp_path / "a.pt").tensors
    assert tensors["w"].device.type == "cpu"


def test_plain_config_dict(tmp_path):
    model = nn.Linear(2, 2)
    model.config = {"rank": 2, "bad": object, 3: [float, {1}]}
    torch.save(model, tmp_path / "a.pt")
    result = harvest(tmp_path / "a.pt")
    assert result.config_class is None
    expected = {"rank": 2, "bad": "builtins.object", "3": ["builtins.float", [1]]}
    assert result.config == expected


def test_module_twice_and_module_in_itself(tmp_path):
    inner = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": inner, "b": inner})
    model.a._modules["loop"] = model
    torch.save(model, tmp_path / "a.pt")
    result = harvest(tmp_path / "a.pt")
    assert list(result.tensors) == ["a.weight", "a.bias", "b.weight", "b.bias"]
    assert result.tensors["a.weight"] is result.tensors["b.weight"]
    assert result.classes == dict.fromkeys(("a", "b"), "torch.nn.modules.linear.Linear")


def test_storages_that_are_not_aligned(tmp_path):
    state = {"a": torch.arange(3, dtype=torch.int8), "b": torch.randn(5), "c": torch.randn(5)}
    torch.save(state, tmp_path / "a.pt")
    repack(tmp_path / "a.pt", entries(tmp_path / "a.pt")["data.pkl"])
    assert_equal(harvest(tmp_path / "a.pt").tensors, state)


@pytest.mark.parametrize("wrong", ["two", "none", "number"])
def test_no_model_to_be_found(tmp_path, wrong):
    saved = {
        "two": {"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)},
        "none": {"model": {"x": 1}, "list": [1, "a"]},
        "number": 3,
    }[wrong]
    torch.save(saved, tmp_path / "a.pt")
    match = "2 modules.*torch.nn.modules.linear.Linear" if wrong == "two" else "no module and no"
    with pytest.raises(CheckpointError, match=match):
        harvest(tmp_path / "a.pt")


@pytest.mark.parametrize("kind", ["sparse", "meta", "conjugated"])
def test_tensors_of_other_kinds(tmp_path, kind):
    tensor = {
        "sparse": lambda: torch.eye(3).to_sparse(),
        "meta": lambda: torch.ones(2, device="meta"),
        "conjugated": lambda: torch.ones(2, dtype=torch.complex64).conj(),
    }[kind]()
    torch.save({"odd": tensor}, tmp_path / "a.pt")
    match = r"tensor odd .*is not read; dense tensors are"
    # Whether a tensor on meta has a storage differs between versions of torch.
    if kind == "meta":
        match += "|is missing"
    with pytest.raises(CheckpointError, match=match):
        harvest(tmp_path / "a.pt")


# Hostile files. A pickle is written by hand where pickle itself would not write it.


class Evil:
    """Pickles as a call."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


class SideEffects:
    """Restoring one writes the file `marker`."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce_ex__(self, protocol):
        return _touch, (self.marker,), {"marker": self.marker}, iter([1]), iter([("a", 2)])

    def __setstate__(self, state):
        _touch(state["marker"])

    def append(self, item):
        _touch(self.marker)

    def __setitem__(self, key, value):
        _touch(self.marker)


def _touch(marker):
    with open(marker, "w"):
        pass
    return SideEffects(marker)


def evils(marker):
    touch = f"touch {marker}"
    code = f"open({str(marker)!r}, 'w').close()"
    nested = pickle.dumps(Evil(os.system, touch))
    # Chains of calls whose functions are results of calls.
    attribute = Evil(getattr, Evil(importlib.import_module, "os"), "system")
    return {
        "system": Evil(os.system, touch),
        "eval": Evil(builtins.eval, code.replace("'", '"')),
        "exec": Evil(builtins.exec, code),
        "popen": Evil(subprocess.Popen, ["touch", str(marker)]),
        "loads": Evil(pickle.loads, nested),
        "torch.load": Evil(torch.load, io.BytesIO(nested)),
        "getattr": Evil(getattr, attribute, "__call__"),
        "map": Evil(list, Evil(map, builtins.eval, [code])),
        "open": Evil(open, str(marker), "w"),
        "setstate": SideEffects(str(marker)),
    }


@pytest.mark.parametrize("where", ["top", "attribute", "key", "config", "items", "parameters"])
@pytest.mark.parametrize("name", list(evils("x")))
def test_nothing_is_run(tmp_path, where, name):
    marker = tmp_path / "marker"
    evil = evils(marker)[name]
    model = nn.Linear(2, 2)
    if where == "attribute":
        model.evil = evil
    elif where == "config":
        model.config = {"evil": evil, "rank": 3}
    elif where == "parameters":
        model._parameters["evil"] = evil
    saved = {
        "top": evil,
        "key": {"model": model, evil: evil},
        "items": [evil, {"net": model}, evil],
    }.get(where, model)
    torch.save(saved, tmp_path / "a.pt")
    try:
        result = harvest(tmp_path / "a.pt")
    except CheckpointError as error:
        # What is no module fails as such; `list(...)` of a call is refused as it is read.
        assert where in ("top", "parameters") or name == "map", error
    else:
        assert where not in ("top", "parameters")
        assert torch.equal(result.tensors["weight"], model.weight)
        assert where != "config" or result.config["rank"] == 3
    assert not marker.exists()
    # The attack is a real one.
    if where == "top" and name in ("system", "eval", "setstate"):
        torch.load(tmp_path / "a.pt", weights_only=False)
        assert marker.exists()


OPS = {
    "instance": b"(ios\nsystem\n(S'touch {}'\ntR.",
    "inst": b"(S'touch {}'\nios\nsystem\n.",
    "obj": b"(cos\nsystem\nS'touch {}'\no.",
    "call a result, build it": b"cbuiltins\ngetattr\n(cos\nsystem\nS'x'\ntR(S'touch {}'\ntR}S'a'\nK\x01sb.",
    "newobj": b"cos\nsystem\n(S'touch {}'\nt\x81.",
    "newobj_ex": b"\x80\x04cos\nsystem\n(S'touch {}'\nt}S'k'\nK\x01s\x92.",
    "dotted name": b"\x80\x04\x8c\x02os\x8c\x0bpath.system\x93(S'touch {}'\ntR.",
    "reconstructor": b"ccopy_reg\n_reconstructor\n(cos\nsystem\nc__builtin__\nobject\nNtR}b.",
    "newobj function": b"ccopy_reg\n__newobj__\n(cos\nsystem\nS'touch {}'\ntR.",
    "append, set, add": b"cos\nsystem\n)R(K\x01K\x02eK\x03aS'k'\nK\x04s(S'l'\nK\x05u.",
    "add items": b"\x80\x04cos\nsystem\n)R(K\x01K\x02\x90.",
    "state of slots": b"cos\nsystem\n)R(}}S'system'\nK\x01stb.",
}


@pytest.mark.parametrize("name", list(OPS))
def test_opcodes_only_record(tmp_path, name):
    marker = tmp_path / "marker"
    body = OPS[name].replace(b"{}", str(marker).encode())
    # The object is made and dropped, then comes a state dict, so that all is read.
    data = body[:-1] + b"0" + entries_of({"w": torch.ones(2)}, tmp_path)
    pack(tmp_path / "a.pt", data, [struct.pack("<2f", 1, 1)])
    assert torch.equal(harvest(tmp_path / "a.pt").tensors["w"], torch.ones(2))
    assert not marker.exists()


def entries_of(saved, tmp_path):
    torch.save(saved, tmp_path / "entries.pt")
    return entries(tmp_path / "entries.pt")["data.pkl"]


def read(data, tmp_path):
    """What the pickle `data` gives, also where it is no checkpoint."""
    with open(pack(tmp_path / "a.pt", data), "rb") as file:
        return unpickle._Reader(unpickle._Archive("a.pt", file)).load()


def test_inert_keeps_what_it_was_given(tmp_path):
    value = read(OPS["append, set, add"], tmp_path)
    assert isinstance(value, Inert) and (value.path, value.args) == ("os.system", ())
    assert value.items == [1, 2, 3, ("k", 4), ("l", 5)]
    value = read(OPS["call a result, build it"], tmp_path)
    assert value.path == "builtins.getattr()" and value.args[0].startswith("touch")
    assert value.state == {"a": 1}
    assert repr(value) == "Inert('builtins.getattr()')"


@pytest.mark.parametrize(
    "target",
    [
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"ccollections\nOrderedDict\n",
        b"ccollections\nOrderedDict\n)R",
        b"ctorch\nfloat16\n",
        b"c__builtin__\nset\n",
        b"]",
        b"S'x'\n",
    ],
)
@pytest.mark.parametrize("change", [b"}S'keys'\nNsb", b"N}S'keys'\nNs\x86b", b"K\x01a", b"NNs"])
def test_what_is_understood_cannot_be_changed(tmp_path, target, change):
    torch.save({"w": torch.ones(2)}, tmp_path / "good.pt")
    known = dict(unpickle._KNOWN)
    try:
        read(b"\x80\x02" + target + change + b".", tmp_path)
    except CheckpointError as error:
        assert "pickle in a.pt is damaged" in str(error)
    assert known == unpickle._KNOWN
    assert list(harvest(tmp_path / "good.pt").tensors) == ["w"]


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04\x82\x01.",
        b"c__builtin__\nbytearray\n(J\xff\xff\xff\x7ftR.",
        b"c__builtin__\nlist\n(c__builtin__\nrange\n(J\xff\xff\xff\x7ftRtR.",
        b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x80\x05\x97.",
        b"\x80\x63.",
        b"S'x'\nQ.",
        b"Pname\n.",
        b"}]Ns.",
        b"K\x01)R.",
        b"cos\nsystem\nNR.",
        b"h\x09.",
        b"0.",
        b"]" * 10 + b"(((",
        b"",
    ],
)
def test_damaged_pickles(tmp_path, data):
    with pytest.raises(CheckpointError, match=r"pickle in .* is damaged .*download the file again"):
        harvest(pack(tmp_path / "a.pt", data))


def test_deep_nesting(tmp_path):
    saved = model = nn.Module()
    data = entries_of(model, tmp_path)
    assert harvest(pack(tmp_path / "a.pt", data)).tensors == {}
    for _ in range(300):
        saved._modules["m"] = nn.Module()
        saved = saved._modules["m"]
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    try:
        data = entries_of(model, tmp_path)
    finally:
        sys.setrecursionlimit(limit)
    frame, depth = sys._getframe(), 0
    while frame is not None:
        frame, depth = frame.f_back, depth + 1
    sys.setrecursionlimit(depth + 150)
    try:
        with pytest.raises(CheckpointError, match=r"RecursionError"):
            harvest(pack(tmp_path / "a.pt", data))
    finally:
        sys.setrecursionlimit(limit)


# Tensors that lie.


def tensor_pickle(
    size=(2, 2), stride=(2, 1), offset=0, numel=4, storage="FloatStorage", key="0", extra=()
):
    """A state dict with one tensor, written as torch.save does."""

    class Rebuild:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (Store(), offset, size, stride, False, *extra)

    class Store:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            if not isinstance(obj, Store):
                return None
            kind = getattr(torch, storage) if isinstance(storage, str) else storage
            return ("storage", kind, key, "cpu", numel)

    out = io.BytesIO()
    Pickler(out, 2).dump({"w": Rebuild()})
    return out.getvalue()


def test_the_honest_tensor(tmp_path):
    path = pack(tmp_path / "a.pt", tensor_pickle(), [struct.pack("<4f", 1, 2, 3, 4)])
    assert harvest(path).tensors["w"].tolist() == [[1, 2], [3, 4]]
    # Files of before 2.1 do not tell.
    pack(path, tensor_pickle(), [struct.pack("<4f", 1, 2, 3, 4)], byteorder=None)
    assert harvest(path).tensors["w"].tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("lie", "match"),
    [
        ({"size": (3, 2)}, "tensor lies outside its storage.*size \\[3, 2\\].*16 bytes"),
        ({"offset": 1}, "tensor lies outside its storage.*offset 1"),
        ({"offset": -1}, "tensor lies outside its storage.*offset -1"),
        ({"stride": (-2, 1)}, "tensor lies outside its storage"),
        ({"size": (-2, 2)}, "tensor lies outside its storage"),
        ({"size": (0, 2), "offset": 5}, "tensor lies outside its storage"),
        ({"size": (2**62, 2**62), "stride": (2**62, 1)}, "tensor lies outside its storage"),
        ({"size": (2**62, 2**62), "stride": (0, 0)}, "damaged"),
        ({"stride": (2**70, 1)}, "tensor lies outside its storage"),
        ({"size": (1,) * 200, "stride": (2**70,) * 200}, "damaged"),
        ({"numel": 5}, "storage '0' is too short: 16 bytes where 20 are needed"),
        ({"numel": 2**70}, "storage '0' is too short"),
        ({"numel": 3}, "tensor lies outside its storage.*12 bytes"),
        ({"numel": -1}, "persistent id"),
        ({"numel": True}, "persistent id"),
        ({"key": "7"}, "storage '7' is missing"),
        ({"key": "../data.pkl"}, "is missing"),
        ({"key": 0}, "persistent id"),
        ({"storage": "DoubleStorage"}, "storage '0' is too short: 16 bytes where 32"),
        ({"storage": "QInt8Storage"}, "unknown type 'torch.QInt8Storage'; known are .*torch.Float"),
        ({"storage": os.system}, "unknown type '(posix|nt).system'"),
        ({"storage": 3}, "unknown type 'int'"),
        ({"size": 4}, "pickle in .* is damaged"),
        ({"size": (4,)}, "pickle in .* is damaged"),
        ({"size": ("2", 2)}, "pickle in .* is damaged"),
        ({"offset": None}, "pickle in .* is damaged"),
        ({"offset": 1.0}, "pickle in .* is damaged"),
    ],
)
def test_tensors_outside_their_storage(tmp_path, lie, match):
    path = pack(tmp_path / "a.pt", tensor_pickle(**lie), [struct.pack("<4f", 1, 2, 3, 4)])
    with pytest.raises(CheckpointError, match=match):
        harvest(path)


# Damaged and other files.


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(CheckpointError, match=r"no such file.*nothing.pt; check the path"):
        harvest(tmp_path / "nothing.pt")
    with pytest.raises(CheckpointError, match=r"is a directory; give the file"):
        harvest(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(CheckpointError, match=r"not a regular file"):
            harvest(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is empty; .*torch >= 1.6"),
        (b"just text\n", "is not a zip; .*torch.load where its code is trusted.*safetensors"),
        (b"PK\x03\x04 and then nothing of the sort", "truncated or damaged zip"),
        (pickle.dumps({"a": 1}), "is not a zip"),
    ],
)
def test_other_files(tmp_path, content, match):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=match):
        harvest(tmp_path / "a.pt")


def test_legacy_format(tmp_path):
    saved = {"w": torch.ones(2)}
    torch.save(saved, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"legacy format of torch before 1.6.*safetensors"):
        harvest(tmp_path / "a.pt")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript(tmp_path):
    class Twice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    torch.jit.save(torch.jit.script(Twice()), str(tmp_path / "a.pt"))
    with pytest.raises(CheckpointError, match=r"TorchScript archive"):
        harvest(tmp_path / "a.pt")


def test_zip_without_pickle(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("folder/model.pt", b"x")
    with pytest.raises(CheckpointError, match=r"no <root>/data.pkl"):
        harvest(tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "a.zip", "w"):
        pass
    with pytest.raises(CheckpointError, match=r"no <root>/data.pkl"):
        harvest(tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a/data.pkl", b"N.")
        archive.writestr("b/data.pkl", b"N.")
    with pytest.raises(CheckpointError, match=r"2 <root>/data.pkl"):
        harvest(tmp_path / "a.zip")


def test_byteorder(tmp_path):
    path = pack(tmp_path / "a.pt", tensor_pickle(), [bytes(16)], byteorder=b"big")
    with pytest.raises(CheckpointError, match=r"is big-endian.*only little-endian"):
        harvest(path)
    path = pack(tmp_path / "a.pt", tensor_pickle(), [bytes(16)], byteorder=b"middle")
    with pytest.raises(CheckpointError, match=r"byteorder is 'middle'"):
        harvest(path)


def test_compressed_and_duplicated_entries(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", tensor_pickle())
    with pytest.raises(CheckpointError, match=r"a/data.pkl is compressed or encrypted.*zip -0"):
        harvest(tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt", "w") as archive,
        pytest.warns(UserWarning, match=r"Duplicate"),
    ):
        archive.writestr("a/data.pkl", tensor_pickle())
        archive.writestr("a/data.pkl", b"N.")
    with pytest.raises(CheckpointError, match=r"two entries of one name"):
        harvest(tmp_path / "a.pt")


def test_checksum_of_the_pickle(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"weight": torch.ones(2)}, path)
    path.write_bytes(path.read_bytes().replace(b"weight", b"weighs", 1))
    with pytest.raises(CheckpointError, match=r"checksum of a/data.pkl"):
        harvest(path)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"weight": torch.ones(2)}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert list(harvest(path).tensors) == ["weight"]


def test_truncated_files(tmp_path, foreign):
    path, _ = foreign(lambda module: {"model": module.Model(), "tokenizer": module.Tokenizer()})
    whole = path.read_bytes()
    for length in (*range(1, 70, 7), *range(100, len(whole) - 1, len(whole) // 40), len(whole) - 1):
        path.write_bytes(whole[:length])
        match = "not a zip" if length == 1 else "truncated or damaged zip"
        with pytest.raises(CheckpointError, match=match):
            harvest(path)


def test_truncated_pickles(tmp_path, foreign):
    path, _ = foreign(lambda module: module.Model())
    data = entries(path)["data.pkl"]
    for length in range(0, len(data), len(data) // 60):
        with pytest.raises(CheckpointError, match=r"pickle in .* is damaged"):
            harvest(repack(path, data[:length]))


@pytest.mark.parametrize("part", ["pickle", "file"])
def test_flipped_bytes(tmp_path, foreign, part):
    marker = tmp_path / "marker"

    def make(module):
        model = module.Model()
        model.evil = evils(marker)["setstate"]
        return {"model": model, "tokenizer": module.Tokenizer(), "evil": evils(marker)["system"]}

    path, _ = foreign(make)
    whole = path.read_bytes()
    data = entries(path)["data.pkl"]
    random_ = random.Random(7)
    outcomes = set()
    for position in random_.sample(range(len(data if part == "pickle" else whole)), 200):
        changed = bytearray(data if part == "pickle" else whole)
        changed[position] ^= random_.randrange(1, 256)
        path.write_bytes(whole if part == "pickle" else changed)
        if part == "pickle":
            repack(path, bytes(changed))
        try:
            result = harvest(path)
        except CheckpointError:
            outcomes.add("refused")
        else:
            outcomes.add("read")
            # Whatever was read lies in the file's memory.
            assert all(
                t.contiguous().view(-1).tolist() is not None for t in result.tensors.values()
            )
    assert outcomes == {"refused", "read"}
    assert not marker.exists()


def test_what_lies_beside_the_model(tmp_path):
    """Data is taken, objects and classes are left out, and nothing of them is called."""

    class Hostile:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'ran'}",))

    scales = torch.arange(3.0)
    data = {"scales": scales, "meta": {"bits": 8, 3: [1, None, "x", scales]}, "loop": []}
    data["loop"].append(data)
    file = tmp_path / "model.pt"
    saved = {
        "model": {"w": torch.ones(2)},
        "info": data,
        "tokenizer": Hostile(),
        "kind": torch.nn.Linear,
    }
    torch.save(saved, file)
    found = harvest(file)
    assert set(found.tensors) == {"w"} and set(found.beside) == {"info"}
    info = found.beside["info"]
    assert torch.equal(info["scales"], scales) and info["meta"]["bits"] == 8 and info["loop"] == []
    assert info["meta"]["3"][:3] == [1, None, "x"] and torch.equal(info["meta"]["3"][3], scales)
    assert not (tmp_path / "ran").exists()
    torch.save({"w": torch.ones(2), "info": data}, file)
    assert harvest(file).beside == {}
