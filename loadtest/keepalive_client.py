"""A closed loop over HTTP/1.1 keep-alive connections, cheap enough to measure a serving layer.

Each connection sends its next request when the answer to the last one is complete. Asyncio
protocols on uvloop, because a client library costs more than what is measured here.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

GRACE_SECONDS = 30.0
"""How long the last answers may take after the end of the run."""


@dataclass(frozen=True)
class Sample:
    """One request. Times are seconds; ``start`` counts from the beginning of the run."""

    start: float
    latency: float
    status: int
    worker: str
    queued: float | None
    inference: float | None
    """From the worker's headers."""


def post(url: str, body: Any) -> bytes:
    """The bytes of a POST of JSON."""
    parts = urlsplit(url)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    content = json.dumps(body).encode()
    head = (
        f"POST {target} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


class _Connection(asyncio.Protocol):
    def __init__(
        self, request: bytes, begun: float, until: float, done: Callable[[Sample], None]
    ) -> None:
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = request
        self._begun = begun
        self._until = until
        self._done = done
        self._received = b""
        self._sent = 0.0
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's is one without being a subclass.
        self._transport = cast(asyncio.WriteTransport, transport)
        self._next()

    def _next(self) -> None:
        assert self._transport is not None
        self._sent = time.perf_counter()
        if self._sent >= self._until:
            self._transport.close()
            return
        self._transport.write(self._request)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        if not end:
            return
        headers = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(b":") for line in head.split(b"\r\n")[1:])
        }
        if len(body) < int(headers.get(b"content-length", b"0")):
            return
        now = time.perf_counter()
        self._received = b""
        self._done(
            Sample(
                start=self._sent - self._begun,
                latency=now - self._sent,
                status=int(head.split(b" ", 2)[1]),
                worker=headers.get(b"x-worker-id", b"").decode(),
                queued=_milliseconds(headers.get(b"x-queue-time-ms")),
                inference=_milliseconds(headers.get(b"x-inference-time-ms")),
            )
        )
        self._next()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.closed.done():
            if error is not None or time.perf_counter() < self._until:
                self.closed.set_exception(error or ConnectionError("closed by the server"))
            else:
                self.closed.set_result(None)


def _milliseconds(value: bytes | None) -> float | None:
    return None if value is None else float(value) / 1000


async def closed_loop(url: str, body: Any, concurrency: int, seconds: float) -> list[Sample]:
    """Run ``concurrency`` connections for ``seconds``. Raises OSError when one breaks."""
    parts = urlsplit(url)
    samples: list[Sample] = []
    loop = asyncio.get_running_loop()
    request, begun = post(url, body), time.perf_counter()
    connections: list[_Connection] = []
    try:
        for _ in range(concurrency):
            _, connection = await loop.create_connection(
                lambda: _Connection(request, begun, begun + seconds, samples.append),
                parts.hostname or "127.0.0.1",
                parts.port or 80,
            )
            connections.append(connection)
        async with asyncio.timeout(seconds + GRACE_SECONDS):
            await asyncio.gather(*(asyncio.shield(connection.closed) for connection in connections))
    finally:
        # When one has broken, the others are still at work.
        for connection in connections:
            connection.abort()
        await asyncio.gather(*(one.closed for one in connections), return_exceptions=True)
    return samples
