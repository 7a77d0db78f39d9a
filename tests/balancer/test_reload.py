"""nginx takes a changed file while clients with kept connections go on asking."""

from __future__ import annotations

import hashlib
import http.client
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from balancer import reload as nginx_reload
from balancer.configuration import CLOSING, CONF, write
from tests.balancer.harness import BalancerHarness, error_of, make_balancer
from tests.waiting import until

MEGABYTE = 2**20
CLIENTS = 12
RELOADS = 30


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[BalancerHarness]:
    """Three slots, of which w1 and w2 are there."""
    made = make_balancer(tmp_path, slots=3)
    made.start_worker("w1")
    made.start_worker("w2")
    made.start()
    yield made
    made.stop()


def test_the_new_file_holds_when_the_reload_returns(pair: BalancerHarness) -> None:
    for limit, status in ((1000, 413), (4000, 200), (1000, 413)):
        assert write(replace(pair.config, body_limit=limit))
        assert nginx_reload.reload(pair.config.prefix)
        for _ in range(8):
            assert httpx.post(f"{pair.url}/size", content=b"x" * 2000).status_code == status
        assert not (pair.config.prefix / CLOSING).exists()


def test_reloads_lose_no_request(pair: BalancerHarness) -> None:
    """With SIGHUP alone about one request is lost in eight reloads."""
    ended = threading.Event()
    lost: list[str] = []
    answered = [0] * CLIENTS

    def ask(number: int) -> None:
        # Unlike other clients this one does not look whether its connection has been closed.
        client = http.client.HTTPConnection("127.0.0.1", pair.config.port, timeout=30)
        while not ended.is_set():
            try:
                client.request("POST", "/work?seconds=0.005", body=b"x" * 100)
                answer = client.getresponse()
                answer.read()
                if answer.status != 200:
                    lost.append(str(answer.status))
            except (OSError, http.client.HTTPException) as problem:
                lost.append(repr(problem))
                client.close()
            answered[number] += 1
        client.close()

    with ThreadPoolExecutor(CLIENTS) as pool:
        running = [pool.submit(ask, number) for number in range(CLIENTS)]
        try:
            until(lambda: all(answered), "every client is served")
            for _ in range(RELOADS):
                assert nginx_reload.reload(pair.config.prefix)
                goal = sum(answered) + CLIENTS
                while sum(answered) < goal and not lost:
                    time.sleep(0.01)
        finally:
            ended.set()
        for task in running:
            task.result()
    assert lost == []
    assert sum(answered) > RELOADS * CLIENTS


def test_a_used_connection_is_closed_before_the_reload(
    pair: BalancerHarness,
) -> None:
    client = http.client.HTTPConnection("127.0.0.1", pair.config.port, timeout=30)

    def ask() -> str | None:
        client.request("POST", "/work?seconds=0", body=b"x")
        answer = client.getresponse()
        answer.read()
        return answer.getheader("Connection")

    assert ask() == "keep-alive"
    with ThreadPoolExecutor(1) as pool:
        done: Future[bool] = pool.submit(nginx_reload.reload, pair.config.prefix)
        until((pair.config.prefix / CLOSING).exists, "it has begun", every=0.001)
        assert ask() == "close"
        assert done.result()
    assert ask() == "keep-alive"
    client.close()


@pytest.fixture
def closing(pair: BalancerHarness) -> BalancerHarness:
    """As nginx is while it is about to be reloaded."""
    (pair.config.prefix / CLOSING).touch()
    return pair


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_requests_during_a_reload_are_unchanged(closing: BalancerHarness, method: str) -> None:
    path = "/refuse/503?only=w1&q=%C3%A4%2F"
    answer = httpx.request(method, closing.url + path, content=b"b" * 100_000)
    assert answer.status_code == 200
    assert answer.json()["method"] == method
    assert answer.json()["path"] == path
    assert answer.json()["sha256"] == hashlib.sha256(b"b" * 100_000).hexdigest()
    assert answer.headers["Connection"] == "close"
    assert answer.headers["X-Worker-Id"] == "w2"


def test_meanwhile_streams_and_large_bodies_pass(closing: BalancerHarness) -> None:
    arrivals = []
    with httpx.stream("GET", f"{closing.url}/stream?n=4&seconds=0.3&now=1") as answer:
        for chunk in answer.iter_raw():
            arrivals.append((time.monotonic(), chunk))
    assert b"".join(chunk for _, chunk in arrivals) == b"0\n1\n2\n3\n"
    assert arrivals[-1][0] - arrivals[0][0] > 0.5
    body = os.urandom(MEGABYTE) * 20
    sized = httpx.post(f"{closing.url}/size", content=body, timeout=60)
    assert sized.json() == {"bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}


def test_meanwhile_a_client_is_told_to_send_its_body(closing: BalancerHarness) -> None:
    with socket.create_connection(("127.0.0.1", closing.config.port), timeout=20) as connection:
        head = b"POST /size HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n"
        connection.sendall(head + b"Expect: 100-continue\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 100 Continue\r\n")
        connection.sendall(b"abc")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 OK\r\n")


def test_meanwhile_errors_are_those_of_any_time(closing: BalancerHarness) -> None:
    assert httpx.post(f"{closing.url}/refuse/429").json()["error"]["code"] == "queue_full"
    assert httpx.post(f"{closing.url}/status/503").json()["error"] == {"message": "so asked"}
    too_large = httpx.post(f"{closing.url}/size", content=b"x" * (65 * MEGABYTE), timeout=60)
    assert error_of(too_large)["code"] == "body_too_large"
    assert error_of(httpx.request("FOO", closing.url))["code"] == "method_not_allowed"
    for name in ("w1", "w2"):
        closing.stop_worker(name)
    nowhere = httpx.post(f"{closing.url}/work")
    assert nowhere.status_code == 503
    assert error_of(nowhere)["code"] == "no_worker"


def test_a_file_that_nginx_refuses_changes_nothing(
    pair: BalancerHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nginx_reload, "START_SECONDS", 1.0)
    conf = pair.config.prefix / CONF
    conf.write_text(conf.read_text().replace("least_conn;", "no_such_directive;"))
    assert not nginx_reload.reload(pair.config.prefix)
    assert not (pair.config.prefix / CLOSING).exists()
    assert httpx.post(f"{pair.url}/work").status_code == 200


def test_where_no_nginx_runs_nothing_is_reloaded(tmp_path: Path) -> None:
    assert not nginx_reload.reload(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_reload_left_is_removed(tmp_path: Path) -> None:
    made = make_balancer(tmp_path)
    flag = tmp_path / CLOSING
    flag.touch()
    nginx_reload.remove_abandoned_flag(tmp_path)
    assert flag.exists(), "a reload may be under way"
    os.utime(flag, (0, 0))
    nginx_reload.remove_abandoned_flag(tmp_path)
    assert not flag.exists()
    nginx_reload.remove_abandoned_flag(tmp_path)
    flag.touch()
    made.start()
    try:
        assert not flag.exists(), "an nginx that starts has no connections to end"
    finally:
        made.stop()
