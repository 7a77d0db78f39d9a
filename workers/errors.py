"""The errors of a worker: those that a caller reads, and the one that ends its start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


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
        may_go_on: bool = False,
    ) -> None:
        """``may_go_on``: a refusal by this worker before any work, which the next may not share."""
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})
        self.may_go_on = may_go_on

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


def unknown(kind: str, name: str, known: list[str]) -> ApiError:
    """A model or voice that is not here: 404 with those that are."""
    return ApiError(
        404,
        f"The {kind} {name[:100]!r} does not exist here. There is: {', '.join(known)}.",
        code=f"{kind}_not_found",
        param=kind,
    )
