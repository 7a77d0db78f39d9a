"""uvicorn's HTTP/1.1 protocol, with JSON error responses for requests that it cannot parse."""

from __future__ import annotations

import sys

from httptools import HttpParserError
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from workers.errors import ApiError
from workers.model.responses import as_json


class JsonErrorProtocol(HttpToolsProtocol):
    """Answers unknown methods, control characters and raw UTF-8 in a target, wrong lengths and the
    like: no route sees them, since the parser yields no request."""

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
