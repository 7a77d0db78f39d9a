"""Asking a server that may not be there, may not answer, or may not speak HTTP."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from launcher.controller.probe import NoResponseError, get
from tests.waiting import free_port


@contextmanager
def server(answer: bytes, close: bool = True) -> Iterator[int]:
    """One connection, one answer; ``close`` False keeps the connection open afterwards."""
    listening = socket.create_server(("127.0.0.1", 0))
    ended = threading.Event()

    def serve() -> None:
        connection, _ = listening.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(answer)
            if not close:
                ended.wait(20)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield int(listening.getsockname()[1])
    finally:
        ended.set()
        thread.join(20)
        listening.close()


def ask(port: int, seconds: float = 10.0) -> tuple[int, bytes]:
    return asyncio.run(get(port, "/health", seconds))


def test_status_and_body() -> None:
    with server(b"HTTP/1.1 200 OK\r\n\r\nhello") as port:
        assert ask(port) == (200, b"hello")


def test_a_connection_that_stays_open_ends_with_its_length() -> None:
    with server(b"HTTP/1.1 503 Busy\r\nContent-Length: 2\r\n\r\nno", close=False) as port:
        assert ask(port) == (503, b"no")


@pytest.mark.parametrize("answer", [b"", b"nonsense", b"HTTP/1.1 abc\r\n\r\n"])
def test_what_is_no_http_is_no_answer(answer: bytes) -> None:
    with server(answer) as port, pytest.raises(NoResponseError):
        ask(port)


def test_nobody_there_is_no_answer() -> None:
    with pytest.raises(NoResponseError, match="Connect call failed"):
        ask(free_port())


def test_silence_is_no_answer() -> None:
    with server(b"HTTP/1.1 200 OK\r\n", close=False) as port, pytest.raises(NoResponseError):
        ask(port, seconds=0.2)
