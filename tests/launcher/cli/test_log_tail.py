"""Logs read as they grow, through rotation, a line at a time; and nginx's, moved aside."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.cli.log_tail import LogFile, LogTail, log_files
from launcher.config.settings import ConfigError
from launcher.supervision.log_rotation import shift


def test_lines_come_once_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "w1.log"
    log = LogFile("w1", path)
    assert log.new_lines() == []
    path.write_text("one\ntwo\nthr")
    assert log.new_lines() == ["one", "two"]
    with path.open("a") as file:
        file.write("ee\n")
    assert log.new_lines() == ["three"]
    assert log.new_lines() == []


def test_a_rotated_log_is_read_to_its_end_first(tmp_path: Path) -> None:
    path = tmp_path / "w1.log"
    path.write_text("one\n")
    log = LogFile("w1", path)
    assert log.new_lines() == ["one"]
    with path.open("a") as file:
        file.write("two\n")
    assert shift(path, backups=2)
    path.write_text("three\n")
    assert log.new_lines() == ["two", "three"]


def test_a_truncated_log_begins_again(tmp_path: Path) -> None:
    path = tmp_path / "w1.log"
    path.write_text("a long first line\n")
    log = LogFile("w1", path)
    log.new_lines()
    path.write_text("new\n")
    assert log.new_lines() == ["new"]


def test_only_the_last_lines_to_begin_with(tmp_path: Path) -> None:
    path = tmp_path / "w1.log"
    path.write_text("".join(f"{n}\n" for n in range(100)))
    log = LogFile("w1", path)
    log.skip_to_last(3)
    assert log.new_lines() == ["97", "98", "99"]


def test_several_logs_name_their_process_and_one_does_not(tmp_path: Path) -> None:
    for index, (name, text) in enumerate([("w1", "hello"), ("w2", "you"), ("w10", "there")]):
        path = tmp_path / f"{name}.log"
        path.write_text(f"{text}\n")
        os.utime(path, (1000 + index, 1000 + index))
    seen: list[str] = []
    LogTail(tmp_path, (), seen.append, lines=5).print_new()
    assert seen == ["w1 | hello", "w2 | you", "w10 | there"]
    seen.clear()
    LogTail(tmp_path, ("w2",), seen.append, lines=5).print_new()
    assert seen == ["you"]


FIRST = {
    "w1": (
        "2026-11-25T12:00:03.000Z ERROR w1 the model failed id=7\n"
        "Traceback (most recent call last):\n  File x\nValueError: y\n"
        "2026-11-25T12:00:05.000Z INFO w1 request id=8\n"
    ),
    "w2": "no time\n2026-11-25T12:00:04.000Z INFO w2 request id=9\n",
    "controller": '{"time": "2026-11-25T12:00:01.000Z", "level": "INFO", "process": "controller", '
    '"message": "w1 is starting", "pid": 5}\n',
    "nginx-error": "2026/11/25 12:00:02 [error] 7#0: refused\n",
    "supervisord": "2026-11-25 12:00:00,500 INFO spawned\n",
}


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The logs of a farm, whose local time is UTC."""
    for name, text in FIRST.items():
        (tmp_path / f"{name}.log").write_text(text)
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "UTC")
        time.tzset()
        yield tmp_path
    time.tzset()


def test_logs_are_merged_by_time(logs: Path) -> None:
    seen: list[str] = []
    tail = LogTail(logs, (), seen.append, lines=20)
    tail.print_new()
    assert seen == [
        "supervisord | 2026-11-25T12:00:00.500Z INFO spawned",
        "controller | 2026-11-25T12:00:01.000Z INFO controller w1 is starting pid=5",
        "nginx-error | 2026-11-25T12:00:02.000Z [error] 7#0: refused",
        "w1 | 2026-11-25T12:00:03.000Z ERROR w1 the model failed id=7",
        "w1 | Traceback (most recent call last):",
        "w1 |   File x",
        "w1 | ValueError: y",
        "w2 | no time",
        "w2 | 2026-11-25T12:00:04.000Z INFO w2 request id=9",
        "w1 | 2026-11-25T12:00:05.000Z INFO w1 request id=8",
    ]
    seen.clear()
    with (logs / "w2.log").open("a") as file:
        file.write("2026-11-25T12:00:07.000Z INFO w2 later\n")
    with (logs / "w1.log").open("a") as file:
        file.write("printed\n")
    tail.print_new()
    assert seen == ["w1 | printed", "w2 | 2026-11-25T12:00:07.000Z INFO w2 later"]


def test_merged_logs_as_json(logs: Path) -> None:
    seen: list[str] = []
    LogTail(logs, (), seen.append, lines=20, as_json=True).print_new()
    records = [json.loads(line) for line in seen]
    names = ["supervisord", "controller", "nginx-error", "w1", "w2", "w2", "w1"]
    assert [record["process"] for record in records] == names
    assert [record["time"] for record in records] == sorted(record["time"] for record in records)
    assert records[1]["pid"] == 5
    assert records[3]["traceback"].splitlines()[-1] == "ValueError: y"
    assert records[4]["message"] == "no time"


def test_a_worker_that_appears_later_is_followed_too(tmp_path: Path) -> None:
    seen: list[str] = []
    tail = LogTail(tmp_path, (), seen.append, lines=0)
    assert not tail.print_new()
    (tmp_path / "w3.log").write_text("late\n")
    assert tail.print_new()
    assert seen == ["w3 | late"]


@pytest.mark.parametrize("name", ["../secret", "w", "x1", "w1.log"])
def test_an_unknown_process_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="unknown process"):
        log_files(tmp_path, (name,))


def test_shifting_keeps_as_many_as_asked(tmp_path: Path) -> None:
    log = tmp_path / "nginx-access.log"
    for n in range(5):
        log.write_text(str(n))
        shift(log, backups=2)
    kept = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert kept == {"nginx-access.log.1": "4", "nginx-access.log.2": "3"}
    log.write_text("5")
    shift(log, backups=0)
    assert not log.exists()
