"""What every test with real processes needs: deadlines instead of sleeps, and free ports."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Callable
from typing import TypeVar

import httpx

T = TypeVar("T")


def until(condition: Callable[[], T], what: str, seconds: float = 60.0, every: float = 0.05) -> T:
    """The first true value of ``condition``; fails with ``what`` when the deadline passes.

    Connection errors count as "not yet".
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            value: T | None = condition()
        except (OSError, httpx.TransportError):
            value = None
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(every)


def free_port() -> int:
    """A port on 127.0.0.1 that is closed, outside of the range that the kernel hands out."""
    for _ in range(200):
        port = random.randint(21000, 32000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except (OSError, httpx.TransportError):
                continue
            return port
    raise AssertionError("no free port")


def listens(port: int, host: str = "127.0.0.1") -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((host, port)) == 0
