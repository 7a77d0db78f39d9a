"""A real nginx in front of real servers that know nothing of it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from balancer import processes
from balancer.start import port_is_free
from tests.balancer.harness import BalancerHarness, error_of, make_balancer, raw
from tests.waiting import listens, until

MEGABYTE = 2**20


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BalancerHarness]:
    """Four slots, of which w1 and w3 are there."""
    made = make_balancer(tmp_path_factory.mktemp("nginx"))
    made.start_worker("w1")
    made.start_worker("w3")
    made.start()
    yield made
    made.stop()


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[BalancerHarness]:
    made = make_balancer(tmp_path)
    yield made
    made.stop()


def test_a_request_finds_a_worker_beside_empty_slots(shared: BalancerHarness) -> None:
    with httpx.Client(base_url=shared.url) as client:
        answers = [client.post("/work?seconds=0") for _ in range(40)]
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.headers["X-Worker-Id"] for answer in answers} == {"w1", "w3"}
    assert all(answer.headers["X-Worker-Id"] == answer.json()["id"] for answer in answers)


def test_requests_spread_by_connections(shared: BalancerHarness) -> None:
    def call(_: int) -> str:
        return str(httpx.post(f"{shared.url}/work?seconds=0.3").headers["X-Worker-Id"])

    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            assert set(pool.map(call, range(2))) == {"w1", "w3"}


def test_request_ids(shared: BalancerHarness) -> None:
    with httpx.Client(base_url=shared.url) as client:
        taken = client.get("/headers", headers={"X-Request-ID": "abc-1.2:3"})
        assert taken.headers.get_list("X-Request-ID") == ["abc-1.2:3"]
        assert taken.json()["X-Request-ID"] == "abc-1.2:3"
        for odd in ("a b", 'quote"', "x" * 129, "ä".encode().decode("latin-1")):
            made = client.get("/headers", headers={b"X-Request-ID": odd.encode("latin-1")})
            assert len(made.headers["X-Request-ID"]) == 32
            assert made.json()["X-Request-ID"] == made.headers["X-Request-ID"]
        assert float(made.json()["X-Request-Start"]) == pytest.approx(time.time(), abs=60)


def test_no_worker_is_503_with_retry_after(alone: BalancerHarness) -> None:
    alone.start()
    for method, path in (("GET", "/v1/models"), ("POST", "/predict"), ("GET", "/readyz")):
        answer = httpx.request(method, alone.url + path, headers={"X-Request-ID": "mine"})
        assert answer.status_code == 503
        assert int(answer.headers["Retry-After"]) >= 1
        assert answer.headers["X-Request-ID"] == "mine"
        assert error_of(answer)["code"] == "no_worker"
    assert httpx.get(f"{alone.url}/livez").status_code == 200


@pytest.mark.parametrize("code", [400, 404, 409, 422, 429, 500, 503, 504])
def test_a_models_own_answer_passes_unchanged(shared: BalancerHarness, code: int) -> None:
    answer = httpx.post(f"{shared.url}/status/{code}")
    assert answer.status_code == code
    assert answer.json()["error"] == {"message": "so asked"}


def test_errors_of_nginx_itself_are_json(shared: BalancerHarness) -> None:
    too_large = httpx.post(f"{shared.url}/size", content=b"x" * (65 * MEGABYTE), timeout=60)
    assert too_large.status_code == 413
    assert error_of(too_large)["code"] == "body_too_large"
    too_long = httpx.get(f"{shared.url}/{'x' * 40000}")
    assert too_long.status_code == 414
    assert error_of(too_long)["code"] == "uri_too_long"
    too_much = httpx.get(f"{shared.url}/work", headers={"X-Much": "x" * 40000})
    assert too_much.status_code == 400
    assert error_of(too_much)["code"] == "bad_request"
    assert error_of(httpx.post(f"{shared.url}/health"))["code"] == "method_not_allowed"
    assert httpx.get(f"{shared.url}/.gpufarm/503").status_code == 404
    for nonsense in (b"GET / HTTP/9.9\r\n\r\n", b"NOTHING\r\n\r\n", b"G\0T / HTTP/1.1\r\n\r\n"):
        assert b"<html" not in raw(shared, nonsense)
    coded = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: odd\r\n\r\n"
    assert b"<html" not in raw(shared, coded)


def test_an_answer_that_does_not_come_is_504(tmp_path: Path) -> None:
    made = make_balancer(tmp_path, slots=1, request_timeout=0.5, grace=0.5)
    try:
        made.start_worker("w1")
        made.start()
        answer = httpx.post(f"{made.url}/work?seconds=5")
        assert answer.status_code == 504
        assert error_of(answer)["code"] == "timeout"
    finally:
        made.stop()


def test_a_stream_arrives_as_it_is_made(shared: BalancerHarness) -> None:
    arrivals = []
    with httpx.stream("GET", f"{shared.url}/stream?n=4&seconds=0.3&now=1") as answer:
        for chunk in answer.iter_raw():
            arrivals.append((time.monotonic(), chunk))
    assert b"".join(chunk for _, chunk in arrivals) == b"0\n1\n2\n3\n"
    assert arrivals[-1][0] - arrivals[0][0] > 0.5


def test_a_stream_of_an_external_server_is_not_buffered(tmp_path: Path) -> None:
    made = make_balancer(tmp_path, slots=1, own_workers=False)
    try:
        made.start_worker("w1")
        made.start()
        begun = time.monotonic()
        with httpx.stream("GET", f"{made.url}/stream?n=4&seconds=0.4") as answer:
            first = next(answer.iter_raw())
            waited = time.monotonic() - begun
        assert first == b"0\n"
        assert waited < 1.0
    finally:
        made.stop()


def test_a_server_of_one_connection_at_a_time_is_never_held(tmp_path: Path) -> None:
    """As Python's own HTTPServer is: an idle connection kept to it would block all others."""

    class Answer(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

    made = make_balancer(tmp_path, slots=1, own_workers=False, processes=4)
    made.start()
    try:
        with HTTPServer(("127.0.0.1", made.ports["w1"]), Answer) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            # Every one by a connection of its own, so that any of nginx's processes may get it.
            codes = [httpx.get(f"{made.url}/x", timeout=15).status_code for _ in range(30)]
            server.shutdown()
    finally:
        made.stop()
    assert codes == [200] * 30


def test_a_large_answer_arrives_whole(shared: BalancerHarness) -> None:
    answer = httpx.get(f"{shared.url}/big?bytes={20 * MEGABYTE}", timeout=60)
    assert len(answer.content) == 20 * MEGABYTE


def test_the_admin_interface_cannot_be_reached(shared: BalancerHarness) -> None:
    """What the controller would answer at its socket never comes out of the public port."""
    with listener(shared.config.admin_socket) as seen:
        for path in ("/workers", "/workers/w1/drain", "/workers/../readyz", "//health", "/plan"):
            raw(shared, f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode())
        for path in ("/readyz?x=1", "/workers/../metrics", "/health"):
            raw(shared, f"GET {path} HTTP/1.1\r\nHost: evil.example\r\n\r\n".encode())
    lines = [request.split(b"\r\n")[0] for request in seen]
    assert lines == [b"GET /readyz?x=1 HTTP/1.1", b"GET /metrics HTTP/1.1", b"GET /health HTTP/1.1"]
    assert all(b"Host: 127.0.0.1\r\n" in request for request in seen)


@contextmanager
def listener(path: Path) -> Iterator[list[bytes]]:
    """A controller that answers 200 to everything and remembers what it was asked."""
    seen: list[bytes] = []
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen()

    def answer() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                seen.append(connection.recv(65536))
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        yield seen
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        path.unlink()
        thread.join()


def test_without_the_controller_a_worker_answers_for_the_farm(shared: BalancerHarness) -> None:
    answer = httpx.get(f"{shared.url}/metrics")
    assert answer.text.startswith("<style>"), "the stand-in's own"
    assert answer.headers["X-Worker-Id"] in ("w1", "w3")


def test_a_post_is_replayed_when_its_worker_dies(alone: BalancerHarness) -> None:
    alone.start_worker("w1")
    alone.start_worker("w2")
    alone.start()
    with httpx.Client(base_url=alone.url) as client:
        while alone.running["w1"].poll() is None:
            answer = client.post("/end?only=w1", content=b"b" * 300_000)
            assert (answer.status_code, answer.json()["id"]) == (200, "w2")
    alone.running.pop("w1")


def test_workers_come_and_go_without_a_loss(alone: BalancerHarness) -> None:
    for name in ("w1", "w2", "w3"):
        alone.start_worker(name)
    alone.start()
    ended = threading.Event()
    codes: list[int] = []

    def load() -> None:
        with httpx.Client(base_url=alone.url) as client:
            while not ended.is_set():
                codes.append(client.post("/work?seconds=0.01").status_code)

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(load) for _ in range(4)]
        try:
            for name in ("w1", "w2", "w3"):
                alone.stop_worker(name)
                alone.start_worker(name)
        finally:
            ended.set()
        for task in running:
            task.result()
    assert set(codes) == {200}
    assert len(codes) > 50


def test_the_access_log_is_json_with_the_workers_times(shared: BalancerHarness) -> None:
    httpx.post(f"{shared.url}/work?seconds=0.05", headers={"X-Request-ID": "look-for-me"})

    def line() -> dict[str, Any] | None:
        text = (shared.config.prefix / "logs/nginx-access.log").read_text()
        entries = [json.loads(entry) for entry in text.splitlines()]
        return next((entry for entry in entries if entry["request_id"] == "look-for-me"), None)

    entry = until(line, "the request is logged")
    assert entry is not None
    assert entry["status"] == 200
    assert entry["worker"] in ("w1", "w3")
    assert entry["seconds"] >= 0.05
    assert float(entry["upstream_seconds"].split(", ")[-1]) >= 0.05


@pytest.mark.parametrize("who", ["master", "process"])
def test_service_is_back_after_a_kill(alone: BalancerHarness, who: str) -> None:
    alone.start_worker("w1")
    alone.start()
    assert alone.master is not None
    old = processes.all_members(alone.config.prefix)
    others = [pid for pid in old if pid != alone.master.pid]
    assert others
    if who == "process":
        os.kill(others[0], signal.SIGKILL)
    else:
        alone.master.kill()
        alone.master.wait(10)
        assert listens(alone.config.port), "its processes hold the port"
        alone.start()  # what the supervisor does
        prefix, pid = alone.config.prefix, alone.master.pid
        until(lambda: processes.running_master(prefix) == pid, "the new master is recorded")
        until(lambda: not set(others) & set(pids()), "the old processes have gone", 15)
    begun = time.monotonic()
    until(lambda: httpx.post(f"{alone.url}/work").status_code == 200, "service is back")
    assert time.monotonic() - begun < 2


def pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def test_only_processes_of_a_killed_master_are_ended(
    alone: BalancerHarness,
) -> None:
    alone.start()
    assert alone.master is not None
    stranger = subprocess.Popen(["sleep", "60"], process_group=alone.master.pid)
    try:
        alone.master.kill()
        alone.master.wait(10)
        found = processes.end(alone.config.prefix, graceful_seconds=5)
        assert found
        assert stranger.pid not in found
        assert stranger.poll() is None, "it is in the group, but nothing of ours"
        assert port_is_free("127.0.0.1", alone.config.port)
        assert processes.all_members(alone.config.prefix) == []
    finally:
        stranger.kill()
        stranger.wait()


def send_60_megabytes(where: BalancerHarness) -> None:
    body = os.urandom(MEGABYTE) * 60
    answer = httpx.post(f"{where.url}/size", content=body, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.json() == {
        "bytes": 60 * MEGABYTE,
        "sha256": hashlib.sha256(body).hexdigest(),
    }


def test_a_60_mb_body_goes_through(shared: BalancerHarness) -> None:
    send_60_megabytes(shared)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_60_mb_body_goes_through_as_another_user() -> None:
    # Not below pytest's folder, which only its own user may enter.
    folder = Path(tempfile.mkdtemp(prefix="gpufarm-test-"))
    try:
        made = make_balancer(folder, as_root=False)
        made.prefix_command = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups")
        for path in [folder, *folder.rglob("*")]:
            shutil.chown(path, 65534, 65534)
        made.start_worker("w2")
        made.start()
        try:
            send_60_megabytes(made)
            error_log = (folder / "logs/nginx-error.log").read_text()
            assert error_log == ""
        finally:
            made.stop()
    finally:
        shutil.rmtree(folder)
