"""Log formats: text with a traceback on separate lines, or JSON with it in a field."""

from __future__ import annotations

import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.workers.harness import WorkerProcess, eventually
from workers.logs import JsonFormatter, TextFormatter

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"


def record(message: str, **extra: Any) -> logging.LogRecord:
    made = logging.LogRecord("x", logging.ERROR, "x.py", 1, message, (), extra.pop("exc", None))
    made.__dict__.update(extra)
    return made


def failed() -> Any:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        return sys.exc_info()


def test_text_format_puts_the_message_on_one_line_and_the_traceback_below() -> None:
    lines = TextFormatter("w1").format(record("one\n\ntwo", exc=failed())).splitlines()
    assert re.fullmatch(rf"{TIME} ERROR w1 one \| two", lines[0])
    assert lines[1] == "Traceback (most recent call last):"
    assert lines[-2:] == ["ValueError: two", "lines"]


def test_fields_are_quoted_where_necessary() -> None:
    fields = {"id": "a-1", "path": '/a b"\n', "status": None, "queue_ms": 0.25, "empty": ""}
    line = TextFormatter("100%s").format(record("request", fields=fields))
    assert line.endswith(
        r'ERROR 100%s request id=a-1 path="/a b\"\n" status=None queue_ms=0.25 empty=""'
    )
    assert "\n" not in line


def test_json_format_writes_one_object_per_line() -> None:
    text = JsonFormatter("w1").format(
        record("the\nmodel failed", fields={"id": "é", "time": "0"}, traceback="T\n  at x\n\nE: y")
    )
    assert "\n" not in text
    body = json.loads(text)
    assert re.fullmatch(TIME, body.pop("time"))
    assert body == {
        "level": "ERROR",
        "process": "w1",
        "message": "the\nmodel failed",
        "id": "é",
        "traceback": "T\n  at x\nE: y",
    }
    assert "traceback" in json.loads(JsonFormatter("w1").format(record("x", exc=failed())))
    assert "traceback" not in json.loads(JsonFormatter("w1").format(record("x")))


class JsonWorker(WorkerProcess):
    """A worker that logs JSON."""

    def _ready(self) -> re.Match[str] | None:
        assert self.process.poll() is None, f"the worker ended: {self.log}"
        return re.search(r"ready url=([^\s\"]+)", self.log)

    def records(self, message: str) -> list[dict[str, Any]]:
        return [body for line in self.lines if (body := json.loads(line))["message"] == message]


def test_worker_logs_json(tmp_path: Path) -> None:
    spec = {"log_format": "json"}
    with JsonWorker(tmp_path, "tests.workers.models.plain:Faulty", spec=spec) as worker:
        answer = worker.predict({"kind": "value"})
        assert answer.status_code == 500
        (failure,) = eventually(lambda: worker.records("the model failed"), "the failure")
        (request,) = eventually(lambda: worker.records("request"), "the request")
        worker.terminate()
        assert worker.wait() == 0
    identity = answer.headers["x-request-id"]
    assert failure["id"] == identity
    assert failure["traceback"].startswith("Traceback (most recent call last):\n")
    assert failure["traceback"].splitlines()[-1].startswith("ValueError")
    keys = ("id", "method", "path", "status", "level", "process")
    assert [request[key] for key in keys] == [identity, "POST", "/predict", 500, "INFO", "w1"]
    assert request["total_ms"] >= request["inference_ms"] > 0
    assert [json.loads(line)["process"] for line in worker.lines] == ["w1"] * len(worker.lines)


@pytest.mark.parametrize("value", ["xml", 3, None])
def test_unknown_log_format_fails_the_start(tmp_path: Path, value: Any) -> None:
    worker = WorkerProcess(tmp_path, "tests.workers.models.plain:Echo", spec={"log_format": value})
    try:
        assert worker.wait() == 3
        assert 'log_format must be "text" or "json"' in worker.log
    finally:
        worker.__exit__()
