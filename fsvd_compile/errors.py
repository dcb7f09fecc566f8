"""What a user can do wrong, one class per kind. Every message says what was given, what is allowed and what to do."""


class FlashSVDError(Exception):
    """Base of every error this package raises on purpose."""


class OptionError(FlashSVDError, ValueError):
    """`torch.compile(..., backend="flashsvd", options=…, mode=…)` got a key or a value it does not know."""


class FactorError(FlashSVDError, ValueError):
    """Two factors, a bias or a rank do not describe a linear layer."""


class FactorizeError(FlashSVDError, ValueError):
    """`factorize` cannot start or go on; the model is as it was before the call."""


class CheckpointError(FlashSVDError, ValueError):
    """A checkpoint cannot be read, or does not describe the model it says; nothing is left half-loaded."""


class DeviceError(FlashSVDError, RuntimeError):
    """A device, driver or compiler that was asked for is not there."""


class VersionError(FlashSVDError, ImportError):
    """A package is there in a version that lacks what was asked for."""


class TableError(FlashSVDError, ValueError):
    """A table of tile sizes is not what `fsvd-compile tune` writes."""


class BenchError(FlashSVDError, ValueError):
    """A measurement cannot be made, or its rows not be stored, as asked for."""


class WrongResultError(FlashSVDError, RuntimeError):
    """A compiled model's results are further from fp32 than eager's: a bug, not a measurement."""
