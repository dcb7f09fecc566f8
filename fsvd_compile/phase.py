"""Which kind of work a call is, by how many tokens M it brings: a table, never a flag."""

from __future__ import annotations

import enum


class Phase(enum.Enum):
    """The regimes of a linear layer y = W x for M tokens."""

    DECODE = "decode"  # GEMV: every weight byte is used once or twice, bound by memory
    FEW = "few"  # skinny GEMM on tensor cores: still bound by reading the weights
    PREFILL = "prefill"  # GEMM: bound by arithmetic


# (most tokens, phase), first row that fits. Batch, sequence and continuous batching's packed tokens all
# count alike: what matters to a weight is how many rows multiply it. 64 rows is where an H200's bf16
# tensor cores stop being free beside the weight read: 2·M flop per 2-byte weight against 206 flop per
# byte (790 TFLOP/s over 4.6 TB/s would be M = 172; skinny tiles reach about a third of that rate).
TABLE: tuple[tuple[float, Phase], ...] = (
    (2, Phase.DECODE),  # two tokens of streamed weights go with the few, see `kernels._linear`
    (64, Phase.FEW),
    (float("inf"), Phase.PREFILL),
)


def phase_of(tokens: int) -> Phase:
    """The phase of a call with `tokens` rows (M = product of all leading dimensions)."""
    return next(phase for most, phase in TABLE if tokens <= most)
