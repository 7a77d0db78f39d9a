"""uvicorn's HTTP/1.1 protocol: a response leaves in one piece, and errors are JSON.

uvicorn writes a response's head and its body with one system call each. A worker that is killed
between the two has begun a response, so the balancer can no longer send the request to another one.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from httptools import HttpParserError
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from workers.errors import ApiError
from workers.model.responses import as_json

MAX_JOINED_BYTES = 65_536
"""More than this is written at once, so that a slow reader is noticed by the transport."""


class JoiningTransport:
    """A transport that joins what is written in one step of the event loop into one write."""

    def __init__(self, transport: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._parts: list[bytes] = []
        self._size = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self._parts:
            self._loop.call_soon(self._flush)
        self._parts.append(data)
        self._size += len(data)
        if self._size > MAX_JOINED_BYTES:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        parts, self._parts, self._size = self._parts, [], 0
        if parts:
            self._transport.write(b"".join(parts))


class JsonErrorProtocol(HttpToolsProtocol):
    """Answers unknown methods, control characters and raw UTF-8 in a target, wrong lengths and the
    like: no route sees them, since the parser yields no request."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(JoiningTransport(transport, self.loop))  # type: ignore[arg-type]

    def send_400_response(self, msg: str) -> None:
        """Respond 400 and close. uvicorn calls this while it handles the parser's error."""
        cycle = self.cycle
        if cycle is not None and cycle.response_started and not cycle.response_complete:
            # Invalid bytes after a request whose response has begun: a second head would be read as
            # a part of that response.
            self.transport.close()
            return
        error = sys.exception()
        reason = str(error) if isinstance(error, HttpParserError) else msg
        body = as_json(
            ApiError(
                400,
                f"The request is not valid HTTP: {reason.rstrip('.')}.",
                code="invalid_http",
            ).body()
        )
        head = (
            "HTTP/1.1 400 Bad Request\r\n"
            "content-type: application/json\r\n"
            f"content-length: {len(body)}\r\n"
            "connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
