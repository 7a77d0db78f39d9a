"""Slow and stalled readers of a stream: their cost for the worker and for other requests."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.workers.harness import TIMEOUT, WorkerProcess, eventually

MIB = 2**20
FLOOD = "tests.workers.models.plain:Flood"


@contextmanager
def reader(worker: WorkerProcess, path: str = "/predict", **body: Any) -> Iterator[socket.socket]:
    """A client with a small receive buffer that has read the first bytes of the response."""
    host, port = worker.url.removeprefix("http://").split(":")
    text = json.dumps(body)
    with socket.socket() as caller:
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
        caller.settimeout(TIMEOUT)
        caller.connect((host, int(port)))
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        caller.sendall(f"{head}Content-Length: {len(text)}\r\n\r\n{text}".encode())
        assert caller.recv(15) == b"HTTP/1.1 200 OK"
        yield caller


def test_stalled_reader_is_cut_off_and_counted(tmp_path: Path) -> None:
    """Its stream would be 2 GiB, of items larger than a minimum-rate reader takes in time."""
    with WorkerProcess(tmp_path, FLOOD) as worker:
        before = worker.health()["resident_bytes"]
        with reader(worker, count=1024, size=2 * MIB):
            most = 0

            def cut_off() -> float:
                nonlocal most
                most = max(most, worker.health()["resident_bytes"])
                return worker.metric("gpufarm_requests_cancelled_total", reason="slow_reader")

            assert eventually(cut_off, "the end of the slow reader's stream") == 1
            assert most - before < 64 * MIB
            assert worker.metric("gpufarm_requests_total", code="408") == 1
            eventually(
                lambda: worker.running_and_waiting() == (0, 0), "the end of the model's work"
            )
            assert worker.predict({"count": 1, "size": 3}).content == bytes(3)
        eventually(lambda: "cut=408" in worker.log, "its access log record")


def test_device_is_free_while_a_slow_reader_still_reads(tmp_path: Path) -> None:
    with (
        WorkerProcess(tmp_path, FLOOD) as worker,
        reader(worker, count=4, size=MIB) as caller,
    ):
        eventually(lambda: worker.running_and_waiting() == (0, 0), "the end of the model's work")
        assert worker.predict({"count": 1, "size": 3}).content == bytes(3)
        received = b""
        while not received.endswith(b"0\r\n\r\n"):
            received += caller.recv(MIB)
        assert received.count(b"\x03" * 1024) == 1024  # the complete last item


def test_deadline_ends_the_stream_of_a_stalled_reader(tmp_path: Path) -> None:
    with (
        WorkerProcess(tmp_path, FLOOD, spec={"request_timeout": 1.0}) as worker,
        reader(worker, count=1024, size=2 * MIB),
    ):
        eventually(
            lambda: worker.metric("gpufarm_requests_cancelled_total", reason="deadline") == 1,
            "the deadline",
        )
        assert worker.metric("gpufarm_requests_total", code="504") == 1
        eventually(lambda: worker.running_and_waiting() == (0, 0), "the end of the model's work")


def test_failed_encoder_cancels_the_model(tmp_path: Path) -> None:
    """The model would run for ever without a client."""
    with WorkerProcess(tmp_path, "tests.workers.models.speech:BrokenEncoder") as worker:
        body = {"input": "hi", "stream_format": "audio", "gate": str(tmp_path / "never")}
        with pytest.raises(httpx.RemoteProtocolError):
            worker.client.post("/v1/audio/speech", json=body)
        eventually(lambda: worker.running_and_waiting() == (0, 0), "the end of the model's work")
        assert worker.metric("gpufarm_requests_total", code="500") == 1
        assert "No space left on device" in worker.log
        complete = worker.client.post("/v1/audio/speech", json={"input": "hi", "stream": False})
        assert complete.json()["error"]["code"] == "worker_failed"
        assert complete.headers["x-should-retry"] == "false"
