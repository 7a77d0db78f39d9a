"""Ports of slots: disjoint between farms, free when chosen, kept, and held against others."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from launcher.config.state import StateError
from launcher.supervision import ports
from tests.waiting import free_port, listens, until


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))


def farm(tmp_path: Path, name: str) -> Path:
    folder = tmp_path / name
    folder.mkdir()
    return folder


def test_blocks_are_disjoint_below_the_kernels_range_and_kept(tmp_path: Path) -> None:
    folders = [farm(tmp_path, name) for name in "abcdef"]
    blocks = [ports.choose(folder, 17, public=8000) for folder in folders]
    every = [port for block in blocks for port in block]
    assert len(set(every)) == 6 * 17
    assert max(every) < 32768
    for folder, block in zip(folders, blocks, strict=True):
        assert block == tuple(range(block[0], block[0] + 17))
        assert ports.choose(folder, 17, recorded=block, public=8000) == block


def test_a_port_on_which_somebody_listens_is_not_chosen(tmp_path: Path) -> None:
    folder = farm(tmp_path, "a")
    block = ports.choose(folder, 5, public=8000)
    with socket.create_server(("127.0.0.1", block[2])):
        assert not ports.is_free(block[2])
        other = ports.choose(folder, 5, recorded=block, public=8000)
        assert block[2] not in other
    assert ports.is_free(block[2])


def test_a_recorded_block_that_another_farm_took_is_given_up(tmp_path: Path) -> None:
    first, second = farm(tmp_path, "a"), farm(tmp_path, "b")
    block = ports.choose(first, 5, public=8000)
    assert set(ports.choose(second, 5, recorded=block, public=8000)).isdisjoint(block)


def test_released_blocks_and_those_of_farms_that_are_gone_are_free_again(tmp_path: Path) -> None:
    first, second, third = (farm(tmp_path, name) for name in "abc")
    block = ports.choose(first, 5, public=8000)
    ports.release(first)
    assert ports.choose(second, 5, recorded=block, public=8000) == block
    second.rmdir()
    assert ports.choose(third, 5, recorded=block, public=8000) == block


def test_a_corrupt_registry_holds_nothing_up(tmp_path: Path) -> None:
    ports.registry_file().write_text("{not json")
    block = ports.choose(farm(tmp_path, "a"), 5, public=8000)
    assert json.loads(ports.registry_file().read_text()) == {str(tmp_path / "a"): list(block)}


def test_no_room_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="free ports"):
        ports.choose(farm(tmp_path, "a"), 20_000, public=8000)


def test_the_public_port_is_no_slots(tmp_path: Path) -> None:
    folder = farm(tmp_path, "a")
    block = ports.choose(folder, 5, public=8000)
    other = ports.choose(folder, 5, recorded=block, public=block[2])
    assert block[2] not in other


# Held ports


@pytest.fixture
def held() -> Iterator[ports.HeldPorts]:
    made = ports.HeldPorts()
    yield made
    for port in list(made._sockets):
        made.release(port)


def test_a_held_port_refuses_connections_and_is_free_after_its_release(
    held: ports.HeldPorts,
) -> None:
    port = free_port()
    assert held.hold(port)
    assert held.hold(port), "again is fine"
    assert not listens(port)
    with pytest.raises(OSError, match="in use"):
        socket.create_server(("127.0.0.1", port))
    held.release(port)
    held.release(port)
    with socket.create_server(("127.0.0.1", port)):
        assert not held.hold(port), "something else has it"
    assert held.hold(port)


def test_a_port_is_held_while_connections_of_its_last_server_linger(held: ports.HeldPorts) -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", port)) as server:
        clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
        accepted = [server.accept()[0] for _ in clients]
        for connection in accepted:  # who closes first keeps the port in TIME_WAIT
            connection.close()
        for client in clients:
            assert client.recv(1) == b""
            client.close()
    lingering = [c for c in psutil.net_connections("tcp4") if c.laddr and c.laddr.port == port]
    assert {connection.status for connection in lingering} == {psutil.CONN_TIME_WAIT}
    assert held.hold(port)
    assert "127.0.0.1 address" not in takers(port), "nothing gets past it by the same option"


TAKE = """
import itertools, os, socket, sys
port, user = int(sys.argv[1]), int(sys.argv[2])
if user:
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
options = [socket.SO_REUSEADDR, socket.SO_REUSEPORT]
chosen = [combination for n in range(3) for combination in itertools.combinations(options, n)]
names = {socket.SO_REUSEADDR: "address", socket.SO_REUSEPORT: "port"}
hosts = ["127.0.0.1", "0.0.0.0", "::ffff:127.0.0.1", "::"]
for host, combination in itertools.product(hosts, chosen):
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as taken:
        if host == "::":
            taken.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        for option in combination:
            taken.setsockopt(socket.SOL_SOCKET, option, 1)
        try:
            taken.bind((host, port))
            taken.listen()
        except OSError:
            continue
        print(host, *(names[option] for option in combination))
"""


def takers(port: int, user: int = 0) -> set[str]:
    """How another process can listen on a port: hosts with the options that it has to set."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", TAKE, str(port), str(user)],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    return set(done.stdout.splitlines())


def test_of_this_user_only_a_process_that_shares_the_port_can_listen_on_it(
    held: ports.HeldPorts,
) -> None:
    port = free_port()
    assert "127.0.0.1" in takers(port), "nothing is held yet"
    held.hold(port)
    assert {line.partition(" ")[2] for line in takers(port)} == {"port", "address port"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_cannot_listen_on_a_held_port_with_any_option(held: ports.HeldPorts) -> None:
    port = free_port()
    assert "127.0.0.1" in takers(port, user=65534), "nothing is held yet"
    held.hold(port)
    assert takers(port, user=65534) == set()


def test_a_server_that_shares_the_port_serves_on_it_alone(held: ports.HeldPorts) -> None:
    """The holder never listens, so the kernel gives it no connection."""
    port = free_port()
    held.hold(port)
    code = (
        "import http.server, socket, sys\n"
        "class Server(http.server.HTTPServer):\n"
        "    allow_reuse_port = True\n"
        "    def server_bind(self):\n"
        "        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)\n"
        "        super().server_bind()\n"
        "Server(('127.0.0.1', int(sys.argv[1])), http.server.SimpleHTTPRequestHandler)"
        ".serve_forever()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-I", "-c", code, str(port)], stderr=subprocess.DEVNULL, cwd="/"
    ) as server:
        try:
            until(lambda: listens(port), "it listens")
            statuses = [httpx.head(f"http://127.0.0.1:{port}/").status_code for _ in range(50)]
            assert set(statuses) == {200}
        finally:
            server.kill()
    assert not listens(port)
    assert not ports.is_free(port), "it is held on"


# Farms that grow


def test_a_farm_that_grows_keeps_its_ports_and_adds_others(tmp_path: Path) -> None:
    first, second = farm(tmp_path, "a"), farm(tmp_path, "b")
    block = ports.choose(first, 4, public=8000)
    other = ports.choose(second, 200, public=8001)
    # The other one's block may lie anywhere: put it right behind, where the first would go on.
    behind = tuple(range(block[-1] + 1, block[-1] + 21))
    registry = json.loads(ports.registry_file().read_text())
    registry[str(second)] = [*other, *behind]
    ports.registry_file().write_text(json.dumps(registry))
    public = behind[-1] + 1
    with socket.create_server(("127.0.0.1", public + 1)):
        grown = ports.extend(first, block, 9, public=public)
    assert grown[:4] == block
    assert len(set(grown)) == 9
    assert set(grown).isdisjoint({*other, *behind, public, public + 1})
    assert json.loads(ports.registry_file().read_text())[str(first)] == list(grown)
    assert ports.extend(first, grown, 9, public=8000) == grown
    assert ports.extend(first, grown, 3, public=8000) == grown, "a smaller plan gives none back"
    assert set(ports.choose(farm(tmp_path, "c"), 50, public=8002)).isdisjoint(grown)


def test_held_ports_of_this_farm_are_no_obstacle_to_its_growth(
    tmp_path: Path, held: ports.HeldPorts
) -> None:
    folder = farm(tmp_path, "a")
    block = ports.choose(folder, 4, public=8000)
    assert all(held.hold(port) for port in block)
    assert ports.extend(folder, block, 6, public=8000)[:4] == block


def test_more_ports_than_there_are_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="more free ports"):
        ports.extend(farm(tmp_path, "a"), (20001,), 20_000, public=8000)
