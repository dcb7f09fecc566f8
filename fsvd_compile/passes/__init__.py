"""The pipeline: every rewrite in the order it runs. README.md beside this file has the table and the invariants."""

from fsvd_compile.passes.attention import ATTENTION
from fsvd_compile.passes.carried import CARRIED
from fsvd_compile.passes.decode import DECODE
from fsvd_compile.passes.dense import DENSE
from fsvd_compile.passes.epilogue import EPILOGUE
from fsvd_compile.passes.lower import lower
from fsvd_compile.passes.lowrank import LOWRANK
from fsvd_compile.passes.normalize import NORMALIZE
from fsvd_compile.passes.rewrite import Context, Outcome, Rewrite, run

PIPELINE: tuple[Rewrite, ...] = (
    *NORMALIZE,  # first: everything after it knows one spelling
    *LOWRANK,  # chains, then siblings: packing needs the pairs
    *DENSE,  # what no chain and no group has taken
    *EPILOGUE,  # gated before plain activation, norms after packing (one reader), residuals last
    *CARRIED,  # behind residuals and norms, which it joins
    *ATTENTION,  # RoPE and append before attention: the append leaves the caches themselves as operands
    *DECODE,  # the two before it, joined
)

__all__ = ["PIPELINE", "Context", "Outcome", "Rewrite", "lower", "run"]
