"""Rejections by a worker are retried on the next worker; responses of the model are not."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.workers.harness import TIMEOUT, WorkerProcess, eventually
from workers.http.app import build_app
from workers.http.metrics import Metrics
from workers.http.state import WorkerState
from workers.model.loader import load
from workers.model.spec import Spec
from workers.queueing.queue import RequestQueue

BALANCED = {"X-Farm-Request": "0123456789abcdef" * 2}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    with WorkerProcess(
        tmp_path_factory.mktemp("answers"), "tests.workers.models.plain:Answers"
    ) as worker:
        yield worker


def test_full_queue_is_502_for_the_balancer_and_429_for_others(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with (
        WorkerProcess(
            tmp_path, "tests.workers.models.plain:Slow", spec={"queue_size": 0}
        ) as worker,
        concurrent.futures.ThreadPoolExecutor(1) as callers,
    ):
        body = {"until": str(gate)}
        url = f"{worker.url}/predict"
        first = callers.submit(httpx.post, url, json=body, timeout=TIMEOUT)
        eventually(lambda: worker.running_and_waiting() == (1, 0), "the request")
        direct = worker.predict({})
        assert direct.status_code == 429
        assert "x-accel-redirect" not in direct.headers
        balanced = worker.predict({}, headers=BALANCED)
        assert balanced.status_code == 502
        assert balanced.headers["x-accel-redirect"] == "/.gpufarm/429"
        assert balanced.headers["retry-after"] == direct.headers["retry-after"]
        assert balanced.json() == direct.json()
        assert balanced.json()["error"]["code"] == "queue_full"
        assert worker.metric("gpufarm_requests_total", code="429") == 2
        assert worker.metric("gpufarm_requests_total", code="502") == 0
        gate.touch()
        assert first.result().status_code == 200


def test_a_closed_worker_is_502_for_the_balancer_at_once() -> None:
    with ThreadPoolExecutor(1) as executor:
        spec = Spec(target="tests.workers.models.plain:Echo")
        queue = RequestQueue(executor, spec.queue_size)
        loaded = load(spec, "cpu", executor)
        metrics = Metrics("w1", spec.name, queue)
        app = build_app(WorkerState("w1", spec, loaded, executor, executor, queue, metrics))

        async def asked() -> httpx.Response:
            queue.closed = True
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://w1") as client:
                return await client.post("/predict", json=1, headers=BALANCED)

        answer = asyncio.run(asked())
    assert answer.status_code == 502
    assert answer.headers["x-accel-redirect"] == "/.gpufarm/503"
    assert answer.headers["retry-after"] == "1"
    assert answer.json()["error"]["code"] == "worker_ending"


@pytest.mark.parametrize("raises", [True, False])
@pytest.mark.parametrize(("status", "leaves"), [(429, 429), (503, 503), (502, 500), (500, 500)])
def test_model_responses_are_not_retried(
    answers: WorkerProcess, raises: bool, status: int, leaves: int
) -> None:
    answer = answers.predict({"status": status, "raises": raises}, headers=BALANCED)
    assert answer.status_code == leaves
    assert "x-accel-redirect" not in answer.headers
    assert answer.headers.get("x-should-retry") == ("false" if leaves == 500 else None)
    assert ("says the model" if raises else "made") in answer.text


def test_model_cannot_control_the_balancer(answers: WorkerProcess) -> None:
    headers: dict[str, Any] = {
        "X-Accel-Redirect": "/.gpufarm/429",
        "x-accel-limit-rate": "1",
        "X-Kind": "kept",
    }
    answer = answers.predict({"status": 200, "headers": headers})
    assert answer.headers["x-kind"] == "kept"
    assert not [name for name in answer.headers if name.startswith("x-accel")]


def test_failed_model_tells_clients_not_to_retry(tmp_path: Path) -> None:
    with WorkerProcess(tmp_path, "tests.workers.models.plain:Faulty") as worker:
        answer = worker.predict({"kind": "value"})
        assert answer.status_code == 500
        assert answer.headers["x-should-retry"] == "false"
