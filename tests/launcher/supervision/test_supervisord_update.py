"""A real supervisord with our own methods: definitions replaced in place, and a socket that comes
back."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from launcher.supervision.supervisord import (
    CONF,
    PID_FILE,
    Supervisor,
    SupervisorError,
    command,
    environment,
)
from tests.waiting import until

FILE = """
[unix_http_server]
file = {folder}/run/s.sock
chmod = 0700
[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface
[rpcinterface:farm]
supervisor.rpcinterface_factory = launcher.supervision.rpc_interface:make_interface
[supervisord]
nodaemon = true
silent = true
logfile = {folder}/supervisord.log
pidfile = {folder}/supervisord.pid
[program:nginx]
command = {command}
stopwaitsecs = 3
autostart = false
startsecs = 0
stdout_logfile = {folder}/nginx.log
[program:worker]
command = {command}
process_name = w%(process_num)d
numprocs = {numprocs}
numprocs_start = 1
autostart = false
autorestart = false
startsecs = 0
stopwaitsecs = {stopwaitsecs}
stdout_logfile = {folder}/w%(process_num)d.log
stdout_logfile_maxbytes = {log_bytes}
stdout_logfile_backups = 1
redirect_stderr = true
"""
STUBBORN = """sh -c "trap '' TERM; echo started; while :; do sleep 0.1; done" """
TALKATIVE = """sh -c "while :; do echo 0123456789; sleep 0.02; done" """


@dataclass
class Running:
    """One supervisord, its file and its socket."""

    folder: Path
    process: subprocess.Popen[bytes]
    supervisor: Supervisor

    @property
    def socket(self) -> Path:
        return self.folder / "run" / "s.sock"

    def write(self, **changes: object) -> None:
        write(self.folder, **changes)

    def pid(self, name: str) -> int:
        return self.supervisor.processes()[name].pid

    def names(self) -> set[str]:
        return set(self.supervisor.processes())


def write(folder: Path, **changes: object) -> None:
    values = {"command": "sleep 1000", "numprocs": 2, "stopwaitsecs": 100, "log_bytes": 100_000}
    (folder / CONF).write_text(FILE.format(folder=folder, **(values | changes)))


@pytest.fixture
def running() -> Iterator[Running]:
    with tempfile.TemporaryDirectory(prefix="farm-", dir="/tmp") as name:
        folder = Path(name)
        (folder / "run").mkdir(mode=0o700)
        write(folder)
        process = subprocess.Popen(command(folder), env=environment(folder))
        supervisor = Supervisor(folder / "run" / "s.sock")
        try:
            until(supervisor.alive, "supervisord answers")
            yield Running(folder, process, supervisor)
        finally:
            supervisor.close()
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                for path in Path("/proc").glob("[0-9]*/stat"):
                    parts = path.read_text().rpartition(") ")[2].split()
                    if parts[1] == str(process.pid):
                        os.kill(int(path.parent.name), signal.SIGKILL)
                process.kill()
                process.wait()


def test_processes_are_told_by_name_state_and_time_of_their_start(running: Running) -> None:
    infos = running.supervisor.processes()
    assert set(infos) == {"nginx", "w1", "w2"}
    assert {info.started for info in infos.values()} == {0.0}
    running.supervisor.start("w1")
    first = running.supervisor.processes()["w1"]
    assert first.alive
    assert first.started > 0
    os.kill(first.pid, signal.SIGKILL)
    until(lambda: not running.supervisor.processes()["w1"].alive, "it ends")
    ended = running.supervisor.processes()["w1"]
    assert (ended.exit_code, ended.started) == (-1, first.started)
    running.supervisor.start("w1")
    again = running.supervisor.processes()["w1"]
    assert again.started > first.started, "by which a start that happened is known"


def test_an_update_changes_definitions_and_leaves_running_processes_alone(running: Running) -> None:
    running.supervisor.start("w1")
    pid = running.pid("w1")
    running.write(command="sleep 2000", stopwaitsecs=1, log_bytes=1234, numprocs=4)
    running.supervisor.update()
    assert running.pid("w1") == pid
    assert running.names() == {"nginx", "w1", "w2", "w3", "w4"}
    for name in ("w2", "w4"):
        running.supervisor.start(name)
        arguments = Path(f"/proc/{running.pid(name)}/cmdline")
        until(lambda file=arguments: file.read_bytes() == b"sleep\x002000\x00", "the new command")  # type: ignore[misc]
    assert Path(f"/proc/{pid}/cmdline").read_bytes() == b"sleep\x001000\x00"
    running.supervisor.stop("w1")
    until(lambda: not running.supervisor.processes()["w1"].alive, "it stops")
    running.supervisor.start("w1")
    arguments = Path(f"/proc/{running.pid('w1')}/cmdline")
    until(lambda: arguments.read_bytes() == b"sleep\x002000\x00", "it follows the new file")


def test_a_running_process_gets_the_new_time_to_stop(running: Running) -> None:
    running.write(command=STUBBORN, stopwaitsecs=1000)
    running.supervisor.update()
    running.supervisor.start("w1")
    until(lambda: "started" in (running.folder / "w1.log").read_text(), "it ignores SIGTERM")
    running.write(command=STUBBORN, stopwaitsecs=1)
    running.supervisor.update()
    running.supervisor.stop("w1")
    until(lambda: not running.supervisor.processes()["w1"].alive, "it is killed", seconds=20)


def test_a_longer_time_to_stop_holds_for_a_process_that_runs(running: Running) -> None:
    running.write(command=STUBBORN, stopwaitsecs=1)
    running.supervisor.update()
    for name in ("w1", "nginx"):
        running.supervisor.start(name)
    for name in ("w1", "nginx"):
        log = running.folder / f"{name}.log"
        until(lambda file=log: "started" in file.read_text(), "it ignores SIGTERM")  # type: ignore[misc]
    running.write(command=STUBBORN, stopwaitsecs=1000)
    running.supervisor.update()
    for name in ("w1", "nginx"):
        running.supervisor.stop(name)
    until(lambda: not running.supervisor.processes()["nginx"].alive, "three seconds are over")
    assert running.supervisor.processes()["w1"].stopping, "after the old one it would be dead"
    running.supervisor.kill("w1")
    until(lambda: not running.supervisor.processes()["w1"].alive, "it ends")


def test_new_log_sizes_hold_for_the_next_process(running: Running) -> None:
    running.write(command=TALKATIVE)
    running.supervisor.update()
    running.supervisor.start("w1")
    until(lambda: (running.folder / "w1.log").stat().st_size > 100, "it writes")
    pid = running.pid("w1")
    running.write(command=TALKATIVE, log_bytes=200)
    running.supervisor.update()
    assert running.pid("w1") == pid
    running.supervisor.start("w2")
    until((running.folder / "w2.log.1").exists, "w2's log is rotated early")


def test_removed_programs_stay_while_they_run(running: Running) -> None:
    running.write(numprocs=4)
    running.supervisor.update()
    for name in ("w1", "w3"):
        running.supervisor.start(name)
    pid = running.pid("w3")
    running.write(numprocs=1)
    running.supervisor.update()
    assert running.names() == {"nginx", "w1", "w3"}
    assert running.pid("w3") == pid
    running.supervisor.stop("w3")
    until(lambda: not running.supervisor.processes()["w3"].alive, "it can be stopped")
    running.supervisor.update()
    assert running.names() == {"nginx", "w1"}
    running.write(numprocs=3)
    running.supervisor.update()
    running.supervisor.start("w3")
    assert running.pid("w3") not in (0, pid)


def test_a_file_that_cannot_be_read_changes_nothing(running: Running) -> None:
    running.supervisor.start("w1")
    pid = running.pid("w1")
    for text in ("[program:worker]\nnumprocs = many\ncommand = x", "no section at all", ""):
        (running.folder / CONF).write_text(text)
        with pytest.raises(SupervisorError):
            running.supervisor.update()
        assert running.names() == {"nginx", "w1", "w2"}
        assert running.pid("w1") == pid
    running.write(numprocs=3)
    running.supervisor.update()
    assert running.names() == {"nginx", "w1", "w2", "w3"}


@pytest.mark.parametrize("what", ["file", "directory"])
def test_a_removed_socket_comes_back_and_nothing_is_stopped(running: Running, what: str) -> None:
    running.supervisor.start("w1")
    pid = running.pid("w1")
    for _ in range(2):
        if what == "file":
            running.socket.unlink()
        else:
            shutil.rmtree(running.socket.parent)
        until(running.socket.exists, "it makes another", seconds=20)
        fresh = Supervisor(running.socket)
        until(fresh.alive, "it answers there", seconds=20)
        assert fresh.processes()["w1"].pid == pid
        fresh.close()
        assert running.socket.parent.stat().st_mode & 0o077 == 0
        assert running.socket.stat().st_mode & 0o077 == 0


def test_a_connection_that_was_open_works_on_while_the_socket_is_made_again(
    running: Running,
) -> None:
    """The controller's: a socket's removal must not blind it."""
    assert running.supervisor.alive()
    running.socket.unlink()
    until(running.socket.exists, "it makes another", seconds=20)
    until(running.supervisor.alive, "the open connection, or a new one, answers", seconds=20)
    running.supervisor.start("w2")
    assert running.supervisor.processes()["w2"].alive


def test_a_socket_that_is_removed_while_it_ends_does_not_come_back(running: Running) -> None:
    running.supervisor.shutdown()
    assert running.process.wait(20) == 0
    assert not running.socket.exists()
    assert PID_FILE.endswith(".pid")
