"""`torch.compile(model, backend="flashsvd").generate(...)` reaches the compiled model.

`torch.compile` returns an `OptimizedModule` that looks every unknown attribute up on the original model, so that
`generate` there is bound to the original and calls it uncompiled. For modules compiled by this backend, and for no
other, the attribute is wrapped: while it runs, the original's `__call__` is the compiled one, exactly as after
`model.compile(backend="flashsvd")`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch._dynamo.eval_frame import OptimizedModule

_MARK = "_fsvd_reaches_compiled"


def reach_compiled(is_ours: Callable[[Any], bool]) -> None:
    """Teach `OptimizedModule` the lookup above, once per process.

    Args:
        is_ours: Whether a Dynamo callback belongs to this backend.
    """
    if getattr(OptimizedModule.__getattr__, _MARK, False):
        return
    plain_getattr = OptimizedModule.__getattr__

    @functools.wraps(plain_getattr)
    def getattr_(self: OptimizedModule, name: str) -> Any:
        value = plain_getattr(self, name)
        if name == "generate" and callable(value) and is_ours(self.dynamo_ctx.callback):
            return _through_compiled(self, value)
        return value

    setattr(getattr_, _MARK, True)
    OptimizedModule.__getattr__ = getattr_


def _through_compiled(compiled: OptimizedModule, generate: Callable) -> Callable:
    model = compiled._orig_mod

    @functools.wraps(generate)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        before = model._compiled_call_impl
        if before is None:
            model._compiled_call_impl = compiled.dynamo_ctx(model._call_impl)
        try:
            return generate(*args, **kwargs)
        finally:
            model._compiled_call_impl = before

    return wrapped
