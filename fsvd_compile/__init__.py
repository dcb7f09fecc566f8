"""fsvd_compile: a torch.compile backend for SVD-factorized transformers.

`torch.compile(model, backend="flashsvd")` needs no import of this package where it is installed: the backend is found
through its entry point. Importing it gives the pieces around the backend, and the backend's name to a package that only
lies on the path. Nothing here needs a GPU.
"""

import torch

# Imported eagerly so that the names mean the functions, not the sub-modules they live in.
from fsvd_compile.backend import flashsvd
from fsvd_compile.config import Config
from fsvd_compile.explain import explain
from fsvd_compile.factorize import Refine, calibration_windows, factorize
from fsvd_compile.factorized import BranchedLinear, LowRankLinear
from fsvd_compile.families import load, register, save

__version__ = "0.1.0"
__all__ = [
    "BranchedLinear",
    "Config",
    "LowRankLinear",
    "Refine",
    "__version__",
    "calibration_windows",
    "explain",
    "factorize",
    "flashsvd",
    "load",
    "save",
]

register()  # transformers' from_pretrained reads what `save` wrote
if "flashsvd" not in torch._dynamo.list_backends(exclude_tags=()):
    torch._dynamo.register_backend(flashsvd, name="flashsvd")
