"""Disconnects, deadlines and full queues, over HTTP."""

from __future__ import annotations

import concurrent.futures
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.workers.harness import TIMEOUT, WorkerProcess, eventually


@pytest.fixture
def callers() -> Iterator[concurrent.futures.ThreadPoolExecutor]:
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        yield pool


class Slow(WorkerProcess):
    """A worker whose requests wait for a file, and note that they ran."""

    def __init__(self, folder: Path, model: str = "Slow", **spec: Any) -> None:
        self.journal = folder / "journal"
        self.gate = folder / "gate"
        super().__init__(
            folder, f"tests.workers.models.plain:{model}", {"journal": str(self.journal)}, spec=spec
        )

    def noted(self) -> list[str]:
        return self.journal.read_text().splitlines() if self.journal.exists() else []

    def held(self, name: str, **options: Any) -> httpx.Response:
        """One request that runs until the gate opens, on a connection of its own."""
        return httpx.post(
            f"{self.url}/predict",
            json={"name": name, "until": str(self.gate)},
            timeout=TIMEOUT,
            **options,
        )

    def sends(self, body: str) -> socket.socket:
        """A client on a bare socket, which can disconnect at any time."""
        host, port = self.url.removeprefix("http://").split(":")
        caller = socket.create_connection((host, int(port)), timeout=TIMEOUT)
        head = "POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        caller.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        return caller


def test_full_queue_responds_429_and_recovers(
    tmp_path: Path, callers: concurrent.futures.ThreadPoolExecutor
) -> None:
    with Slow(tmp_path, queue_size=1) as worker:
        admitted = [callers.submit(worker.held, str(number)) for number in range(2)]
        eventually(lambda: worker.running_and_waiting() == (1, 1), "a full queue")
        refused = worker.held("third")
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"
        assert worker.metric("gpufarm_requests_rejected_total", reason="queue_full") == 1
        assert worker.metric("gpufarm_queue_depth") == 1
        assert worker.metric("gpufarm_requests_in_progress") == 1
        worker.gate.touch()
        assert [answer.result().status_code for answer in admitted] == [200, 200]
        assert worker.held("fourth").status_code == 200
        assert "ran third" not in worker.noted()


def test_health_responds_while_the_model_is_busy(
    tmp_path: Path, callers: concurrent.futures.ThreadPoolExecutor
) -> None:
    with Slow(tmp_path) as worker:
        answer = callers.submit(worker.held, "long")
        eventually(lambda: worker.running_and_waiting() == (1, 0), "the request")
        assert worker.health()["status"] == "ready"
        assert worker.client.get("/readyz").status_code == 200
        assert not answer.done()
        worker.gate.touch()
        assert answer.result().status_code == 200


def test_disconnected_request_in_the_queue_never_runs(
    tmp_path: Path, callers: concurrent.futures.ThreadPoolExecutor
) -> None:
    with Slow(tmp_path) as worker:
        first = callers.submit(worker.held, "first")
        eventually(lambda: worker.health()["running"] == 1, "the first")
        with worker.sends('{"name": "left"}'):
            eventually(lambda: worker.running_and_waiting() == (1, 1), "the second in the queue")
        eventually(lambda: worker.health()["waiting"] == 0, "its disconnect")
        assert worker.metric("gpufarm_requests_cancelled_total", stage="waiting") == 1
        assert worker.metric("gpufarm_requests_total", code="499") == 1
        worker.gate.touch()
        assert first.result().status_code == 200
        assert worker.held("last").status_code == 200
        assert worker.noted() == ["ran first", "ran last"]


def test_disconnect_while_running_cancels_only_that_request(tmp_path: Path) -> None:
    with Slow(tmp_path) as worker:
        with worker.sends(f'{{"name": "left", "until": "{worker.gate}"}}'):
            eventually(lambda: worker.health()["running"] == 1, "it to run")
        eventually(
            lambda: worker.metric("gpufarm_requests_cancelled_total", stage="running") == 1,
            "the cancellation",
        )
        assert worker.health()["running"] == 1
        worker.gate.touch()
        eventually(lambda: worker.health()["running"] == 0, "its end")
        assert worker.held("next").status_code == 200


def test_disconnect_closes_the_generator_on_the_device_thread(tmp_path: Path) -> None:
    with Slow(tmp_path, "Counting") as worker:
        body = f'{{"until": "{worker.gate}"}}'
        with worker.sends(body) as caller:
            seen = b""
            while b"tick" not in seen:
                seen += caller.recv(4096)
        eventually(worker.noted, "the generator's end")
        assert worker.noted()[0].startswith("closed on device")
        assert not worker.gate.exists()
        assert worker.metric("gpufarm_requests_cancelled_total", stage="streaming") == 1


def test_deadline_in_the_queue_is_504_and_never_runs(
    tmp_path: Path, callers: concurrent.futures.ThreadPoolExecutor
) -> None:
    with Slow(tmp_path) as worker:
        first = callers.submit(worker.held, "first")
        eventually(lambda: worker.health()["running"] == 1, "the first")
        late = worker.held("late", headers={"X-Request-Timeout": "0.05"})
        assert late.status_code == 504
        assert late.json()["error"]["code"] == "deadline_passed"
        message = late.json()["error"]["message"]
        assert message.endswith("was waiting: the limit is 0.05 s (X-Request-Timeout).")
        assert late.headers["x-should-retry"] == "false"
        worker.gate.touch()
        assert first.result().status_code == 200
        assert worker.held("last").status_code == 200
        assert worker.noted() == ["ran first", "ran last"]


def test_configured_timeout_holds_while_running_and_cannot_be_extended(
    tmp_path: Path,
) -> None:
    with Slow(tmp_path, request_timeout=0.3) as worker:
        late = worker.held("late", headers={"X-Request-Timeout": "1000"})
        assert late.status_code == 504
        assert "0.3 s (workers.request_timeout)" in late.json()["error"]["message"]
        worker.gate.touch()
        eventually(lambda: worker.health()["running"] == 0, "the end of the late one")


def test_stream_is_cut_off_at_its_deadline(tmp_path: Path) -> None:
    with Slow(tmp_path, "Counting", request_timeout=1.0) as worker:
        try:
            late = worker.held("late")
        except httpx.RemoteProtocolError:
            assert "cut=504" in worker.log or eventually(lambda: "cut=504" in worker.log, "it")
        else:  # a machine so busy that not even the first item came in time
            assert late.status_code == 504
        eventually(worker.noted, "the generator's end")


def test_body_that_never_arrives_is_408(tmp_path: Path) -> None:
    with Slow(tmp_path, request_timeout=0.3) as worker:
        host, port = worker.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=TIMEOUT) as caller:
            caller.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc")
            assert caller.recv(100).startswith(b"HTTP/1.1 408")
        with socket.create_connection((host, int(port)), timeout=TIMEOUT) as caller:
            caller.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n")
            assert caller.recv(100).startswith(b"HTTP/1.1 408")
        with socket.create_connection((host, int(port)), timeout=TIMEOUT) as caller:
            caller.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc")
        assert worker.health()["running"] == 0


def test_retried_request_has_the_rest_of_its_time(tmp_path: Path) -> None:
    """The balancer's stamp stays the same when it tries the next worker."""
    with Slow(tmp_path, request_timeout=30.0) as worker:
        began = time.time()
        late = worker.held("late", headers={"X-Request-Start": f"{began - 29.7:.3f}"})
        assert late.status_code == 504
        assert time.time() - began < 25  # not after 30 s of its own
        assert "30 s" in late.json()["error"]["message"]
        worker.gate.touch()
        gone = worker.held("gone", headers={"X-Request-Start": f"{time.time() - 31:.3f}"})
        assert gone.status_code == 504
        assert "ran gone" not in worker.noted()


@pytest.mark.parametrize("offset", ["x", "nan", "inf", "-inf", 3600.0, -1e6, -1.7e9])
def test_implausible_request_start_is_ignored(tmp_path: Path, offset: str | float) -> None:
    with Slow(tmp_path) as worker:
        worker.gate.touch()
        stamp = offset if isinstance(offset, str) else f"{time.time() + offset:.3f}"
        assert worker.held("a", headers={"X-Request-Start": stamp}).status_code == 200
