"""What nginx sends on to the next worker, and what the caller gets when no worker takes it."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.balancer.harness import BalancerHarness, error_of, make_balancer
from tests.waiting import until

CODES = {429: "queue_full", 503: "no_worker"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BalancerHarness]:
    """Two slots, both taken: the last attempt always meets a worker."""
    made = make_balancer(tmp_path_factory.mktemp("nginx"), slots=2)
    made.start_worker("w1")
    made.start_worker("w2")
    made.start()
    yield made
    made.stop()


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[BalancerHarness]:
    """Three slots, all empty."""
    made = make_balancer(tmp_path, slots=3)
    made.start()
    yield made
    made.stop()


@pytest.fixture
def external(tmp_path: Path) -> Iterator[BalancerHarness]:
    made = make_balancer(tmp_path, slots=2, own_workers=False)
    made.start_worker("w1")
    made.start_worker("w2")
    made.start()
    yield made
    made.stop()


def logged(where: BalancerHarness, id_: str) -> dict[str, Any]:
    """The access log's entry of one request."""

    def entry() -> dict[str, Any] | None:
        lines = (where.config.prefix / "logs/nginx-access.log").read_text().splitlines()
        entries = [json.loads(line) for line in lines]
        return next((entry for entry in entries if entry["request_id"] == id_), None)

    found = until(entry, "the request is logged")
    assert found is not None
    return found


@pytest.mark.parametrize("code", CODES)
def test_when_each_worker_refuses_the_last_one_decides(pair: BalancerHarness, code: int) -> None:
    body = b"b" * 300_000
    answer = httpx.post(
        f"{pair.url}/refuse/{code}", content=body, headers={"X-Request-ID": f"r-{code}"}
    )
    assert answer.status_code == code
    assert answer.headers["Retry-After"] == "7", "the refusing worker's own"
    assert answer.headers["X-Request-ID"] == f"r-{code}"
    assert "X-Accel-Redirect" not in answer.headers
    assert answer.json()["error"]["code"] == CODES[code]
    entry = logged(pair, answer.headers["X-Request-ID"])
    assert (entry["method"], entry["status"]) == ("POST", code)
    assert entry["upstream_status"] == "502, 502"


def test_a_refused_request_is_sent_on_with_its_body(pair: BalancerHarness) -> None:
    body = b"b" * 300_000
    for _ in range(8):
        answer = httpx.post(f"{pair.url}/refuse/429?only=w1", content=body)
        assert (answer.status_code, answer.json()["id"]) == (200, "w2")
        assert answer.json()["sha256"] == hashlib.sha256(body).hexdigest()


@pytest.mark.parametrize("code", CODES)
def test_a_models_own_429_or_503_is_not_retried(pair: BalancerHarness, code: int) -> None:
    for number in range(8):
        name = f"own-{code}-{number}"
        answer = httpx.post(f"{pair.url}/status/{code}", headers={"X-Request-ID": name})
        assert answer.status_code == code
        assert answer.json()["error"] == {"message": "so asked"}
        assert answer.headers["Retry-After"] == "7"
        assert answer.headers["X-Worker-Id"] == answer.json()["id"]
        assert logged(pair, name)["upstream_status"] == str(code)


def test_a_refusal_and_then_empty_slots_is_429(alone: BalancerHarness) -> None:
    alone.start_worker("w2")
    for _ in range(12):
        answer = httpx.post(f"{alone.url}/refuse/429")
        assert answer.status_code == 429
        assert int(answer.headers["Retry-After"]) >= 1
        assert answer.json()["error"]["code"] == "queue_full"


def test_empty_slots_alone_are_503(alone: BalancerHarness) -> None:
    answer = httpx.post(f"{alone.url}/predict")
    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) >= 1
    assert error_of(answer)["code"] == "no_worker"


def test_a_worker_that_dies_and_then_empty_slots_is_503(alone: BalancerHarness) -> None:
    alone.start_worker("w2")
    answer = httpx.post(f"{alone.url}/refuse/429?end=w2")
    assert answer.status_code == 503
    alone.running.pop("w2").wait(20)


@pytest.mark.parametrize(
    ("target", "code"),
    [
        ("/.gpufarm/ended", 429),
        ("/.gpufarm/400", 400),
        ("/.gpufarm/none", 404),
        ("@nowhere", 500),
        ("/../../etc/passwd", 404),
        ("/workers", 404),
        ("/livez", 200),
    ],
)
def test_a_model_can_steer_nginx_only_to_what_is_public(
    pair: BalancerHarness, target: str, code: int
) -> None:
    """Each answer is one that any caller can get, or an error of nginx's."""
    answer = httpx.post(f"{pair.url}/steer", params={"to": target})
    assert answer.status_code == code
    assert "root:" not in answer.text


def test_a_model_that_steers_to_itself_ends(pair: BalancerHarness) -> None:
    """In an answer of nginx's own wording: after ten redirects it follows no error page either."""
    assert httpx.post(f"{pair.url}/steer").status_code == 500


def test_an_external_servers_answer_steers_nothing(external: BalancerHarness) -> None:
    for target in ("/.gpufarm/429", "/livez", "/status/418"):
        answer = httpx.post(f"{external.url}/steer", params={"to": target})
        assert answer.status_code == 200
        assert set(answer.json()) == {"pid", "id"}
        assert "X-Accel-Redirect" not in answer.headers


@pytest.mark.parametrize("code", CODES)
def test_what_an_external_server_refuses_is_sent_on(external: BalancerHarness, code: int) -> None:
    for _ in range(6):
        answer = httpx.post(f"{external.url}/status/{code}?only=w1")
        assert (answer.status_code, answer.json()["id"]) == (200, "w2")


@contextmanager
def dying(ports: list[int], hold: Callable[[], None]) -> Iterator[list[bytes]]:
    """Workers that read a request, hold it and end its connection; the requests' heads."""
    heads: list[bytes] = []
    servers = [socket.create_server(("127.0.0.1", port)) for port in ports]

    def serve(server: socket.socket) -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                heads.append(connection.recv(65536))
                hold()

    threads = [threading.Thread(target=serve, args=(server,)) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield heads
    finally:
        for server in servers:
            server.shutdown(socket.SHUT_RDWR)
            server.close()
        for thread in threads:
            thread.join()


def test_each_attempt_of_a_request_carries_the_same_start(alone: BalancerHarness) -> None:
    with dying(list(alone.ports.values()), lambda: time.sleep(0.05)) as heads:
        assert httpx.post(f"{alone.url}/predict").status_code == 503
    assert len(heads) == 3
    starts = {line for head in heads for line in head.split(b"\r\n") if b"X-Request-Start" in line}
    assert len(starts) == 1


def test_a_request_is_not_sent_again_after_its_deadline(tmp_path: Path) -> None:
    made = make_balancer(tmp_path, slots=6, request_timeout=0.5)
    made.start()
    try:
        with dying(list(made.ports.values()), lambda: time.sleep(0.3)) as heads:
            answer = httpx.post(f"{made.url}/predict")
    finally:
        made.stop()
    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) >= 1
    assert 1 <= len(heads) <= 2, "the second attempt began before 0.5 s, a third would not"
