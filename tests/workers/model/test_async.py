"""``async def`` in a model, in real workers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.workers.harness import WorkerProcess, eventually


@pytest.fixture(scope="module")
def awaiting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    folder = tmp_path_factory.mktemp("async")
    with WorkerProcess(folder, "tests.workers.models.plain:Async") as worker:
        yield worker


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("journal") / "journal"


@pytest.fixture(scope="module")
def streaming(tmp_path_factory: pytest.TempPathFactory, journal: Path) -> Iterator[WorkerProcess]:
    folder = tmp_path_factory.mktemp("async-stream")
    with WorkerProcess(
        folder, "tests.workers.models.plain:AsyncStream", {"journal": str(journal)}
    ) as worker:
        yield worker


def test_every_method_may_be_async_on_one_loop(awaiting: WorkerProcess) -> None:
    for word in ("a", "b"):
        assert awaiting.predict(word).json() == {"echo": word, "one_loop": True}
    report = awaiting.health()
    assert report["engine"] == "async"
    assert report["thread"].startswith("device")
    assert awaiting.client.get("/longest_request").json()["json"] == "longest"


def test_coroutine_errors_are_answered_like_any_other(awaiting: WorkerProcess) -> None:
    assert awaiting.predict("refuse").status_code == 400
    answer = awaiting.predict("fail")
    assert answer.status_code == 500
    assert "KeyError" in answer.json()["error"]["message"]
    assert "secret" not in answer.text
    assert awaiting.predict("a").status_code == 200


def test_an_async_generator_streams_in_one_task(streaming: WorkerProcess) -> None:
    answer = streaming.predict({"count": 3})
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert [json.loads(line) for line in answer.text.splitlines()] == [
        {"n": number, "one_task": True} for number in range(3)
    ]
    assert streaming.predict({"count": 0}).text == ""
    assert streaming.predict({"fail_at": 0}).status_code == 500
    with pytest.raises(httpx.RemoteProtocolError):
        streaming.predict({"fail_at": 2})


def test_item_is_sent_before_the_next_is_generated(
    streaming: WorkerProcess, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    request = {"count": 1, "until": str(gate)}
    with streaming.client.stream("POST", "/predict", json=request) as answer:
        lines = answer.iter_lines()
        assert json.loads(next(lines))["n"] == 0
        assert streaming.health()["running"] == 1
        gate.touch()
        assert all(json.loads(line) == {"tick": True} for line in lines)


def test_disconnect_closes_an_async_generator(
    streaming: WorkerProcess, journal: Path, tmp_path: Path
) -> None:
    before = journal.read_text().count("closed on device") if journal.exists() else 0
    request = {"count": 1, "until": str(tmp_path / "never")}
    with streaming.client.stream("POST", "/predict", json=request) as answer:
        next(answer.iter_lines())
    eventually(lambda: streaming.health()["running"] == 0, "the end of the call")
    eventually(
        lambda: journal.read_text().count("closed on device") == before + 1, "its finally block"
    )
    assert streaming.predict({"count": 1}).status_code == 200


def test_deadline_closes_an_async_generator(streaming: WorkerProcess, tmp_path: Path) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        streaming.predict({"until": str(tmp_path / "never")}, headers={"X-Request-Timeout": "0.3"})
    eventually(lambda: streaming.health()["running"] == 0, "the end of the call")


def test_async_speech(tmp_path: Path) -> None:
    with WorkerProcess(tmp_path, "tests.workers.models.speech:AsyncHum") as worker:
        answer = worker.client.post(
            "/v1/audio/speech", json={"input": "hello", "response_format": "pcm"}
        )
        assert len(answer.content) == 2 * 5 * 2400
        complete = {"input": "hello", "response_format": "wav", "stream": False}
        answer = worker.client.post("/v1/audio/speech", json=complete)
        assert answer.headers["x-audio-seconds"] == "0.500"
        worker.terminate()
        assert worker.wait() == 0
        assert "ResourceWarning" not in worker.log
