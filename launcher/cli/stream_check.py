"""A stream sent through nginx, and watched: do its pieces arrive as they are made?

A proxy that collects an answer before it passes it on looks healthy and makes every stream
useless. The sentinel goes through an nginx of the farm's own configuration, started for the
purpose on free ports; of a running farm the public address is asked as well.
"""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from balancer import nginx, processes
from balancer.configuration import BalancerConfig, Upstream, open_file_limit, write
from launcher.supervision.farm import Farm, balancer_config
from launcher.supervision.supervisord import python_module

PIECES = 4
PAUSE = 0.15
"""Seconds between two pieces."""
START_SECONDS = 15.0
ANSWER_SECONDS = 10.0


class SentinelError(Exception):
    """The stream did not arrive as it should. One line."""


def stream_through(farm: Farm | None) -> str:
    """Send the sentinel; what to tell of it. Raises SentinelError and BalancerError."""
    told = ""
    if farm is not None:
        told = _ask_running(farm) + "; "
    folder = Path(tempfile.mkdtemp(prefix="gpufarm-doctor-"))
    try:
        with _upstream() as port, _proxy(folder, port, farm) as public:
            spread = _watch(public)
    finally:
        processes.end(folder, graceful_seconds=2)
        shutil.rmtree(folder, ignore_errors=True)
    return f"{told}{PIECES} pieces came one by one over {spread * 1000:.0f} ms"


def _ask_running(farm: Farm) -> str:
    """The public address of a running farm, at a path that nginx and one that a worker answers."""
    host, port = farm.url.removeprefix("http://").rsplit(":", 1)
    connection = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=ANSWER_SECONDS)
    try:
        for path in ("/livez", "/readyz"):
            connection.request("GET", path)
            answer = connection.getresponse()
            answer.read()
            if answer.status != 200:
                raise SentinelError(f"{farm.url}{path} answers {answer.status}; see `gpufarm ps`")
    except (OSError, http.client.HTTPException) as error:
        raise SentinelError(f"{farm.url} does not answer: {error}; see `gpufarm logs`") from None
    finally:
        connection.close()
    return f"{farm.url} is live and ready"


@contextmanager
def _upstream() -> Iterator[int]:
    """A worker in a thread that streams one piece after another; its port."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                connection.recv(65536)
                connection.sendall(
                    b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n"
                    b"X-Accel-Buffering: no\r\nTransfer-Encoding: chunked\r\n\r\n"
                )
                for number in range(PIECES):
                    connection.sendall(b"1\r\n%d\r\n" % number)
                    time.sleep(PAUSE)
                connection.sendall(b"0\r\n\r\n")

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield int(server.getsockname()[1])
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join(ANSWER_SECONDS)


@contextmanager
def _proxy(folder: Path, upstream: int, farm: Farm | None) -> Iterator[int]:
    """An nginx before that worker; its port."""
    program = nginx.find()
    version = nginx.version(program)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    like = balancer_config(farm, version) if farm is not None else None
    config = BalancerConfig(
        host="127.0.0.1",
        port=port,
        upstreams=(Upstream("sentinel", upstream),),
        admin_socket=folder / "admin.sock",
        prefix=folder,
        version=version,
        processes=1,
        open_files=open_file_limit(),
        as_root=os.geteuid() == 0,
        own_workers=like.own_workers if like else True,
    )
    write(config)
    nginx.test(program, version, folder)
    command = python_module("balancer.start", "--program", str(program), "--prefix", str(folder))
    process = subprocess.Popen(command, process_group=0, stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _listens(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SentinelError("nginx does not start; see the messages above")
            time.sleep(0.02)
        yield port
    finally:
        process.send_signal(3)
        try:
            process.wait(START_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _watch(port: int) -> float:
    """Seconds between the arrival of the first and of the last piece."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_SECONDS)
    arrivals = []
    received = b""
    try:
        connection.request("GET", "/stream")
        answer = connection.getresponse()
        while piece := answer.read1(65536):
            received += piece
            arrivals.append(time.monotonic())
    except (OSError, http.client.HTTPException) as error:
        raise SentinelError(f"the stream broke off: {error}") from None
    finally:
        connection.close()
    if received != b"".join(b"%d" % number for number in range(PIECES)):
        raise SentinelError(f"the stream arrived as {received!r}")
    spread = arrivals[-1] - arrivals[0]
    if spread < PAUSE:
        raise SentinelError(
            "the pieces of a stream arrived all at once: something between the worker and the "
            "client collects answers"
        )
    return spread
