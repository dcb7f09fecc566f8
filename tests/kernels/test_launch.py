"""What every launch tells Triton."""

from __future__ import annotations

import pytest
import torch
from opcases import Kernel

from fsvd_compile.kernels import _triton


@pytest.mark.parametrize("compiling", (False, True))
def test_products_and_sums_are_fused(monkeypatch, compiling):
    """As they were measured and tested, whatever this Triton's default is; unless the user chose one."""
    kernel, cpu = Kernel(), torch.device("cpu")

    def launched():
        if compiling:
            with _triton.compiling_only():
                _triton.launch(kernel, (3,), cpu, False, M=1)
        else:
            _triton.launch(kernel, (3,), cpu, False, M=1)
        return kernel.given[-1]

    monkeypatch.delenv("TRITON_DEFAULT_FP_FUSION", raising=False)
    assert launched() == {"USE_PDL": False, "grid": (3,), "M": 1, "enable_fp_fusion": True}
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    assert launched() == {"USE_PDL": False, "grid": (3,), "M": 1}
