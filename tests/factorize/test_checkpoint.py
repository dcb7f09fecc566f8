"""`fsvd-compile factorize`: a model directory and a text in, the common format out."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from fsvd_compile import LowRankLinear, cli

WORDS = [f"w{i}" for i in range(60)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*WORDS, "?"])}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder)
    (folder / "text.txt").write_text(" ".join(WORDS[i * i % 60] for i in range(300)))
    return folder


def command(source, out, *more):
    return cli.main(["factorize", str(source), str(out), "--device", "cpu", *map(str, more)])


@pytest.mark.parametrize("allocation", [None, "uniform", "loss"])
def test_written_and_read(source, tmp_path, capsys, allocation):
    more = ["--allocation", allocation] if allocation else []
    text = ["--calibration", source / "text.txt", "--length", 32, "--windows", 5]
    assert command(source, tmp_path / "out", "--keep", 0.6, *text, *more) == 0
    assert "factorized" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ranks = {m.rank for m in model.modules() if isinstance(m, LowRankLinear)}
    assert ranks and (allocation == "uniform" or all(rank % 8 == 0 for rank in ranks))
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert command(source, tmp_path / "out", *text) == 2
    assert "exists" in capsys.readouterr().err


def test_stages(source, tmp_path, capsys):
    text = ["--calibration", source / "text.txt", "--length", 32, "--windows", 5, "--keep", 0.6]
    assert command(source, tmp_path / "fed", *text, "--feedback") == 0
    out = capsys.readouterr().out
    assert "feedback: " in out and "refined: " not in out
    assert command(source, tmp_path / "refined", *text, "--feedback", "--refine", 3) == 0
    assert "refined: " in capsys.readouterr().out
    models = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
        for name in ("fed", "refined")
    ]
    assert models[0].keys() == models[1].keys()


def test_plain_svd_needs_no_text(source, tmp_path):
    assert command(source, tmp_path / "out", "--keep", 0.5, "--dtype", "bfloat16") == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "more,says",
    [
        (["--keep", "1.5"], "keep=1.5"),
        (["--calibration", "nowhere.txt"], "cannot be read"),
        (["--allocation", "loss"], "needs calibration"),
        (["--feedback"], "needs calibration"),
        (["--refine", "3"], "needs feedback=True"),
        (["--feedback", "--refine", "0"], "steps=0"),
    ],
)
def test_bad_arguments(source, tmp_path, capsys, more, says):
    assert command(source, tmp_path / "out", *more) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_of_another_model(source, tmp_path, capsys):
    other = tmp_path / "model"
    shutil.copytree(source, other)
    words = Tokenizer(
        models.WordLevel({w: 40 + i for i, w in enumerate([*WORDS, "?"])}, unk_token="?")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(other)
    text = ["--calibration", source / "text.txt", "--length", 32, "--windows", 5]
    assert command(other, tmp_path / "out", *text) == 2
    assert "tokenizer belongs to another model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bad_source(tmp_path, capsys):
    assert command(tmp_path / "nowhere", tmp_path / "out") == 2
    assert "is no directory" in capsys.readouterr().err


def test_a_model_of_another_kind(source, tmp_path, capsys):
    """Its head would be dropped, and a random one written."""
    model = AutoModelForCausalLM.from_pretrained(source)
    model.model.save_pretrained(tmp_path / "base")
    assert command(tmp_path / "base", tmp_path / "out", "--keep", 0.6) == 2
    message = capsys.readouterr().err
    assert "has no lm_head.weight of a" in message and "with its own class" in message
    assert not (tmp_path / "out").exists()


def test_damaged_files(source, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    shutil.copytree(source, tmp_path / "model", dirs_exist_ok=True)
    file = tmp_path / "model/model.safetensors"
    file.write_bytes(file.read_bytes()[:300])
    assert command(tmp_path / "model", tmp_path / "out", "--keep", 0.6) == 2
    assert "cannot be loaded: SafetensorError" in capsys.readouterr().err


def test_a_device_that_nobody_knows_and_a_name_too_long(source, tmp_path, capsys):
    for out, more, says in (
        (tmp_path / "out", ["--device", "foo"], "device='foo' is none that torch knows"),
        (tmp_path / ("x" * 300), [], "could not be written"),
    ):
        assert command(source, out, "--keep", 0.6, *more) == 2
        assert says in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(source, tmp_path, capsys):
    assert command(source, tmp_path / "out", "--keep", 0.6, "--device", "cuda") == 2
    assert "torch sees no GPU" in capsys.readouterr().err
