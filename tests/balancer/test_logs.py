"""nginx's log files while it runs: moved aside, deleted, grown."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from balancer import processes
from balancer.configuration import ACCESS_LOG, ERROR_LOG
from launcher.config.settings import LogsSettings
from launcher.supervision.log_rotation import rotate_logs
from tests.balancer.harness import BalancerHarness, make_balancer
from tests.waiting import until


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[BalancerHarness]:
    made = make_balancer(tmp_path)
    made.start()
    yield made
    made.stop()


def is_logged(where: BalancerHarness, path: str) -> bool:
    return path in (where.config.prefix / ACCESS_LOG).read_text()


def ask(where: BalancerHarness, path: str) -> None:
    httpx.get(where.url + path)
    until(lambda: is_logged(where, path), f"{path} is logged")


def test_logs_that_were_moved_aside_are_opened_again(alone: BalancerHarness) -> None:
    log = alone.config.prefix / ACCESS_LOG
    ask(alone, "/one")
    log.rename(log.with_name("moved"))
    assert processes.reopen_logs(alone.config.prefix)
    until(log.exists, "a new log")
    ask(alone, "/two")
    assert "/two" not in log.with_name("moved").read_text()


@pytest.mark.parametrize("name", [ACCESS_LOG, ERROR_LOG])
def test_a_log_that_was_deleted_is_opened_again(alone: BalancerHarness, name: str) -> None:
    ask(alone, "/one")
    log = alone.config.prefix / name
    log.unlink()
    rotate_logs(alone.config.prefix, LogsSettings())
    until(log.exists, "a new log")
    ask(alone, "/two")


def test_a_deleted_folder_of_logs_is_made_again(alone: BalancerHarness) -> None:
    shutil.rmtree(alone.config.prefix / "logs")
    rotate_logs(alone.config.prefix, LogsSettings())
    until((alone.config.prefix / ERROR_LOG).exists, "a new log")
    ask(alone, "/two")


def test_a_log_beyond_its_limit_is_moved_aside(alone: BalancerHarness) -> None:
    log = alone.config.prefix / ACCESS_LOG
    ask(alone, "/one")
    rotate_logs(alone.config.prefix, LogsSettings(max_bytes=10, backups=2))
    until(log.exists, "a new log")
    ask(alone, "/two")
    assert "/one" in log.with_name(f"{log.name}.1").read_text()
    assert not is_logged(alone, "/one")


def test_logs_that_are_as_they_should_be_stay_open(alone: BalancerHarness) -> None:
    ask(alone, "/one")
    rotate_logs(alone.config.prefix, LogsSettings())
    ask(alone, "/two")
    assert is_logged(alone, "/one")
