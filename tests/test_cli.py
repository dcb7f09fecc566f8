"""The command: what a user types, what is printed and stored, and what is said when it cannot be done."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tomllib

import pytest
import torch
import transformers

from fsvd_compile import LowRankLinear, cli
from fsvd_compile.bench import decode, generate, models, tune
from fsvd_compile.errors import BenchError, WrongResultError

ROOT = pathlib.Path(__file__).parent.parent
QUICK = ["--context", "8", "--cache", "16", "--rounds", "2", "--calls", "3", "--device", "cpu"]


@pytest.fixture(autouse=True)
def one_thread():
    """Small products on several threads wait for each other for long on cores with other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def quick(monkeypatch):
    """`fsvd-compile bench decode` on a CPU, without the second that the read limit takes."""
    monkeypatch.setattr(decode, "read_limit", lambda device: 1e10)
    return lambda *args: cli.main(["bench", "decode", *QUICK, *map(str, args)])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> pathlib.Path:
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        attention_bias=True,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def rows_of(path: pathlib.Path) -> dict[tuple[str, str], dict]:
    entries = json.loads(path.read_text())
    rows = {(e["name"], e["conditions"]["timer"]): e for e in entries}
    assert len(rows) == len(entries)
    return rows


def test_generate_end_to_end(tmp_path, capsys):
    path = tmp_path / "rows.json"
    args = ["--model", "tiny", "--context", "8", "--new", "6", "--rounds", "2", "--device", "cpu"]
    args += ["--peers", "eager,flashsvd-static", "--json", str(path)]
    assert cli.main(["bench", "generate", *args]) == 0
    out = capsys.readouterr().out
    assert "100% of the tokens agree" in out and "speed-up" in out
    rows = rows_of(path)
    assert list(rows) == [("eager", "wall"), ("flashsvd-static", "wall")]
    for entry in rows.values():
        assert entry["tokens"] == 6 and entry["conditions"]["new"] == 6
        assert entry["ms_per_token"] == pytest.approx(entry["median_ms"] / 6, abs=1e-3)
        assert len(entry["first_calls_s"]) == generate.UNTIMED and entry["agrees"] == 1


@pytest.mark.parametrize(
    "args, words",
    [
        (["--peers", "eager,nobody"], "'nobody'"),
        (["--peers", ","], "none given"),
        (["--new", "0"], "new=0"),
        (["--rounds", "0"], "rounds=0"),
        (["--keep", "1.5"], "keep"),
        (["--model", "no/such"], "neither one of"),
    ],
)
def test_generate_refuses(args, words, capsys):
    assert cli.main(["bench", "generate", "--device", "cpu", *args]) == 2
    assert words in capsys.readouterr().err


def test_decode_end_to_end(tmp_path, capsys):
    path = tmp_path / "rows.json"
    args = ["--model", "tiny", "--peers", "eager,flashsvd-off", "--json", str(path)]
    assert cli.main(["bench", "decode", *QUICK, *args]) == 0
    out = capsys.readouterr().out
    assert "read limit" in out and "relative RMS to fp32" in out and "speed-up" in out
    rows = rows_of(path)
    assert list(rows) == [(n, t) for n in ("eager", "flashsvd-off") for t in ("wall", "event")]
    model = models.build(decode.Setting(), 0.5)
    table = model.get_input_embeddings().weight
    read = 4 * (sum(p.numel() for p in model.parameters()) - table.numel())
    read += 2 * 2 * 4 * 4 * 32 * 8  # keys and values: layers, KV heads, head size, tokens
    for entry in rows.values():
        found = entry["conditions"]
        expected = {
            "model": "tiny", "keep": 0.5, "rank_multiple": 16, "batch": 1, "context": 8,
            "cache": 16, "dtype": "float32", "bytes": read, "phase": "decode", "block": 3,
            "torch": torch.__version__, "transformers": transformers.__version__,
        }  # fmt: skip
        assert expected.items() <= found.items()
        assert 0 < entry["p20_ms"] <= entry["median_ms"] <= entry["p80_ms"]
        assert entry["calls"] == 6 and entry["tokens"] == 1
        assert entry["tb_s"] == pytest.approx(read / entry["median_ms"] / 1e9, abs=1e-6)
        share = entry["limit_ms"] / entry["median_ms"]
        assert entry["share_of_limit"] == pytest.approx(share, rel=0.05, abs=1e-3)
        assert entry["limit_ms"] == pytest.approx(read / entry["read_limit_tb_s"] / 1e9, rel=0.02)
        assert entry["error"] <= decode.FLOOR and entry["first_call_s"] > 0


def test_peers_apart(quick, tmp_path, capsys, monkeypatch):
    """Each in a process of its own, which has nothing of what was done to this one."""
    monkeypatch.setattr(decode, "Subject", None)
    path = tmp_path / "rows.json"
    assert quick("--peers", "eager,dense-eager", "--apart", "--json", path) == 0
    out = capsys.readouterr().out
    assert out.count("read limit") == 2 and "speed-up" in out
    rows = rows_of(path)
    assert list(rows) == [(n, t) for n in ("eager", "dense-eager") for t in ("wall", "event")]
    assert [e["conditions"]["keep"] for e in rows.values()] == [0.5, 0.5, 1, 1]
    for entry in rows.values():
        assert entry["conditions"]["apart"] is True and entry["median_ms"] > 0
        assert entry["error"] <= decode.FLOOR and entry["read_limit_tb_s"] != 0.01


def killed(setting):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_peer_that_is_killed(quick, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(decode, "_alone", killed)
    path = tmp_path / "rows.json"
    assert quick("--peers", "eager,dense-eager", "--apart", "--json", path) == 2
    message = capsys.readouterr().err
    assert "'eager' was killed" in message and "--skip-check" in message
    assert not path.exists()


def test_errors_of_peers_apart(tmp_path):
    """They are those of one process."""
    (tmp_path / "config.json").write_text("{}")
    setting = decode.Setting(str(tmp_path), peers=("eager", "flashsvd-off"), apart=True)
    with pytest.raises(BenchError, match="from_pretrained cannot load it"):
        decode.run(setting)


@pytest.mark.gpu
def test_decode_on_a_gpu(tmp_path):
    path = tmp_path / "rows.json"
    args = ["bench", "decode", "--model", "tiny", "--peers", "eager,flashsvd-step", "--rounds", "2"]
    assert cli.main([*args, "--device", "cuda", "--json", str(path)]) == 0
    for entry in rows_of(path).values():
        assert entry["conditions"]["dtype"] == "bfloat16" and entry["conditions"]["cuda"]
        assert entry["peak_over_weights_kv_gb"] >= 0 and entry["error"] > 0


def test_json_is_added_to(quick, tmp_path):
    path = tmp_path / "rows.json"
    for batch in (1, 2, 2):
        assert quick("--peers", "eager", "--batch", batch, "--json", path) == 0
    found = [
        (e["conditions"]["batch"], e["conditions"]["timer"]) for e in json.loads(path.read_text())
    ]
    assert found == [(1, "wall"), (1, "event"), (2, "wall"), (2, "event")]


def test_dense_peers(quick, tmp_path, monkeypatch):
    """Of the same shape, checked against dense eager, with their own share and bytes."""
    monkeypatch.setitem(
        decode.PEERS, "dense-flashsvd", decode.Peer({"backend": "eager"}, dense=True)
    )
    path = tmp_path / "rows.json"
    assert quick("--peers", "eager,dense-flashsvd", "--json", path) == 0
    rows = rows_of(path)
    low, dense = (rows[name, "wall"]["conditions"] for name in ("eager", "dense-flashsvd"))
    assert (low["keep"], dense["keep"], dense["rank_multiple"]) == (0.5, 1.0, None)
    assert low["bytes"] < 0.7 * dense["bytes"]
    assert quick("--peers", "dense-eager", "--skip-check", "--json", path) == 0
    assert rows_of(path)["dense-eager", "wall"]["error"] is None


def wrong_backend(gm, inputs):
    return lambda *args: tuple(1.02 * out for out in gm(*args))


@pytest.mark.parametrize("dense", [False, True])
def test_a_wrong_result_is_not_timed(quick, tmp_path, capsys, monkeypatch, dense):
    """Also where eager is not among the peers."""
    name = "dense-flashsvd" if dense else "flashsvd-off"
    monkeypatch.setitem(decode.PEERS, name, decode.Peer({"backend": wrong_backend}, dense))
    path = tmp_path / "rows.json"
    assert quick("--peers", name, "--json", path) == 1
    message = capsys.readouterr().err
    assert "WRONG" in message and f"{name} 2.000e-02 (eager 0.000e+00" in message
    assert not path.exists()
    assert quick("--peers", name, "--skip-check", "--json", path) == 0
    assert rows_of(path)[name, "wall"]["error"] is None


def test_a_wrong_later_step_is_found(quick, monkeypatch):
    """A step right at the first position only, as from a position baked into a CUDA graph."""

    def stuck(gm, inputs):
        kept = []
        return lambda *args: kept.append(gm(*args)) or kept[0]

    monkeypatch.setitem(decode.PEERS, "flashsvd-off", decode.Peer({"backend": stuck}))
    assert quick("--peers", "flashsvd-off") == 1


def test_errors_allowed():
    eager = dict.fromkeys(("inductor", "flashsvd-step", "flashsvd-layer"), 1e-2)
    fine = {"inductor": 1.0, "flashsvd-step": 1.09e-2, "flashsvd-layer": None}
    decode._check_errors(fine, eager)
    for error in (1.11e-2, float("nan"), float("inf")):
        with pytest.raises(WrongResultError, match=r"flashsvd-step .*allowed 1\.100e-02"):
            decode._check_errors(fine | {"flashsvd-step": error}, eager)


def test_a_checkpoint(quick, checkpoint, tmp_path):
    path = tmp_path / "rows.json"
    assert quick("--model", checkpoint, "--keep", 1, "--peers", "eager", "--json", path) == 0
    assert rows_of(path)["eager", "wall"]["conditions"]["model"] == str(checkpoint)
    own = transformers.AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    built = models.build(decode.Setting(checkpoint, keep=1), 1.0).state_dict()
    assert built.keys() == own.keys() and all(torch.equal(built[k], own[k]) for k in own)
    # Below 1 only the shapes are the checkpoint's, and biases, norms and the head.
    assert quick("--model", checkpoint, "--round", 1, "--peers", "eager") == 0
    model = models.build(decode.Setting(checkpoint, round=1), 0.5)
    layer = model.model.layers[0]
    assert isinstance(layer.self_attn.k_proj, LowRankLinear) and layer.self_attn.k_proj.rank == 5
    assert layer.mlp.up_proj.rank == 10  # int(0.5 * 64 * 32 / 96)
    assert torch.equal(layer.self_attn.k_proj.u.bias, own["model.layers.0.self_attn.k_proj.bias"])
    assert torch.equal(model.lm_head.weight, own["lm_head.weight"])


@pytest.mark.parametrize(("round", "attention", "mlp"), [(1, 819, 1194), (16, 816, 1184)])
def test_ranks(round, attention, mlp):
    """int(keep m n / (m + n)), rounded down, at keep 0.4 of LLaMA-7B."""
    model = models.shape("llama-7b")
    models.factorize_randomly(model, 0.4, round)
    layer = model.model.layers[31]
    assert layer.self_attn.q_proj.rank == attention and layer.mlp.down_proj.rank == mlp
    assert isinstance(model.lm_head, torch.nn.Linear)
    low = [m for m in model.modules() if isinstance(m, LowRankLinear)]
    assert len(low) == 32 * 7


def test_bytes_of_a_tied_head():
    model = models.shape("smollm2-135m")
    assert models.weight_bytes(model) == 4 * sum(p.numel() for p in model.parameters())
    untied = models.shape("tiny")
    every = sum(p.numel() for p in untied.parameters())
    assert models.weight_bytes(untied) == 4 * (every - 1000 * 256)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--peers", "eager,tensorrt"], "'tensorrt' given; allowed, comma-separated: eager, ind"),
        (["--peers", ","], "none given; allowed"),
        (["--peers", "dense-eager", "--keep", "1"], "Leave dense-* out"),
        (["--model", "gpt-5"], "'gpt-5' is neither one of llama-7b, llama3-8b, smollm2-135m, tiny"),
        (["--cache", "10"], "leaves 2 positions, and every call takes one: 4 are needed"),
        (["--cache", "16", "--calls", "8"], "9 are needed (a block of 1 untimed and 8 timed"),
        (["--cache", "4"], "Use a cache of at least 12, fewer calls"),
        (["--keep", "0"], "keep=0.0 is not a share"),
        (["--keep", "1.5"], "above 0 and at most 1"),
        (["--keep", "nan"], "keep=nan"),
        (["--keep", "0.01", "--round", "16"], "leave rank 0 for 'model.layers.0.self_attn.q_proj'"),
        (["--batch", "0"], "batch=0; it has to be at least 1"),
        (["--round", "-1"], "round=-1; it has to be at least 1"),
        (["--rounds", "0"], "rounds=0"),
        (["--device", "tpu"], "device='tpu'; it has to be cpu or cuda"),
        (["--json", "/nowhere/rows.json"], "there is no folder /nowhere"),
    ],
)
def test_what_is_refused(quick, capsys, args, message):
    assert quick(*args) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.startswith("fsvd-compile: ")


def test_a_device_that_is_not_there(quick, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert quick("--device", "cuda") == 2
    assert "torch sees no GPU" in capsys.readouterr().err


def test_positions_of_a_checkpoint(quick, checkpoint, capsys):
    assert quick("--model", checkpoint, "--round", 1, "--cache", 65) == 2
    assert "at most 64 positions" in capsys.readouterr().err


def test_a_directory_that_is_no_model(quick, tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "no such thing"}')
    assert quick("--model", tmp_path) == 2
    assert "from_pretrained cannot load it" in capsys.readouterr().err


def test_damaged_weights(quick, checkpoint, tmp_path, capsys):
    folder = shutil.copytree(checkpoint, tmp_path / "damaged")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert quick("--model", folder) == 2
    assert "from_pretrained cannot load it" in capsys.readouterr().err


def test_defaults_of_tune(capsys):
    with pytest.raises(SystemExit):
        cli.main(["tune", "--help"])
    assert f"default {tune.Setting.model})" in " ".join(capsys.readouterr().out.split())
    assert tune.Setting.model == "llama-7b"


def test_tune_looks_for_the_folder_first(monkeypatch, capsys):
    monkeypatch.setattr(tune, "run", lambda *args, **kwargs: pytest.fail("measured"))
    monkeypatch.setattr(
        decode, "_check_device", lambda device: None
    )  # a GPU is not needed for this
    monkeypatch.setattr(tune, "own_file", lambda: None)
    assert cli.main(["tune", "--model", "tiny", "--json", "/nowhere/rows.json"]) == 2
    assert "there is no folder /nowhere" in capsys.readouterr().err


def test_sliding_windows_are_refused():
    config = transformers.MistralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=16,
    )  # fmt: skip
    model = transformers.MistralForCausalLM(config)
    with pytest.raises(BenchError, match="StaticSlidingWindowLayer"):
        models.fill(model, torch.zeros(1, 4, dtype=torch.int64), 8)


def test_long_prompts_fill_the_cache_in_parts(checkpoint):
    model = models.build(decode.Setting(checkpoint, keep=1), 1.0)
    prompt = torch.randint(0, 97, (2, 600))
    parts = models.fill(model, prompt, 610)
    whole = transformers.StaticCache(config=model.config, max_cache_len=610)
    with torch.no_grad():
        model(prompt, past_key_values=whole)
    for part, expected in zip(parts.layers, whole.layers, strict=True):
        assert part.cumulative_length == 600
        torch.testing.assert_close(part.keys, expected.keys)
        torch.testing.assert_close(part.values, expected.values)
    assert models.kv_bytes(parts, 600) == 2 * 2 * 2 * 600 * 16 * 4


def test_without_transformers(quick, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert quick("--peers", "eager") == 2
    assert "pip install 'fsvd-compile[transformers]'" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["bench"], ["bench", "decode", "--no-such-option"]])
def test_usage(capsys, command):
    with pytest.raises(SystemExit) as stop:
        cli.main(command)
    assert stop.value.code == 2 and "usage: fsvd-compile" in capsys.readouterr().err


def test_help_needs_no_transformers():
    """In a process of its own, as `python -m fsvd_compile`."""
    code = (
        "import runpy, sys; sys.modules['transformers'] = None\n"
        "sys.argv = ['fsvd-compile', 'bench', 'decode', '--help']\n"
        "runpy.run_module('fsvd_compile', run_name='__main__')"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/",
        env={"PATH": "", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"},
    )  # fmt: skip
    for word in (*models.MODELS, *decode.PEERS, "--keep", "--json FILE", "819"):
        assert word in run.stdout


def test_console_script():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"fsvd-compile": "fsvd_compile.cli:main"}
