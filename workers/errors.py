"""The errors of a worker: what a caller reads, what ends its start, and what a model raised."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from typing import Any

from workers.device_errors import is_sticky


class LoadError(Exception):
    """The worker cannot serve: one line that says what, why and what to do.

    ``permanent``: it cannot change by itself (a module or class that is missing, arguments that do
    not fit, no model, a bad spec). Such a worker ends with 3. One that fails otherwise, as with a
    file system, a hub or a device that may be back later, ends with 1 and is started again.
    """

    def __init__(self, message: str, *, permanent: bool = True) -> None:
        super().__init__(message)
        self.permanent = permanent


class ApiError(Exception):
    """An answer other than success, in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        try_next_worker: bool = False,
    ) -> None:
        """``may_go_on``: a refusal by this worker before any work, which the next may not share."""
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})
        self.try_next_worker = try_next_worker

    @property
    def type(self) -> str:
        if self.status == 429:
            return "rate_limit_error"
        return "invalid_request_error" if self.status < 500 else "server_error"

    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


def invalid(message: str, param: str | None = None) -> ApiError:
    """A request that can never succeed as it is: 400."""
    return ApiError(400, message, code="invalid_request", param=param)


def not_found(kind: str, name: str, known: list[str]) -> ApiError:
    """A model or voice that is not here: 404 with those that are."""
    return ApiError(
        404,
        f"The {kind} {name[:100]!r} does not exist here. There is: {', '.join(known)}.",
        code=f"{kind}_not_found",
        param=kind,
    )


class Cancelled(Exception):  # noqa: N818 - an answer, not a fault
    """The caller has left or the deadline has passed; the work is to be dropped."""


class InvalidRequest(ValueError):  # noqa: N818 - the name says what it is to its reader
    """A model's way of refusing a request: answered as 400 with this message."""


class ModelFailed(Exception):  # noqa: N818 - says who failed
    """The model raised what it should not have. ``trace`` is for the log, never for a caller."""

    def __init__(self, kind: str, trace: str, sticky: bool) -> None:
        super().__init__(kind)
        self.kind = kind
        self.trace = trace
        self.sticky = sticky


def without_frames(error: BaseException) -> Exception:
    """The same error without its frames, which would keep the request's tensors alive."""
    if isinstance(error, InvalidRequest | ApiError | Cancelled):
        return error.with_traceback(None)
    trace = "".join(traceback.format_exception(error))
    return ModelFailed(type(error).__name__, trace, is_sticky(error))
