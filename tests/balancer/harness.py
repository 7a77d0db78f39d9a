"""A real nginx over a few slots, for the tests of the balancer."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from balancer import nginx
from balancer.configuration import BalancerConfig, Upstream, open_file_limit, write
from tests.repository import REPOSITORY
from tests.waiting import free_port, listens, until

STANDIN = REPOSITORY / "tests" / "standin.py"


@dataclass
class BalancerHarness:
    """nginx over a few slots, some of them empty."""

    config: BalancerConfig
    ports: dict[str, int]
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    master: subprocess.Popen[bytes] | None = None
    prefix_command: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.config.port}"

    def start_worker(self, name: str) -> None:
        command = [sys.executable, str(STANDIN), "--port", str(self.ports[name]), "--id", name]
        self.running[name] = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        until(lambda: listens(self.ports[name]), f"{name} listens")

    def stop_worker(self, name: str) -> None:
        process = self.running.pop(name)
        process.terminate()
        process.wait(20)

    def start(self) -> None:
        program = nginx.find()
        command = [*self.prefix_command, sys.executable, "-P", "-m", "balancer.start"]
        command += ["--program", str(program), "--prefix", str(self.config.prefix)]
        self.master = subprocess.Popen(command, process_group=0)
        until(lambda: httpx.get(f"{self.url}/livez").status_code == 200, "nginx answers")

    def stop(self) -> None:
        for name in list(self.running):
            self.stop_worker(name)
        if self.master is not None:
            self.master.send_signal(signal.SIGQUIT)
            self.master.wait(20)


def make_balancer(prefix: Path, slots: int = 4, **changes: Any) -> BalancerHarness:
    ports: dict[str, int] = {}
    while len(ports) < slots:
        port = free_port()
        if port not in ports.values():
            ports[f"w{len(ports) + 1}"] = port
    settings: dict[str, Any] = {
        "host": "127.0.0.1",
        "port": free_port(),
        "upstreams": tuple(Upstream(name, port) for name, port in ports.items()),
        # Short: a socket's path may not exceed some 104 bytes.
        "admin_socket": Path(tempfile.gettempdir()) / f"gpufarm-test-{uuid.uuid4().hex[:12]}.sock",
        "prefix": prefix,
        "version": nginx.version(nginx.find()),
        "request_timeout": 10.0,
        "open_files": open_file_limit(),
        "as_root": os.geteuid() == 0,
    } | changes
    config = BalancerConfig(**settings)
    write(config)
    return BalancerHarness(config, ports)


def error_of(answer: httpx.Response) -> dict[str, Any]:
    assert answer.headers["Content-Type"] == "application/json", answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def raw(where: BalancerHarness, request: bytes) -> bytes:
    """Send bytes as they are; the answer up to its Content-Length, or to its connection's end."""
    with socket.create_connection(("127.0.0.1", where.config.port), timeout=20) as connection:
        connection.sendall(request)
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
            head, blank, body = received.partition(b"\r\n\r\n")
            length = re.search(rb"(?i)\ncontent-length: (\d+)", head)
            wanted = 0 if request.startswith(b"HEAD") or not length else int(length[1])
            if blank and len(body) >= wanted:
                break
        return received
