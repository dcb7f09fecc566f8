"""How often a bf16 model picks the fp32 model's next token: SmolLM2-135M-Instruct, factorized, eager and compiled.

    python bench/agreement.py --json bench/results/agreement_smollm2_h200.json

Every prompt is the beginning of a held-out Wikipedia lead. The fp32 model, run eagerly, continues it greedily; each
bf16 peer is fed those tokens, one step at a time, and asked for the next one, so that one early difference is counted
once. Needs the packages of the demo (`make .venv/.demo`).
"""

from __future__ import annotations

import argparse
import copy

import quality  # finds the modules of examples/, too
import smollm2
import torch
from transformers import StaticCache

import fsvd_compile
from fsvd_compile import bench
from fsvd_compile.kept_cache import argument


def main() -> None:
    args = _arguments()
    device = torch.device(args.device)
    dense, tokenizer = quality.loaded(device)
    prompts = beginnings(tokenizer, args.prompts, args.prompt).to(device)
    calibration = smollm2.windows(tokenizer, args.calibration, 512).split(8)
    rows = []
    for keep in args.keep:
        gold = copy.deepcopy(dense)
        if keep < 1:
            fsvd_compile.factorize(
                gold, keep, calibration=calibration, allocation="loss", progress=False
            )
        tokens, _ = follow(gold, prompts, args.new)
        narrow = copy.deepcopy(gold).to(torch.bfloat16)
        peers = {"eager": narrow, "flashsvd": torch.compile(narrow, backend="flashsvd")}
        for name, model in peers.items():
            own, error = follow(model, prompts, args.new, tokens)
            agrees = (own == tokens).double().mean().item()
            rows.append({"name": name, "keep": keep, "agreement": agrees, "mean_log_loss": error})
            print(
                f"{name:<10} keep {keep:.2f}  {agrees:8.2%}  log-loss of the gold token {error:.5f}"
            )
    where = bench.conditions(
        device, prompts=args.prompts, prompt=args.prompt, new=args.new,
        calibration=args.calibration, dtype=torch.bfloat16,
    )  # fmt: skip
    quality.store(rows, args.json, where)


def beginnings(tokenizer, count: int, length: int) -> torch.Tensor:
    """The first tokens of held-out leads that are longer, `[count, length]`."""
    found = []
    for article in smollm2.articles(held_out=True):
        ids = tokenizer(article["extract"]).input_ids
        if len(ids) > length:
            found.append(ids[:length])
        if len(found) == count:
            return torch.tensor(found)
    raise SystemExit(f"only {len(found)} leads are longer than {length} tokens; {count} are needed")


@torch.no_grad()
def follow(
    model, prompts: torch.Tensor, new: int, forced: torch.Tensor | None = None
) -> tuple[torch.Tensor, float]:
    """The model's choices `[P, new]` after each prompt, one prompt at a time through a static KV cache.

    Args:
        model: Eager or compiled.
        prompts: Of shape `[P, T]`.
        new: Steps after a prompt.
        forced: Tokens to go on with, `[P, new]`, instead of the model's own.

    Returns:
        The choices, and the mean negative log-likelihood of the tokens that it went on with.
    """
    choices = torch.empty(len(prompts), new, dtype=torch.long, device=prompts.device)
    loss = 0.0
    cache = StaticCache(config=model.config, max_cache_len=prompts.shape[1] + new)
    given = {argument(getattr(model, "_orig_mod", model)): cache, "use_cache": True}
    for row, prompt in enumerate(prompts):
        cache.reset()
        model(prompt[None, :-1], logits_to_keep=1, **given)
        token = prompt[None, -1:]
        for step in range(new):
            logits = model(token, **given).logits[:, -1].float()
            choices[row, step] = logits.argmax()
            follows = choices if forced is None else forced
            token = follows[row, step].view(1, 1)
            loss += torch.nn.functional.cross_entropy(logits, token[0]).item()
    return choices, loss / choices.numel()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--keep", type=float, nargs="+", default=[0.8], help="about 100 s each (default 0.8)")
    add("--prompts", type=int, default=20)
    add("--prompt", type=int, default=33, help="tokens of a prompt (default 33)")
    add("--new", type=int, default=64, help="tokens after it (default 64)")
    add("--calibration", type=int, default=64, help="windows of 512 tokens (default 64)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--json", metavar="FILE")
    return parser.parse_args()


if __name__ == "__main__":
    main()
