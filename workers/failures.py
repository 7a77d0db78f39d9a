"""What a model raised, reduced to what may leave the device thread."""

from __future__ import annotations

import traceback

from workers.contract import Cancelled, InvalidRequest
from workers.device_errors import is_sticky
from workers.errors import ApiError


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
