"""Lines of all kinds of logs, read as records with one kind of time."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import datetime

import pytest

from launcher.cli.log_records import Record, parse_records, stamp


def at(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


NOON = at("2026-11-25T12:00:00+00:00")
OURS = "2026-11-25T12:00:00.123Z"


@pytest.fixture(autouse=True)
def two_hours_east(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Local time is UTC+2."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "XXX-2")
        time.tzset()
        yield
    time.tzset()


def only(line: str, process: str = "w1") -> Record:
    (record,) = parse_records(process, [line], 0.0, 1.0)
    return record


@pytest.mark.parametrize(
    ("line", "level", "message"),
    [
        (f"{OURS} ERROR w1 the model failed id=1", "ERROR", "the model failed id=1"),
        ("2026-11-25 14:00:00,123 INFO spawned: 'w1'", "INFO", "spawned: 'w1'"),
        ("2026-11-25 14:00:00,123 CRIT Supervisor is running", "CRITICAL", "Supervisor is running"),
        ("2026-11-25 14:00:00.123456 started", "INFO", "started"),
        ("[2026-11-25 13:00:00.123 +0100] [warning] hot", "WARNING", "hot"),
        ("2026-11-25T12:00:00.123+00:00", "INFO", ""),
    ],
)
def test_every_kind_of_time_is_shown_as_one(line: str, level: str, message: str) -> None:
    record = only(line)
    assert stamp(record.time) == OURS
    assert (record.level, record.message) == (level, message)
    assert record.text[0].split()[0] == OURS


def test_a_line_of_nginx() -> None:
    record = only("2026/11/25 14:00:00 [error] 7#0: *1 refused", "nginx-error")
    assert record.time == NOON
    assert record.text == ("2026-11-25T12:00:00.000Z [error] 7#0: *1 refused",)
    assert (record.level, record.message) == ("ERROR", "7#0: *1 refused")
    access = '{"time":"2026-11-25T12:00:00+00:00","status":200}'
    record = only(access, "nginx-access")
    assert (record.time, record.text) == (NOON, (access,))
    assert json.loads(record.to_json())["status"] == 200


@pytest.mark.parametrize(
    "line", ["plain", "2026-13-45 99:00:00 x", "2026", '{"time": 3}', "{", "[" * 9999, "{" * 9999]
)
def test_a_line_without_a_time_gets_that_of_the_file(line: str) -> None:
    assert only(line) == Record(1.0, "w1", line, text=(line,))


def test_a_json_record_is_shown_as_text_and_comes_back() -> None:
    body = {
        "time": OURS,
        "level": "ERROR",
        "process": "w1",
        "message": "the model\nfailed",
        "id": "a b",
        "status": 500,
        "traceback": "Traceback\n  at x\nE: y",
    }
    record = only(json.dumps(body))
    head = f'{OURS} ERROR w1 the model | failed id="a b" status=500'
    assert record.text == (head, "Traceback", "  at x", "E: y")
    assert json.loads(record.to_json()) == body


def test_a_traceback_belongs_to_its_record() -> None:
    lines = [
        "early",
        f"{OURS} ERROR w1 failed",
        "Traceback (most recent call last):",
        '  File "x"',
        "ValueError: y",
        "2026-11-25T12:00:01.000Z INFO w1 next",
        "printed by the model",
    ]
    early, failed, following, printed = parse_records("w1", lines, 0.0, 1.0)
    assert early.time == failed.time == NOON + 0.123
    assert failed.text == tuple(lines[1:5])
    assert json.loads(failed.to_json())["traceback"] == "\n".join(lines[2:5])
    assert json.loads(printed.to_json())["message"] == "printed by the model"
    assert printed.time == following.time == NOON + 1


def test_times_of_a_file_never_fall() -> None:
    lines = ["2026-11-25T12:00:05Z a", "2026-11-25T12:00:01Z b", "c"]
    assert [record.time for record in parse_records("w1", lines, 0.0, 1.0)] == [NOON + 5] * 3
    assert [record.time for record in parse_records("w1", lines, NOON + 9, 1.0)] == [NOON + 9] * 3
