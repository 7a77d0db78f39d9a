"""A reader that takes its answer slowly, and the worker that has long made it."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from balancer import processes
from tests.balancer.harness import make_balancer
from tests.waiting import until

MEGABYTE = 2**20
SIZE = 24 * MEGABYTE


@dataclass
class Sent:
    """How far one answer has been handed to nginx."""

    bytes: int = 0


@contextmanager
def worker(port: int, headers: str = "") -> Iterator[Sent]:
    """Answers one request with SIZE bytes, as fast as nginx takes them."""
    sent = Sent()
    server = socket.create_server(("127.0.0.1", port))

    def serve() -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(65536)
            head = f"HTTP/1.1 200 OK\r\nContent-Length: {SIZE}\r\n{headers}\r\n"
            connection.sendall(head.encode())
            while sent.bytes < SIZE:
                connection.sendall(b"x" * 65536)
                sent.bytes += 65536

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield sent
    finally:
        thread.join(60)
        server.close()


@contextmanager
def reader(port: int) -> Iterator[socket.socket]:
    """Has asked, and taken nothing yet; the kernel holds little for it."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
        connection.settimeout(60)
        connection.connect(("127.0.0.1", port))
        connection.sendall(b"GET /big HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        yield connection


def body_bytes(connection: socket.socket, prefix: Path) -> tuple[int, int]:
    """Read to the end: the bytes of the body, and of nginx's largest file on the way."""
    received, largest = bytearray(), 0
    while chunk := connection.recv(MEGABYTE):
        if len(received) // MEGABYTE != (len(received) + len(chunk)) // MEGABYTE:
            largest = max(largest, file_bytes(prefix))
        received += chunk
    return len(received.partition(b"\r\n\r\n")[2]), largest


def file_bytes(prefix: Path) -> int:
    """The size of what nginx has put into files; it has unlinked them while it still holds them."""
    sizes = [0]
    for pid in processes.all_members(prefix):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed by now
                if re.search(r"nginx-tmp/proxy/.*\(deleted\)$", str(link.readlink())):
                    sizes.append(link.stat().st_size)
    return max(sizes)


def test_a_slow_reader_does_not_hold_its_worker(tmp_path: Path) -> None:
    made = make_balancer(tmp_path, slots=1)
    made.start()
    try:
        with worker(made.ports["w1"]) as sent, reader(made.config.port) as connection:
            until(lambda: sent.bytes == SIZE, "the worker has sent everything")
            assert body_bytes(connection, tmp_path)[0] == SIZE
    finally:
        made.stop()


def test_nginx_holds_no_more_than_the_limit_and_the_rest_follows(tmp_path: Path) -> None:
    limit = 4 * MEGABYTE
    made = make_balancer(tmp_path, slots=1, response_file_limit=limit)
    made.start()
    try:
        with worker(made.ports["w1"]) as sent, reader(made.config.port) as connection:
            until(lambda: file_bytes(tmp_path) >= limit, "the file is as large as it may be")
            received, largest = body_bytes(connection, tmp_path)
            assert sent.bytes == SIZE
    finally:
        made.stop()
    assert received == SIZE
    assert largest <= limit + MEGABYTE


def test_a_live_stream_is_written_to_no_file(tmp_path: Path) -> None:
    """Its worker sees how fast the reader is, and does what it does with a slow one."""
    made = make_balancer(tmp_path, slots=1)
    made.start()
    try:
        live = "X-Accel-Buffering: no\r\n"
        with worker(made.ports["w1"], live) as sent, reader(made.config.port) as connection:
            until(lambda: sent.bytes > 0, "it has begun")
            received, largest = body_bytes(connection, tmp_path)
    finally:
        made.stop()
    assert (received, largest) == (SIZE, 0)
