"""uvicorn's HTTP/1.1 protocol, which answers what it cannot parse in JSON, as the routes do."""

from __future__ import annotations

import sys

from httptools import HttpParserError
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from workers.errors import ApiError
from workers.model.responses import as_json


class JsonErrorProtocol(HttpToolsProtocol):
    """Unknown methods, control characters and raw UTF-8 in a target, wrong lengths and the like end
    here: no route sees them, since there is no request."""

    def send_400_response(self, msg: str) -> None:
        """Answer 400 and close. Called by uvicorn while it handles the parser's error."""
        cycle = self.cycle
        if cycle is not None and cycle.response_started and not cycle.response_complete:
            # Rubbish after the head of a body that is being answered: a second head would be read
            # as a part of that answer.
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
