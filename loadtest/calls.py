"""One HTTP request, timed: when its first byte came, when its last, and what it says of itself."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import gevent
from geventhttpclient import HTTPClient
from geventhttpclient.response import HTTPParseError

# Connections are not what limits the load: in an open loop one user has many requests in flight.
_CONNECTIONS = 10_000
_WALL = time.time() - time.perf_counter()


def now() -> float:
    """Unix seconds that never go back."""
    return _WALL + time.perf_counter()


@dataclass
class Answer:
    """What came back. ``status`` is 0, and ``error`` says why, when nothing usable did."""

    started: float
    first_byte: float | None = None
    ended: float = 0.0
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    error: str = ""

    def number(self, name: str) -> float | None:
        """A header's value; None where it is absent or no number."""
        try:
            value = float(self.headers.get(name, ""))
        except ValueError:
            return None
        return value if math.isfinite(value) else None


class Caller:
    """A caller with connections of its own, kept alive."""

    def __init__(self, base_url: str, timeout: float) -> None:
        """``base_url`` may have a path; ``timeout``: seconds for a whole request."""
        self._timeout = timeout
        self._client = HTTPClient.from_url(
            base_url,
            concurrency=_CONNECTIONS,
            connection_timeout=timeout,
            network_timeout=timeout,
        )
        self._prefix = _path(base_url)

    def close(self) -> None:
        self._client.close()

    def post(self, path: str, body: bytes) -> Answer:
        """Send ``body`` as JSON. Never raises but for GreenletExit (the run ends)."""
        answer = Answer(now())
        timeout = gevent.Timeout(self._timeout)
        try:
            with timeout:
                self._post(path, body, answer)
        except gevent.Timeout as late:
            if late is not timeout:
                raise
            answer.error = f"no complete answer within {self._timeout:g} s"
        except (OSError, HTTPParseError, ValueError, RuntimeError) as error:
            answer.error = _named(error, answer)
        answer.ended = now()
        return answer

    def _post(self, path: str, body: bytes, answer: Answer) -> None:
        headers = {"Content-Type": "application/json"}
        response = self._client.request("POST", self._prefix + path, body, headers)
        answer.status = response.status_code
        answer.headers = dict(_lower(response.items()))
        first = bytes(response.read(1))
        if first:
            answer.first_byte = now()
        answer.body = first + bytes(response.read())
        if not response.message_complete:
            raise HTTPParseError("the answer was cut off")


def _path(url: str) -> str:
    rest = url.split("://", 1)[-1]
    return "/" + rest.split("/", 1)[1].rstrip("/") if "/" in rest.rstrip("/") else ""


def _lower(items: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    return ((name.lower(), value) for name, value in items)


def _named(error: Exception, answer: Answer) -> str:
    """Without addresses and counters, so that equal failures are counted as one."""
    name = type(error).__name__
    reason = getattr(error, "strerror", None) or str(error)
    if answer.status:
        return f"{answer.status}, then cut off: {name}: {reason}"
    return f"{name}: {reason}"


def error_reason(answer: Answer) -> str:
    """Format a failure as status and error code: ``503 no_worker``."""
    try:
        error = json.loads(answer.body)["error"]
        reason = error.get("code") or error.get("message") or ""
    except (ValueError, LookupError, TypeError, AttributeError):
        reason = ""
    return f"{answer.status} {str(reason)[:80]}".strip()
