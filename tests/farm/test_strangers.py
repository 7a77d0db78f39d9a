"""Another user of the machine, another configuration: neither gets at a farm."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from tests.farm.harness import FarmUnderTest, new_farm
from tests.farm.models import serve_work
from tests.waiting import free_port, until

UNPRIVILEGED_USER = 65534
TRY_TO_LISTEN = """
import os, socket, sys
os.setuid(int(sys.argv[1]))
host, port, options = sys.argv[2], int(sys.argv[3]), sys.argv[4]
server = socket.socket()
for name in options.split(","):
    if name:
        server.setsockopt(socket.SOL_SOCKET, getattr(socket, name), 1)
try:
    server.bind((host, port))
    server.listen()
except OSError:
    sys.exit(1)
"""
ASK_THE_CONTROLLER = """
import os, socket, sys
os.setuid(int(sys.argv[1]))
try:
    socket.socket(socket.AF_UNIX).connect(sys.argv[2])
except OSError:
    sys.exit(1)
"""
OPTIONS = ("", "SO_REUSEADDR", "SO_REUSEPORT", "SO_REUSEADDR,SO_REUSEPORT")


def succeeds(program: str, *arguments: str) -> bool:
    """Whether another user can do it."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    command = ["/usr/bin/env", "python3", "-c", program, str(UNPRIVILEGED_USER), *arguments]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode == 0


def test_another_user_can_take_no_port_of_a_farm() -> None:
    with new_farm(workers="count = 1") as farm:
        farm.run("up")
        farm.run("scale", "2")
        httpx.post(f"{farm.url}/work")
        farm.run("scale", "1")  # w2's port had a server, and connections that linger
        ports = [slot["port"] for slot in farm.generation()["plan"]["slots"]]
        assert len(ports) == 4
        taken = [
            (port, host, options)
            for port in ports
            for host in ("127.0.0.1", "0.0.0.0")
            for options in OPTIONS
            if succeeds(TRY_TO_LISTEN, host, str(port), options)
        ]
        assert taken == []
        free = str(free_port())
        assert succeeds(TRY_TO_LISTEN, "127.0.0.1", free, ""), "the trial itself works"


def test_another_user_cannot_reach_the_controller() -> None:
    with new_farm(workers="count = 1") as farm:
        farm.run("up")
        path = farm.runtime / "admin.sock"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        farm.folder.parent.chmod(0o755)
        assert not succeeds(ASK_THE_CONTROLLER, str(path))
        # Not even where every folder above were open.
        for folder in (farm.folder, farm.state, farm.runtime):
            folder.chmod(0o755)
        assert not succeeds(ASK_THE_CONTROLLER, str(path))


def test_only_nginx_and_the_workers_listen_on_tcp() -> None:
    with new_farm(workers="count = 2") as farm:
        farm.run("up")
        expected = {farm.port, *(worker["port"] for worker in farm.workers().values())}
        family = {process.pid for process in farm.processes()}
        listening = {
            connection.laddr[1]
            for connection in psutil.net_connections("inet")
            if connection.pid in family and connection.laddr
            if connection.status == psutil.CONN_LISTEN
        }
        assert listening == expected


def test_the_public_health_reveals_nothing_private() -> None:
    with new_farm() as farm:
        serve_work(farm)
        farm.run("up")
        text = httpx.get(f"{farm.url}/health").text
        numbers = [str(n) for w in farm.workers().values() for n in (w["pid"], w["port"])]
        assert not [number for number in numbers if number in text]
        assert str(farm.folder) not in text
        for path in ("/longest_request", "/workers", "/plan", "/restart"):
            assert httpx.get(f"{farm.url}{path}").status_code == 404, path


def test_a_farm_of_another_configuration_is_replaced_only_on_request(tmp_path: Path) -> None:
    with new_farm(workers="count = 1") as farm:
        farm.run("up")
        pids, home = farm.pids(), farm.folder
        other = FarmUnderTest(tmp_path / "other", farm.port)
        other.folder.mkdir()
        serve_work(other, workers="count = 1\nmax = 4")
        at = ("--state-dir", str(farm.state))
        message = other.run("up", *at, expect=2).stderr
        assert str(home / "gpufarm.toml") in message
        assert str(other.folder / "gpufarm.toml") in message
        assert "--replace" in message
        assert "--state-dir" in message
        assert farm.pids() == pids
        with farm.load("/work", clients=2) as load:
            pass
        load.check(at_least=2)
        other.run("up", "--replace", *at)
        until(lambda: farm.states() == {"w1": "ready"}, "the other model")
        assert httpx.post(f"{farm.url}/predict", json={}).status_code == 200


def test_a_worker_of_this_user_shares_its_port_with_the_hold() -> None:
    """And an external server, which cannot, is given the port just before it starts."""
    with new_farm() as farm:
        serve_work(farm, workers="count = 1\nmax = 2")
        farm.run("up")
        port = farm.workers()["w1"]["port"]
        with socket.socket() as plain, pytest.raises(OSError, match="in use"):
            plain.bind(("127.0.0.1", port))
        assert sys.platform == "linux"


STOP_ALL_WORKERS = """
import os, socket, sys
os.setuid(int(sys.argv[1]))
body = b'{"count": 0}'
head = b"PUT /workers HTTP/1.1\\r\\nHost: localhost\\r\\nConnection: close\\r\\n"
head += b"Content-Type: application/json\\r\\nContent-Length: 12\\r\\n\\r\\n"
with socket.socket() as caller:
    caller.settimeout(20)
    caller.connect(("127.0.0.1", int(sys.argv[2])))
    caller.sendall(head + body)
    answer = caller.recv(65536)
sys.exit(0 if answer.split()[1] == b"200" else 1)
"""


def test_another_user_cannot_command_a_farm() -> None:
    """No port that the farm listens on takes an order."""
    with new_farm(workers="count = 1") as farm:
        farm.run("up")
        pids = farm.pids()
        family = {process.pid for process in farm.processes()}
        ports = {
            connection.laddr[1]
            for connection in psutil.net_connections("inet")
            if connection.pid in family and connection.laddr
            if connection.status == psutil.CONN_LISTEN
        }
        assert farm.port in ports
        assert [port for port in ports if succeeds(STOP_ALL_WORKERS, str(port))] == []
        assert farm.admin("GET", "/workers").json()["count"] == 1
        assert farm.pids() == pids
