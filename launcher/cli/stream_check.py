"""Check that nginx passes a stream on chunk by chunk.

A proxy that buffers a response looks healthy and makes every stream useless. The test stream goes
through an nginx with the farm's own configuration, started for this check on free ports; a running
farm's public address is checked as well.
"""

from __future__ import annotations

import http.client
import os
import shutil
import signal
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
from launcher.cli.client import poll_until
from launcher.supervision.farm import Farm, balancer_config
from launcher.supervision.supervisord import python_module

CHUNKS = 4
CHUNK_INTERVAL = 0.15
"""Seconds between two chunks."""
START_SECONDS = 15.0
RESPONSE_SECONDS = 10.0


class StreamError(Exception):
    """The stream did not arrive as it should. The message is one line."""


def check_stream(farm: Farm | None) -> str:
    """Send a stream through nginx. Returns one line about it; raises StreamError, BalancerError."""
    public_address = ""
    if farm is not None:
        public_address = _check_public_address(farm) + "; "
    folder = Path(tempfile.mkdtemp(prefix="gpufarm-doctor-"))
    try:
        with _upstream() as port, _nginx(folder, port, farm) as public:
            spread = _receive_stream(public)
    finally:
        processes.end(folder, graceful_seconds=2)
        shutil.rmtree(folder, ignore_errors=True)
    return f"{public_address}{CHUNKS} chunks arrived one by one over {spread * 1000:.0f} ms"


def _check_public_address(farm: Farm) -> str:
    """Request a path that nginx answers and one that a worker answers."""
    host, port = farm.url.removeprefix("http://").rsplit(":", 1)
    connection = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=RESPONSE_SECONDS)
    try:
        for path in ("/livez", "/readyz"):
            connection.request("GET", path)
            response = connection.getresponse()
            response.read()
            if response.status != 200:
                raise StreamError(f"{farm.url}{path} answers {response.status}; see `gpufarm ps`")
    except (OSError, http.client.HTTPException) as error:
        raise StreamError(f"{farm.url} does not answer: {error}; see `gpufarm logs`") from None
    finally:
        connection.close()
    return f"{farm.url} is live and ready"


@contextmanager
def _upstream() -> Iterator[int]:
    """Run a worker in a thread that streams chunks; yields its port."""
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
                for number in range(CHUNKS):
                    connection.sendall(b"1\r\n%d\r\n" % number)
                    time.sleep(CHUNK_INTERVAL)
                connection.sendall(b"0\r\n\r\n")

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield int(server.getsockname()[1])
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join(RESPONSE_SECONDS)


@contextmanager
def _nginx(folder: Path, upstream: int, farm: Farm | None) -> Iterator[int]:
    """Run an nginx in front of that worker; yields its port."""
    program = nginx.find()
    version = nginx.version(program)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    farm_config = balancer_config(farm, version) if farm is not None else None
    config = BalancerConfig(
        host="127.0.0.1",
        port=port,
        upstreams=(Upstream("stream-check", upstream),),
        admin_socket=folder / "admin.sock",
        prefix=folder,
        version=version,
        processes=1,
        open_files=open_file_limit(),
        as_root=os.geteuid() == 0,
        own_workers=farm_config.own_workers if farm_config else True,
    )
    write(config)
    nginx.test(program, version, folder)
    command = python_module("balancer.start", "--program", str(program), "--prefix", str(folder))
    process = subprocess.Popen(command, process_group=0, stdin=subprocess.DEVNULL)
    try:
        poll_until(lambda: _listens(port) or process.poll() is not None, START_SECONDS, 0.02)
        if process.poll() is not None or not _listens(port):
            raise StreamError("nginx does not start; see the messages above")
        yield port
    finally:
        process.send_signal(signal.SIGQUIT)
        try:
            process.wait(START_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _receive_stream(port: int) -> float:
    """Return the seconds between the first and the last chunk. Raises StreamError."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=RESPONSE_SECONDS)
    arrivals = []
    received = b""
    try:
        connection.request("GET", "/stream")
        response = connection.getresponse()
        while chunk := response.read1(65536):
            received += chunk
            arrivals.append(time.monotonic())
    except (OSError, http.client.HTTPException) as error:
        raise StreamError(f"the stream broke off: {error}") from None
    finally:
        connection.close()
    if received != b"".join(b"%d" % number for number in range(CHUNKS)):
        raise StreamError(f"the stream arrived as {received!r}")
    spread = arrivals[-1] - arrivals[0]
    if spread < CHUNK_INTERVAL:
        raise StreamError(
            "the chunks of a stream arrived all at once: something between the worker and the "
            "client buffers responses"
        )
    return spread
