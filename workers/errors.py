"""The errors of a worker: HTTP errors, errors that fail its start, and what a model raised."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from typing import Any

from workers.device_errors import is_sticky


class LoadError(Exception):
    """The worker cannot serve: one line with what failed, why, and the remedy.

    ``permanent``: a restart cannot help (a missing module or class, arguments that do not fit, a
    class that is not a model, a bad spec). Such a worker exits with 3. One that fails otherwise,
    as with a file system, a hub or a device that may recover, exits with 1 and is restarted.
    """

    def __init__(self, message: str, *, permanent: bool = True) -> None:
        super().__init__(message)
        self.permanent = permanent


class ApiError(Exception):
    """An HTTP error response, in the shape of OpenAI's errors."""

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
        """``try_next_worker``: rejected before any work, and another worker may accept it."""
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
    """Return a 400 for a request that cannot succeed unchanged."""
    return ApiError(400, message, code="invalid_request", param=param)


def not_found(kind: str, name: str, known: list[str]) -> ApiError:
    """Return a 404 for an unknown model or voice, listing the available ones."""
    return ApiError(
        404,
        f"{kind.capitalize()} not found: {name[:100]!r}. Available: {', '.join(known)}.",
        code=f"{kind}_not_found",
        param=kind,
    )


class Cancelled(Exception):  # noqa: N818 - control flow, not a failure
    """The client has disconnected or the deadline has passed: stop working on the request."""


class InvalidRequest(ValueError):  # noqa: N818 - named for the model's author
    """Raised by a model to reject a request: a 400 with this message."""


class ModelFailed(Exception):  # noqa: N818 - says what failed
    """The model raised an unexpected error. ``trace`` is for the log, never for a caller."""

    def __init__(self, kind: str, trace: str, sticky: bool) -> None:
        super().__init__(kind)
        self.kind = kind
        self.trace = trace
        self.sticky = sticky


def without_frames(error: BaseException) -> Exception:
    """Return the error without its frames, which would keep the request's tensors alive."""
    if isinstance(error, InvalidRequest | ApiError | Cancelled):
        return error.with_traceback(None)
    trace = "".join(traceback.format_exception(error))
    return ModelFailed(type(error).__name__, trace, is_sticky(error))
