"""/predict and the status routes, over HTTP."""

from __future__ import annotations

import http.client
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.workers.harness import TIMEOUT, WorkerProcess, eventually


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    folder = tmp_path_factory.mktemp("echo")
    with WorkerProcess(
        folder, "tests.workers.models.plain:Echo", spec={"body_limit": 100_000}
    ) as worker:
        yield worker


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    with WorkerProcess(
        tmp_path_factory.mktemp("faulty"), "tests.workers.models.plain:Faulty"
    ) as worker:
        yield worker


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    folder = tmp_path_factory.mktemp("counting")
    with WorkerProcess(folder, "tests.workers.models.plain:Counting") as worker:
        yield worker


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """The error, whose shape is always OpenAI's."""
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


def test_json_request_and_response(echo: WorkerProcess) -> None:
    answer = echo.predict({"a": [1, None, "é"]})
    assert answer.json() == {"echo": {"a": [1, None, "é"]}}
    assert answer.headers["content-type"] == "application/json"
    assert echo.predict("text").text == "plain text"
    assert echo.predict("device").json() == {"device": "cpu"}


def test_other_content_types_arrive_as_bytes(echo: WorkerProcess) -> None:
    answer = echo.client.post("/predict", content=b"abc", headers={"content-type": "image/png"})
    assert answer.content == b"cba"
    assert answer.headers["content-type"] == "application/octet-stream"
    assert echo.client.post("/predict", content=b"abc").content == b"cba"
    problem = {"content-type": "application/problem+json; charset=utf-8"}
    assert echo.client.post("/predict", content=b"3", headers=problem).json() == {"echo": 3}


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", ""])
def test_undeclared_json_is_parsed(echo: WorkerProcess, kind: str) -> None:
    """`curl -d '{"a": 1}'` calls its body a form."""
    headers = {"content-type": kind} if kind else {}
    for body, answer in ((b' {"a": 1}', b'{"echo":{"a":1}}'), (b"[2]", b'{"echo":[2]}')):
        assert echo.client.post("/predict", content=body, headers=headers).content == answer
    for body in (b"a=b", b"3", b"{no json"):
        assert echo.client.post("/predict", content=body, headers=headers).content == body[::-1]


def test_every_response_has_ids_and_timings(echo: WorkerProcess) -> None:
    answer = echo.predict(1, headers={"X-Request-ID": "abc-1.2"})
    assert answer.headers["x-worker-id"] == "w1"
    assert answer.headers["x-request-id"] == "abc-1.2"
    assert float(answer.headers["x-queue-time-ms"]) >= 0
    assert float(answer.headers["x-inference-time-ms"]) >= 0
    assert answer.headers["server-timing"].startswith("queue;dur=")
    eventually(
        lambda: "id=abc-1.2 method=POST path=/predict status=200" in echo.log,
        "its access log record",
    )
    made = echo.predict(1, headers={"X-Request-ID": "a b\tc"}).headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", made)


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (b"1e308", 1e308),
        (b"[0." + b"1" * 400 + b"]", [float("0." + "1" * 400)]),
        (b"1" * 308, int("1" * 308)),
        (b"0e99999", 0.0),
        (b'{"text": "1e999 ' + b"1" * 400 + b'"}', {"text": "1e999 " + "1" * 400}),
        (b'"\\ud83d\\ude00"', "\U0001f600"),
        ("é".encode("utf-16"), None),
    ],
)
def test_large_numbers_within_a_float_are_accepted(
    echo: WorkerProcess, body: bytes, value: Any
) -> None:
    content_type = {"content-type": "application/json"}
    answer = echo.client.post("/predict", content=body, headers=content_type)
    if value is None:
        assert answer.status_code == 400
    else:
        assert answer.json() == {"echo": value}


@pytest.mark.parametrize("body", [b"1e999", b"[-1E+400]", b"1" * 400, b"9" * 305 + b"e10"])
def test_a_number_beyond_a_float_is_400(echo: WorkerProcess, body: bytes) -> None:
    content_type = {"content-type": "application/json"}
    answer = echo.client.post("/predict", content=body, headers=content_type)
    assert answer.status_code == 400
    assert "beyond the range of a 64-bit float" in error_of(answer)["message"]


@pytest.mark.parametrize("encoding", ["gzip", "br", "x-gzip, identity"])
def test_a_compressed_body_is_415(echo: WorkerProcess, encoding: str) -> None:
    answer = echo.predict(1, headers={"Content-Encoding": encoding})
    assert answer.status_code == 415
    assert repr(encoding) in error_of(answer)["message"]
    assert answer.headers["accept-encoding"] == "identity"
    assert echo.predict(1, headers={"Content-Encoding": "identity"}).status_code == 200


@pytest.mark.parametrize(
    ("request_bytes", "words"),
    [
        (b"FROB /predict HTTP/1.1\r\nHost: x\r\n\r\n", "method"),
        ("GET /é HTTP/1.1\r\nHost: x\r\n\r\n".encode(), "url"),
        (b"GET /a\x01b HTTP/1.1\r\nHost: x\r\n\r\n", "url"),
        (b"GET /livez HTTP/1.1\r\nHo st: x\r\n\r\n", "header"),
        (b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: abc\r\n\r\n", "length"),
        (b"hello\r\n\r\n", "method"),
    ],
)
def test_invalid_http_is_answered_in_json(
    echo: WorkerProcess, request_bytes: bytes, words: str
) -> None:
    """No client sends these, so a socket does."""
    url = httpx.URL(echo.url)
    with socket.create_connection((url.host, url.port or 0), timeout=TIMEOUT) as connection:
        connection.sendall(request_bytes)
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        assert answer.status == 400
        assert answer.headers["content-type"] == "application/json"
        error = json.loads(answer.read())["error"]
        assert connection.recv(1) == b"", "it closes"
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == "invalid_http"
    assert words in error["message"].lower()


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff", b'"\xed\xa0\x80"', b"NaN", b"[" * 50_000, b"1" * 5000]
)
def test_bad_json_is_400(echo: WorkerProcess, body: bytes) -> None:
    answer = echo.client.post(
        "/predict", content=body, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400
    assert error_of(answer)["type"] == "invalid_request_error"


def test_a_large_body_is_413(echo: WorkerProcess) -> None:
    assert echo.client.post("/predict", content=b"x" * 100_000).status_code == 200
    answer = echo.client.post("/predict", content=b"x" * 100_001)
    assert answer.status_code == 413
    assert "100000 bytes" in error_of(answer)["message"]

    def pieces() -> Iterator[bytes]:
        for _ in range(30):
            yield b"x" * 10_000

    answer = echo.client.post("/predict", content=pieces())
    assert answer.status_code == 413
    assert echo.predict(1).status_code == 200


@pytest.mark.parametrize("value", ["x", "0", "-1", "nan", "inf"])
def test_a_wrong_timeout_header_is_400(echo: WorkerProcess, value: str) -> None:
    answer = echo.predict(1, headers={"X-Request-Timeout": value})
    assert answer.status_code == 400
    assert error_of(answer)["param"] == "X-Request-Timeout"


def test_unknown_paths_and_methods(echo: WorkerProcess) -> None:
    answer = echo.client.get("/nothing")
    assert answer.status_code == 404
    assert "/predict" in error_of(answer)["message"]
    answer = echo.client.get("/predict")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"
    assert error_of(answer)["code"] == "method_not_allowed"
    assert echo.client.post("/v1/audio/speech", json={"input": "x"}).status_code == 404
    assert echo.client.post("/health").status_code == 405
    assert echo.client.get("/predict/").status_code == 404


def test_probes_and_health(echo: WorkerProcess) -> None:
    assert echo.client.get("/livez").json() == {"status": "live"}
    assert echo.client.get("/readyz").json() == {"status": "ready"}
    report = echo.health()
    assert report["status"] == "ready"
    assert report["id"] == "w1"
    assert report["pid"] == echo.process.pid
    assert report["model"] == "test"
    assert (report["device"], report["dtype"], report["engine"]) == ("cpu", "float32", "echo")
    assert report["provider"] is None
    assert (report["running"], report["waiting"], report["queue_size"]) == (0, 0, 8)
    assert report["resident_bytes"] > 10_000_000
    assert report["uptime_seconds"] > 0
    assert len(report["threads"]) == 1
    assert report["threads"][0].startswith("device")
    assert echo.client.get("/longest_request").json()["json"] == {"longest": True}


def test_public_health_reveals_nothing_of_the_machine(echo: WorkerProcess) -> None:
    """The balancer marks what it passes on."""
    public = {"X-Farm-Request": "0123456789abcdef" * 2}
    assert echo.client.get("/health", headers=public).json() == {
        "status": "ready",
        "model": "test",
        "device": "cpu",
        "engine": "echo",
        "provider": None,
        "running": 0,
        "waiting": 0,
    }
    hidden = echo.client.get("/longest_request", headers=public)
    unknown = echo.client.get("/longest_requesu", headers=public)
    assert hidden.status_code == unknown.status_code == 404
    assert hidden.text == unknown.text.replace("requesu", "request")
    assert "longest" not in echo.client.get("/nothing").text


def test_models(echo: WorkerProcess) -> None:
    body = echo.client.get("/v1/models").json()
    assert body["object"] == "list"
    assert [model["id"] for model in body["data"]] == ["test", "default"]
    assert set(body["data"][0]) == {"id", "object", "created", "owned_by"}
    assert body["data"][0]["created"] == int(echo.spec_file.stat().st_mtime)
    assert echo.client.get("/v1/models/default").json()["id"] == "default"
    assert error_of(echo.client.get("/v1/models/none"))["code"] == "model_not_found"


def test_created_comes_from_the_spec(tmp_path: Path) -> None:
    with WorkerProcess(
        tmp_path, "tests.workers.models.plain:Echo", spec={"created": 1234567890}
    ) as worker:
        assert worker.client.get("/v1/models/test").json()["created"] == 1234567890


def test_metrics(echo: WorkerProcess) -> None:
    before = echo.metric("gpufarm_requests_total", code="200", worker="w1", model="test")
    echo.predict(1)
    assert echo.metric("gpufarm_requests_total", code="200") == before + 1
    text = echo.client.get("/metrics").text
    for name in (
        "gpufarm_request_duration_seconds_bucket",
        "gpufarm_queue_duration_seconds_count",
        "gpufarm_time_to_first_byte_seconds_sum",
        "gpufarm_requests_in_progress",
        "gpufarm_queue_depth",
        "gpufarm_worker_resident_bytes",
        "gpufarm_worker_startup_seconds",
    ):
        assert f'{name}{{model="test"' in text or f"{name}{{" in text


@pytest.mark.parametrize("kind", ["value", "exit"])
def test_model_exception_is_500_without_its_message(faulty: WorkerProcess, kind: str) -> None:
    answer = faulty.predict({"kind": kind})
    assert answer.status_code == 500
    error = error_of(answer)
    assert error["code"] == "model_failed"
    assert {"value": "ValueError", "exit": "SystemExit"}[kind] in error["message"]
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text
    identity = answer.headers["x-request-id"]
    eventually(lambda: f"the model failed id={identity}\nTraceback" in faulty.log, "the traceback")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("object", "an object at ['a'], which JSON cannot carry"),
        ("nan", "nan at ['a'], which JSON cannot carry: return None or a finite number"),
        ("set", "a set at ['a'], which JSON cannot carry: return a list"),
        ("surrogate", "a str with half of a surrogate pair at character 0"),
    ],
)
def test_unsendable_result_is_explained_to_the_client_and_in_the_log(
    faulty: WorkerProcess, kind: str, words: str
) -> None:
    """It is a mistake of the model's author, who reads either."""
    answer = faulty.predict({"kind": kind})
    assert answer.status_code == 500
    assert answer.headers["x-should-retry"] == "false"
    error = error_of(answer)
    assert error["code"] == "answer_not_sendable"
    assert words in error["message"]
    identity = answer.headers["x-request-id"]
    eventually(lambda: f"answered 500 id={identity} {error['message']}" in faulty.log, "the line")


def test_model_rejects_with_400(faulty: WorkerProcess) -> None:
    answer = faulty.predict({"kind": "refuse"})
    assert answer.status_code == 400
    assert error_of(answer)["message"] == "kind must not be refuse"


def test_arrays_are_sent_as_lists(faulty: WorkerProcess) -> None:
    assert faulty.predict({"kind": "numpy"}).json() == {"a": [0, 1, 2], "b": 0.5}


def test_generator_streams_lines(counting: WorkerProcess) -> None:
    answer = counting.predict({"count": 3})
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert answer.headers["x-accel-buffering"] == "no"
    assert [json.loads(line) for line in answer.text.splitlines()] == [
        {"n": 0},
        {"n": 1},
        {"n": 2},
    ]
    assert counting.predict({"count": 0}).text == ""


def test_generator_streams_events_on_request(counting: WorkerProcess) -> None:
    answer = counting.predict({"count": 2}, headers={"Accept": "text/event-stream"})
    assert answer.headers["content-type"] == "text/event-stream"
    assert answer.text == 'data: {"n":0}\n\ndata: {"n":1}\n\nevent: done\ndata: {}\n\n'


def test_generator_streams_bytes_unchanged(counting: WorkerProcess) -> None:
    answer = counting.predict({"count": 3, "kind": "bytes"})
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.content == b"012"


def test_a_stream_that_fails_before_its_first_item_is_a_500(counting: WorkerProcess) -> None:
    assert counting.predict({"fail_at": 0}).status_code == 500


def test_stream_that_fails_later_is_cut_off(counting: WorkerProcess) -> None:
    before = counting.metric("gpufarm_requests_total", code="500")
    with pytest.raises(httpx.RemoteProtocolError):
        counting.predict({"fail_at": 2})
    assert counting.metric("gpufarm_requests_total", code="500") == before + 1
    answer = counting.predict({"fail_at": 1}, headers={"Accept": "text/event-stream"})
    events = answer.text.split("\n\n")
    assert events[0] == 'data: {"n":0}'
    assert events[1].startswith('event: error\ndata: {"error":{"message":"The model failed')
    assert "secret" not in answer.text
