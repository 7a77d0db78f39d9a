"""Logs that were deleted while supervisord has them open, with a real supervisord."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from launcher.config.state import StateError
from launcher.supervision.deleted_logs import reopen_missing_logs
from launcher.supervision.supervisord import python_module
from tests.waiting import until

NAMES = ("supervisord", "w1", "w2")
TICKING = "import time\nwhile True:\n    print('tick', flush=True)\n    time.sleep(0.02)"


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    return tmp_path / "logs"


@pytest.fixture
def supervisord(tmp_path: Path, logs: Path) -> Iterator[subprocess.Popen[bytes]]:
    """One that runs two programs which write without end."""
    logs.mkdir()
    (tmp_path / "tick.py").write_text(TICKING)
    programs = "".join(
        f"[program:{name}]\ncommand = {sys.executable} {tmp_path}/tick.py\nredirect_stderr = true\n"
        f"stdout_logfile = {logs}/{name}.log\n"
        for name in ("w1", "w2")
    )
    (tmp_path / "supervisord.conf").write_text(
        f"[supervisord]\nnodaemon = true\nsilent = true\nlogfile = {logs}/supervisord.log\n"
        f"pidfile = {tmp_path}/pid\n{programs}"
    )
    command = python_module("launcher.supervision.run_supervisord", "-c", "supervisord.conf", "-n")
    with subprocess.Popen(command, cwd=tmp_path) as process:
        try:
            until(lambda: grows(logs / "w1.log") and grows(logs / "w2.log"), "its programs write")
            yield process
        finally:
            process.terminate()


def grows(log: Path) -> bool:
    return log.stat().st_size > 0


def test_nothing_happens_while_all_are_there(
    logs: Path, supervisord: subprocess.Popen[bytes]
) -> None:
    assert reopen_missing_logs(logs, NAMES, supervisord.pid) == ()
    assert "reopen" not in (logs / "supervisord.log").read_text()


def test_deleted_logs_are_written_again(logs: Path, supervisord: subprocess.Popen[bytes]) -> None:
    (logs / "w1.log").unlink()
    (logs / "supervisord.log").unlink()
    inode = (logs / "w2.log").stat().st_ino
    assert reopen_missing_logs(logs, NAMES, supervisord.pid) == ("supervisord", "w1")
    until(lambda: grows(logs / "w1.log"), "the log grows again")
    assert (logs / "w2.log").stat().st_ino == inode, "what was there goes on"
    until(lambda: reopen_missing_logs(logs, NAMES, supervisord.pid) == (), "all is well")
    psutil.Process(supervisord.pid).children()[0].kill()
    until(lambda: "exited: w" in (logs / "supervisord.log").read_text(), "its own grows, too")
    assert supervisord.poll() is None


def test_a_file_in_the_place_of_a_deleted_one_is_noticed(
    logs: Path, supervisord: subprocess.Popen[bytes]
) -> None:
    (logs / "w1.log").unlink()
    (logs / "w1.log").touch()
    assert reopen_missing_logs(logs, NAMES, supervisord.pid) == ("w1",)
    until(lambda: grows(logs / "w1.log"), "the log grows again")


def test_the_whole_folder_may_go(logs: Path, supervisord: subprocess.Popen[bytes]) -> None:
    shutil.rmtree(logs)
    assert reopen_missing_logs(logs, NAMES, supervisord.pid) == NAMES
    until(lambda: grows(logs / "w1.log") and grows(logs / "w2.log"), "both grow again")
    assert supervisord.poll() is None


def test_where_no_file_can_be_made_supervisord_is_left_alone(
    logs: Path, supervisord: subprocess.Popen[bytes]
) -> None:
    shutil.rmtree(logs)
    logs.write_text("in the way")
    with pytest.raises(StateError, match=r"supervisord\.log: cannot recreate the deleted log"):
        reopen_missing_logs(logs, NAMES, supervisord.pid)
    assert supervisord.poll() is None
