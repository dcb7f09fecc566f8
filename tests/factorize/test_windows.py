"""Calibration windows from texts, lists and data sets; streams are read no further than they are needed."""

from __future__ import annotations

import types

import pytest
import tokenizers
import torch
import transformers
from torch import nn

from fsvd_compile import LowRankLinear, calibration_windows, factorize
from fsvd_compile.errors import FactorizeError


def tokenizer(text):
    """One token a character, and one in front."""
    return types.SimpleNamespace(input_ids=[1, *(ord(c) % 90 + 2 for c in text)])


def test_one_text():
    text = "x" * 299
    windows = calibration_windows(text, tokenizer, 64, 3)
    assert [w.shape for w in windows] == [(1, 64)] * 3
    assert all(w.dtype == torch.int64 for w in windows)
    joined = torch.cat(calibration_windows(text, tokenizer, 64, 99), 1)[0]
    assert joined.tolist() == tokenizer(text).input_ids[:256]
    with pytest.raises(FactorizeError, match="300 tokens, fewer than one window of 301"):
        calibration_windows(text, tokenizer, 301, 1)


@pytest.mark.parametrize(
    "as_given",
    [list, iter, lambda t: [{"text": s} for s in t], lambda t: ({"id": 1, "text": s} for s in t)],
)
def test_texts_and_rows_are_strung_together(as_given):
    texts = ["abc", "", "defgh", "ij"]
    (window,) = calibration_windows(as_given(texts), tokenizer, 13, 2)
    expected = [i for t in texts for i in tokenizer(t).input_ids]
    assert window[0].tolist() == expected[:13]


def test_a_stream_is_read_no_further_than_needed():
    read = []

    def endless():
        while True:
            read.append(1)
            yield {"body": "abcdefg"}

    windows = calibration_windows(endless(), tokenizer, 10, 4, column="body")
    assert len(windows) == 4 and len(read) == 5


@pytest.mark.parametrize(
    "texts, more, words",
    [
        ([], {}, "0 tokens, fewer"),
        ("long enough", {"length": 0}, "length=0"),
        ("long enough", {"count": 0}, "count=0"),
        (["fine", 3], {}, "text 1 is a int"),
        ([{"text": None}], {}, "text 0 is a NoneType"),
        ([{"body": "x"}], {}, "no 'text'; it has 'body'"),
        ([torch.ones(1, 4)], {}, "batches"),
    ],
)
def test_bad_input(texts, more, words):
    with pytest.raises(FactorizeError, match=words):
        calibration_windows(texts, tokenizer, **{"length": 8, "count": 2} | more)


def test_factorize_takes_them():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Embedding(96, 16), nn.Linear(16, 16)).eval()
    windows = calibration_windows(["some text", "and more of it"], tokenizer, 8, 2)
    factorize(model, 0.5, calibration=windows, progress=False)
    assert isinstance(model[1], LowRankLinear)


def test_a_text_longer_than_the_model_is_no_mistake(caplog):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    own = transformers.PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=5)
    with caplog.at_level("WARNING", "transformers"):
        (window,) = calibration_windows("a b " * 10, own, 20, 1)
    assert window.tolist() == [[0, 1] * 10] and not caplog.records
