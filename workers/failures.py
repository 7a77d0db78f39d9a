"""What a model raised, reduced to what may leave the device thread."""

from __future__ import annotations

import re
import traceback

from workers.contract import Cancelled, InvalidRequest
from workers.errors import ApiError

_STICKY = re.compile(
    r"illegal (memory access|address|instruction)|device-side assert|misaligned address"
    r"|launch (failure|failed|timed out)|unspecified launch|uncorrectable (ecc|nvlink)"
    r"|hardware stack error|invalid program counter|gpu is lost|fallen off the bus"
    r"|cudaError(IllegalAddress|LaunchFailure|LaunchTimeout|Assert)"
    r"|mps (client|server) (failed|terminated|connection)|CUDA failure (700|702|710|719)",
    re.IGNORECASE,
)
"""After one of these the CUDA context answers every call with the same error until it is gone."""


class ModelFailed(Exception):  # noqa: N818 - says who failed
    """The model raised what it should not have. ``trace`` is for the log, never for a caller."""

    def __init__(self, kind: str, trace: str, sticky: bool) -> None:
        super().__init__(kind)
        self.kind = kind
        self.trace = trace
        self.sticky = sticky


def reduced(error: BaseException) -> Exception:
    """The same error without its frames, which would keep the request's tensors alive."""
    if isinstance(error, InvalidRequest | ApiError | Cancelled):
        return error.with_traceback(None)
    trace = "".join(traceback.format_exception(error))
    return ModelFailed(type(error).__name__, trace, is_sticky(error))


def is_exhausted(error: BaseException) -> bool:
    """Whether memory ran out, of the host or of the device."""
    return isinstance(error, MemoryError) or "out of memory" in str(error).lower()


def is_sticky(error: BaseException) -> bool:
    """Whether the device is lost to this process. Running out of memory is not."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        text = str(cause)
        # torch raises AcceleratorError only for errors that the device itself reported
        reported = type(cause).__name__ == "AcceleratorError" or _STICKY.search(text)
        if reported and not is_exhausted(cause):
            return True
        cause = cause.__cause__ or cause.__context__
    return False
