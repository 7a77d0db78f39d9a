"""A response's head and body leave in one write, so that no kill can come between them."""

from __future__ import annotations

import asyncio

from workers.http.protocol import MAX_JOINED_BYTES, JoiningTransport


class RecordingTransport:
    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        self.writes.append(data)

    def close(self) -> None:
        self.closed = True


def test_writes_of_one_step_are_joined() -> None:
    async def scene() -> list[bytes]:
        inner = RecordingTransport()
        transport = JoiningTransport(inner, asyncio.get_running_loop())
        transport.write(b"head")
        transport.write(b"body")
        await asyncio.sleep(0)
        transport.write(b"next")
        transport.close()
        assert inner.closed
        return inner.writes

    assert asyncio.run(scene()) == [b"headbody", b"next"]


def test_large_writes_are_not_held_back() -> None:
    async def scene() -> None:
        inner = RecordingTransport()
        transport = JoiningTransport(inner, asyncio.get_running_loop())
        transport.write(b"x" * (MAX_JOINED_BYTES + 1))
        assert len(inner.writes) == 1
        await asyncio.sleep(0)
        assert len(inner.writes) == 1

    asyncio.run(scene())
