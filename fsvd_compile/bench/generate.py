"""`model.generate` of a factorized language model, host included: ours beside eager and transformers' own compilation.

A call is a whole greedy `generate`: prompt, new tokens, and all that the host does for them. Weights are random
where no checkpoint is needed, as in `decode`, and no sequence ends early.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fsvd_compile.bench import decode, models
from fsvd_compile.bench.stopwatch import Row, listed, measure
from fsvd_compile.errors import BenchError
from fsvd_compile.table import aligned

# Per peer: the backend of `torch.compile`, or None for the model as it is, and arguments of `generate`.
PEERS: Mapping[str, tuple[str | None, Mapping[str, Any]]] = {
    "eager": (None, {}),
    # On a GPU this compiles the decode step with Inductor, mode="reduce-overhead".
    "transformers-static": (None, {"cache_implementation": "static"}),
    "flashsvd": ("flashsvd", {}),
    "flashsvd-static": ("flashsvd", {"cache_implementation": "static"}),
}
UNTIMED = 5  # calls before the timing: compile, warm up, capture prompt and step, replay


@dataclasses.dataclass(frozen=True)
class Setting:
    """What to measure; each field is an argument of `fsvd-compile bench generate`.

    Attributes:
        new: New tokens of each sequence.
        peers: Keys of `PEERS`.
        rounds: Timed calls per peer.
        model, keep, round, batch, context, device: As in `decode.Setting`; the context is the prompt.

    Raises:
        BenchError, FactorizeError: a field is outside what is allowed.
    """

    model: str | None = None
    keep: float = 0.5
    round: int = 16
    batch: int = 1
    context: int = 512
    new: int = 128
    peers: Sequence[str] = ("eager", "transformers-static", "flashsvd")
    device: str = "cpu"
    rounds: int = 5

    def __post_init__(self) -> None:
        decode.check_peers(self.peers, PEERS)
        object.__setattr__(self, "peers", tuple(dict.fromkeys(self.peers)))
        for name in ("new", "rounds"):
            if getattr(self, name) < 1:
                raise BenchError(f"{name}={getattr(self, name)}; it has to be at least 1.")
        object.__setattr__(self, "model", self.subject.model)

    @property
    def subject(self) -> decode.Setting:
        """The same model and text for `decode`, which checks them."""
        return decode.Setting(
            model=self.model, keep=self.keep, round=self.round, batch=self.batch,
            context=self.context, cache=self.context + max(self.new, decode.FIRST),
            peers=("eager",), device=self.device, rounds=1, calls=1,
        )  # fmt: skip


def run(setting: Setting, say: Callable[[str], None] = lambda line: None) -> list[Row]:
    """Runs every peer a few times, then times all of them in turns.

    Args:
        setting: What to measure.
        say: Called with a line of text for each peer before the timing; minutes may lie in between.

    Returns:
        One row per peer, of whole calls by the wall clock. `extra` holds `ms_per_token` (of a sequence: the
        median over the new tokens, prompt included), `first_calls_s` (the calls before the timing: compilation,
        captures, first replays) and `agrees`, the share of new tokens equal to the first peer's.

    Raises:
        BenchError: transformers is missing, or the model cannot be loaded or measured this way.
    """
    torch.manual_seed(0)
    subject = setting.subject
    model = models.build(subject, setting.keep)
    vocabulary = model.config.get_text_config().vocab_size
    prompt = torch.randint(1, vocabulary, (setting.batch, setting.context), device=model.device)
    calls = {name: _call(model, prompt, setting, *PEERS[name]) for name in setting.peers}
    first, found = None, {}
    for name, call in calls.items():
        seconds = []
        for _ in range(UNTIMED):
            started = time.perf_counter()
            tokens = call()[:, setting.context :].cpu()
            seconds.append(round(time.perf_counter() - started, 4))
        first = tokens if first is None else first
        agrees = (tokens == first).double().mean().item()
        found[name] = {"first_calls_s": seconds, "agrees": round(agrees, 4)}
        say(f"{name:<20} calls {_seconds(seconds)}, {agrees:.0%} of the tokens agree")
    rows = measure(
        calls, device=model.device, tokens=setting.batch * setting.new, rounds=setting.rounds,
        calls=1, warmup=0, timer="wall", phase="generate", model=setting.model, keep=setting.keep,
        rank_multiple=setting.round if setting.keep < 1 else None, batch=setting.batch,
        context=setting.context, new=setting.new, dtype=subject.dtype,
    )  # fmt: skip
    return [
        dataclasses.replace(
            row, extra=found[row.name] | {"ms_per_token": round(row.median_ms / setting.new, 4)}
        )
        for row in rows
    ]


def table(rows: Sequence[Row]) -> str:
    """Aligned text for what `run` returns; speed-ups are over the first row."""
    cells = [("", "ms a token", "whole call ms", "p20..p80", "tokens/s", "speed-up")]
    for row in rows:
        cells.append(
            (
                row.name,
                f"{row.extra['ms_per_token']:.3f}",
                f"{row.median_ms:.1f}",
                f"{row.p20_ms:.1f}..{row.p80_ms:.1f}",
                f"{row.tokens_per_s:,.1f}",
                f"{rows[0].median_ms / row.median_ms:.2f}x",
            )
        )
    return "\n".join([listed(rows[0].conditions), *aligned(cells)])


def _seconds(seconds: Sequence[float]) -> str:
    return ", ".join(f"{s:.2f}" for s in seconds) + " s"


def _call(
    model: nn.Module,
    prompt: torch.Tensor,
    setting: Setting,
    backend: str | None,
    how: Mapping[str, Any],
) -> Callable[[], torch.Tensor]:
    runner = model if backend is None else torch.compile(model, backend=backend)

    def call() -> torch.Tensor:
        return runner.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=setting.new,
            min_new_tokens=setting.new, do_sample=False, pad_token_id=0, **how,
        )  # fmt: skip

    return call
