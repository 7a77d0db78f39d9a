"""A minimal HTTP GET over asyncio: one connection, one response."""

from __future__ import annotations

import asyncio
from contextlib import suppress

MAX_RESPONSE = 8 * 2**20
"""Bytes of a response that are read."""
READY_BELOW = 400
"""Statuses below it mean ready."""


class NoResponseError(Exception):
    """No server listens, or its response is not HTTP or did not arrive in time."""


async def get(port: int, path: str, seconds: float) -> tuple[int, bytes]:
    """Return status and body of ``GET path`` at 127.0.0.1. Raises NoResponseError."""
    try:
        async with asyncio.timeout(seconds):
            return await _get(port, path)
    except (OSError, TimeoutError, ValueError, IndexError, EOFError) as error:
        raise NoResponseError(f"127.0.0.1:{port}{path}: {error or type(error).__name__}") from None


async def _get(port: int, path: str) -> tuple[int, bytes]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        # HTTP/1.0: the body ends with the connection, and is never chunked.
        writer.write(
            f"GET {path} HTTP/1.0\r\nHost: 127.0.0.1:{port}\r\nAccept: */*\r\n\r\n".encode()
        )
        await writer.drain()
        received = bytearray()
        while chunk := await reader.read(65536):
            received += chunk
            if len(received) > MAX_RESPONSE or _complete(received):
                break
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
    head, _, body = bytes(received).partition(b"\r\n\r\n")
    return int(head.split(b" ", 2)[1]), body


def _complete(received: bytearray) -> bool:
    """Return whether Content-Length bytes have arrived: some servers keep the connection open."""
    head, end, body = received.partition(b"\r\n\r\n")
    if not end:
        return False
    for line in head.lower().split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name == b"content-length":
            return len(body) >= int(value)
    return False
