"""Logs read as they grow, through rotation, a line at a time; and nginx's, moved aside."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.command.following import Follower, LogFile, log_files
from launcher.configuration.config import ConfigError
from launcher.processes.rotate import shift


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
    (tmp_path / "w1.log").write_text("hello\n")
    (tmp_path / "w10.log").write_text("there\n")
    (tmp_path / "w2.log").write_text("you\n")
    seen: list[str] = []
    Follower(tmp_path, (), seen.append, lines=5).show_new()
    assert seen == ["w1 | hello", "w2 | you", "w10 | there"]
    seen.clear()
    Follower(tmp_path, ("w2",), seen.append, lines=5).show_new()
    assert seen == ["you"]


def test_a_worker_that_appears_later_is_followed_too(tmp_path: Path) -> None:
    seen: list[str] = []
    follower = Follower(tmp_path, (), seen.append, lines=0)
    assert not follower.show_new()
    (tmp_path / "w3.log").write_text("late\n")
    assert follower.show_new()
    assert seen == ["w3 | late"]


@pytest.mark.parametrize("name", ["../secret", "w", "x1", "w1.log"])
def test_an_unknown_process_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="no such process"):
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
